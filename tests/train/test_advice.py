"""What a run says of options that will not do what they seem to."""

import numpy as np
import pytest
import torch
from torch import nn

from fastpref.batches.order import GlobalOrder
from fastpref.config import Config, DPOConfig, ModelConfig, OptimConfig, StagesConfig, WeightsConfig
from fastpref.distributed import World
from fastpref.train.advice import (
    advise_examples,
    advise_held_out,
    advise_precision,
    advise_schedule,
    advise_task,
    unmoved_share,
)


def make_config(**options) -> Config:
    return Config(**({"model": ModelConfig(name_or_path="none"), "loss": DPOConfig()} | options))


def make_order(num_rows: int, **options) -> GlobalOrder:
    return GlobalOrder(np.arange(num_rows), seed=0, **({"n_epochs": 1} | options))


def test_a_warmup_that_never_ends_is_said_with_the_rate_that_is_reached():
    config = make_config(warmup_steps=150, lr=1e-6)
    assert list(advise_schedule(config, 151)) == []
    [line] = advise_schedule(config, 100)
    assert "the run has 100 optimizer steps" in line and "66.2 % of lr=1e-06" in line


def test_a_schedule_that_nothing_follows_is_said():
    [line] = advise_schedule(make_config(optim=OptimConfig(min_lr_ratio=0.1)), 1000)
    assert "optim.min_lr_ratio=0.1 has no effect" in line
    config = make_config(warmup_steps=9, optim=OptimConfig(schedule="cosine"))
    assert list(advise_schedule(config, 11)) == []
    [line] = advise_schedule(config, 10)
    assert "leave none to decay in" in line


def test_examples_that_are_more_than_the_passes_give_or_no_whole_batches_are_said():
    config = make_config(n_examples=100, n_epochs=1, batch_size=8)
    [line] = advise_examples(config, make_order(40, batch_size=8, n_examples=100))
    assert "n_epochs=1 ends the run after 40" in line
    config = make_config(n_examples=20, n_epochs=1, batch_size=8)
    [line] = advise_examples(config, make_order(40, batch_size=8, n_examples=20))
    assert "rounded up to 24" in line


def test_fewer_held_out_rows_than_asked_for_are_said():
    config = make_config(n_eval_examples=256, sample_during_eval=False)
    [line] = advise_held_out(config, make_order(10, batch_size=16, drop_last=False))
    assert "the test split has 10 rows" in line


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lr", [3e-7, 1e-5, 1e-3])
def test_weights_too_coarse_for_the_rate_are_those_that_a_step_leaves_as_they_are(dtype, lr):
    world = World(rank=0, size=1, device=torch.device("cpu"), mesh=None, store=None)
    weights = 0.02 * torch.randn(20_000, generator=torch.Generator().manual_seed(0))
    parameter = nn.Parameter(weights.to(dtype))
    # half the distance to the next number, found from the number itself
    _, exponent = torch.frexp(parameter.detach().float())
    half_gap = torch.ldexp(torch.tensor(torch.finfo(dtype).eps / 4), exponent)
    expected = (half_gap > lr).float().mean().item()
    assert unmoved_share([parameter], lr, world) == pytest.approx(expected, abs=0.02)
    assert unmoved_share([nn.Parameter(weights)], lr, world) == 0


def test_master_weights_in_16_bits_are_said_with_what_keeps_the_steps():
    config = make_config(model=ModelConfig(name_or_path="none", policy_dtype="bfloat16"), lr=1e-7)
    assert list(advise_precision(config, 0.05)) == []
    [line] = advise_precision(config, 0.9)
    assert "90 % of the weights stand still" in line and "policy_dtype=float32" in line


def test_groups_of_options_that_a_task_does_not_read_are_said():
    config = make_config(weights=WeightsConfig(round=2), stages=StagesConfig(sft_first=True))
    lines = list(advise_task(config, needs_weights=False))
    assert ["weights.*" in lines[0], "stages.*" in lines[1]] == [True, True]
