"""What a user is told before training of options that will not do what they seem to."""

import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from small_data import byte_tokenizer, pairs, write_jsonl
from small_data import make_config as data_config

import train
from fastpref.batches.layouts import PackedRows
from fastpref.batches.loader import Loader
from fastpref.batches.order import GlobalOrder
from fastpref.cli.command_line import main
from fastpref.config import (
    AdapterConfig,
    Config,
    DataConfig,
    DPOConfig,
    ModelConfig,
    OptimConfig,
    PackingConfig,
    PlanConfig,
    ReferenceConfig,
    SimPOConfig,
    TransformConfig,
    WeightsConfig,
)
from fastpref.config.stages import StagesConfig
from fastpref.data.encode import PreferenceSplit, load_split
from fastpref.data.options import data_options
from fastpref.distributed import World
from fastpref.train.logs.advice import (
    Advice,
    unmoved_share,
)

ROOT = Path(__file__).parents[2]


def make_config(**options: Any) -> Config:
    values: dict[str, Any] = {"model": ModelConfig(name_or_path="tiny"), "loss": DPOConfig()}
    return Config(**(values | options))


def order(config: Config, num_rows: int, **limits: Any) -> GlobalOrder:
    limits = limits or {"n_epochs": config.n_epochs, "n_examples": config.n_examples}
    batch_size = limits.pop("batch_size", config.batch_size)
    return GlobalOrder(np.arange(num_rows), batch_size=batch_size, seed=0, **limits)


def test_a_run_that_has_all_its_steps_says_that_it_trains_no_further():
    advice = Advice(make_config())
    assert_messages(advice.on_progress(step=99, num_steps=100), [])
    assert_messages(advice.on_progress(step=100, num_steps=100), ["all 100 .* nothing is left"])


@pytest.mark.parametrize(
    ("schedule", "min_lr_ratio", "warmup_steps", "messages"),
    [
        ("constant", 0.0, 99, []),
        ("constant", 0.0, 100, ["the learning rate ends at 99 % of lr=1e-06; set warmup_steps"]),
        ("constant", 0.1, 0, [r"min_lr_ratio=0\.1 has no effect with optim\.schedule=constant"]),
        ("cosine", 0.1, 98, []),
        ("cosine", 0.1, 99, ["schedule=cosine has no effect: warmup_steps=99 of 100 optimizer"]),
        ("linear", 0.0, 300, ["ends at 33.2 %", "schedule=linear has no effect"]),
    ],
)
def test_a_warm_up_that_takes_the_whole_run_is_said(schedule, min_lr_ratio, warmup_steps, messages):
    optim = OptimConfig(schedule=schedule, min_lr_ratio=min_lr_ratio)
    config = make_config(warmup_steps=warmup_steps, lr=1e-6, optim=optim)
    assert_messages(Advice(config).on_schedule(num_steps=100), messages)


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({}, []),
        ({"n_examples": 40}, []),
        ({"n_examples": 41}, [r"n_examples=41 is rounded up to 44, whole batches of batch_size=4"]),
        ({"n_examples": 300}, ["n_epochs=1 ends the run after 100; n_epochs=null"]),
        ({"n_examples": 300, "n_epochs": None}, []),
        ({"n_examples": 299, "n_epochs": None}, ["rounded up to 300"]),
    ],
)
def test_where_a_run_ends_is_said_if_it_is_not_where_it_was_asked_to(options, messages):
    config = make_config(**options)
    assert_messages(Advice(config).on_examples(order(config, num_rows=100)), messages)


@pytest.mark.parametrize(
    ("num_rows", "wanted", "messages"),
    [
        (256, 256, []),
        (100, 256, ["n_eval_examples=256, but the test split has 100 rows"]),
        (100, 20, ["n_eval_examples=20 is rounded up to 32, whole batches of eval_batch_size=16"]),
        (10, 10, ["n_eval_model_samples=16, but the test split has 10 rows"]),
    ],
)
def test_what_is_evaluated_is_said_if_it_is_not_what_was_asked_for(num_rows, wanted, messages):
    config = make_config(n_eval_examples=wanted)
    limits = {"n_epochs": 1, "n_examples": wanted, "drop_last": False, "batch_size": 16}
    assert_messages(Advice(config).on_held_out(order(config, num_rows, **limits)), messages)


@pytest.fixture(scope="module")
def ten_pairs(tmp_path_factory) -> PreferenceSplit:
    base = tmp_path_factory.mktemp("pairs")
    write_jsonl(base / "data" / "set", "train", pairs(10))
    options = data_options(data_config(base))
    return load_split(options, "train", byte_tokenizer(), vocab_size=258, quiet=True)


@pytest.mark.parametrize(
    ("batch_size", "asked", "max_tokens", "num_ranks", "messages"),
    [
        (4, 1, "auto", 4, []),
        (4, 1, "auto", 5, ["1 of 5 processes have nothing to compute; from batch_size=5 on"]),
        (4, 2, "auto", 1, ["steps=2 has no effect with packing.max_tokens=auto"]),
        (4, 4, "1000", 1, []),
        (4, 5, "1000", 1, ["steps=5, but batch_size=4 in a world of 1 is enough for 4 micro-"]),
        (4, 3, "1000", 2, ["steps=3, but batch_size=4 in a world of 2 is enough for 2 micro-"]),
        (4, 3, "1", 1, ["steps=3 has no effect: packing.max_tokens=1 takes at least 4 micro-"]),
    ],
)
def test_a_number_of_micro_batches_that_something_else_decides_is_said(
    ten_pairs, batch_size, asked, max_tokens, num_ranks, messages
):
    packing = PackingConfig(max_tokens=max_tokens)
    config = make_config(batch_size=batch_size, gradient_accumulation_steps=asked, packing=packing)
    loader = Loader(
        data=ten_pairs,
        order=order(config, num_rows=10),
        layout=PackedRows(share_prompt=True, max_tokens=packing.token_limit or 1000),
        pad_token_id=0,
        min_micro_batches=asked,
    )
    assert_messages(Advice(config).on_micro_batches(loader, num_ranks), messages)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
@pytest.mark.parametrize("lr", [1e-6, 1e-5, 1e-3])
def test_the_weights_that_stand_still_are_those_that_adamw_does_not_move(dtype, lr):
    generator = torch.Generator().manual_seed(0)
    sizes = [(64, 32), (7,)]
    weights = [0.02 * torch.randn(size, generator=generator) for size in sizes]
    weights.append(torch.tensor([0.0, 1.0, 4.0]))
    parameters = [torch.nn.Parameter(weight.to(dtype)) for weight in weights]
    still = [torch.ones_like(parameter, dtype=torch.bool) for parameter in parameters]
    for sign in (1.0, -1.0):
        moved = [torch.nn.Parameter(parameter.detach().clone()) for parameter in parameters]
        for parameter in moved:
            parameter.grad = torch.full_like(parameter, sign)
        torch.optim.AdamW(moved, lr=lr, weight_decay=0, fused=True).step()
        still = [a & (b == c) for a, b, c in zip(still, moved, parameters, strict=True)]
    count = sum(int(of_parameter.sum()) for of_parameter in still)
    world = World(rank=0, size=1, device=torch.device("cpu"), mesh=None, store=None)
    assert unmoved_share(parameters, lr, world) == count / (64 * 32 + 7 + 3)


@pytest.mark.parametrize(
    ("model", "optimizer", "share", "messages"),
    [
        ({"policy_dtype": "bfloat16"}, "AdamW", 0.05, []),
        (
            {"policy_dtype": "bfloat16"},
            "AdamW",
            0.9983,
            ["99.8 % of the weights stand still under a step as large as lr=1e-06, about what AdamW"
             " takes: .* bfloat16; model.policy_dtype=float32 keeps such steps"],
        ),
        ({}, "SGD", 0.5, ["^50 % .* lr=1e-06: .* float32; a larger lr moves"]),
        ({"fsdp_policy_mp": "float16"}, "AdamW", 0.0, ["float16: gradients below 6e-8"]),
    ],
)  # fmt: skip
def test_steps_and_gradients_that_a_dtype_cannot_hold_are_said(model, optimizer, share, messages):
    model = ModelConfig(name_or_path="tiny", **model)
    config = make_config(model=model, optimizer=optimizer, lr=1e-6)
    assert_messages(Advice(config).on_precision(share), messages)


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({}, []),
        ({"weights": WeightsConfig(round=2)}, [r"weights\.\* have no effect with task=train"]),
        ({"stages": StagesConfig(contrast="sft")}, [r"stages\.\* have no effect with task=train"]),
        ({"transform": TransformConfig(method="paper")}, [r"transform\.\* .* with loss=dpo"]),
        (
            {"task": "audit", "transform": TransformConfig(method="paper")},
            [r"transform\.\* .* with loss=dpo"],
        ),
        (
            {
                "task": "plan",
                "weights": WeightsConfig(round=2),
                "transform": TransformConfig(method="paper"),
                "plan": PlanConfig(num_gpus=2),
            },
            [r"weights\.\* .* with task=plan", r"transform\.\* .* with task=plan"],
        ),
    ],
)
def test_groups_of_options_that_the_task_does_not_read_are_said(options, messages):
    assert_messages(Advice(make_config(**options)).on_task(), messages)


LORA = AdapterConfig(kind="lora")


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({"lr": 5e-7}, []),
        ({"lr": 2e-5, "adapter": LORA}, []),
        ({"lr": 5e-7, "adapter": LORA}, ["lr=5e-07 is small for adapters.*recipe=dpo_lora"]),
        ({"lr": 5e-7, "adapter": LORA, "optimizer": "SGD"}, []),
        (
            {"lr": 2e-5, "adapter": AdapterConfig(kind="lora", dropout=0.05)},
            [r"adapter\.dropout=0\.05: policy and reference differ by noise"],
        ),
        (
            {
                "lr": 2e-5,
                "adapter": LORA,
                "model": ModelConfig(name_or_path="tiny", reference_dtype="bfloat16"),
            },
            [r"model\.reference_dtype has no effect with adapters"],
        ),
        (
            {
                "lr": 2e-5,
                "adapter": LORA,
                "model": ModelConfig(
                    name_or_path="tiny", policy_dtype="bfloat16", save_dtype="checkpoint"
                ),
            },
            [r"model\.policy_dtype has no effect", r"model\.save_dtype has no effect"],
        ),
        (
            {
                "lr": 2e-5,
                "adapter": LORA,
                "model": ModelConfig(
                    name_or_path="tiny", policy_dtype="bfloat16", fsdp_policy_mp=None
                ),
            },
            [],
        ),
    ],
)
def test_options_that_adapters_are_not_trained_well_with_are_said(options, messages):
    assert_messages(Advice(make_config(**options)).on_adapter(), messages)


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({"adapter": AdapterConfig(r=8)}, [r"adapter\.\* have no effect with adapter=none"]),
        ({"adapter": LORA}, []),
        (
            {"adapter": LORA, "task": "audit"},
            ["adapter=lora has no effect with task=audit"],
        ),
        (
            {"adapter": AdapterConfig(kind="qlora"), "task": "audit"},
            ["adapter=qlora has no effect with task=audit"],
        ),
    ],
)
def test_adapters_that_nothing_trains_are_said(options, messages):
    assert_messages(Advice(make_config(**options)).on_task(), messages)


AUTO = ReferenceConfig(mode="auto", cache_dir="kept")
CACHE = ReferenceConfig(mode="cache")
STORED = ModelConfig(name_or_path="tiny", reference_dtype="bfloat16")


@pytest.mark.parametrize(
    ("options", "messages"),
    [
        ({}, []),
        ({"reference": CACHE}, []),
        ({"model": STORED}, []),
        ({"reference": CACHE, "loss": SimPOConfig()}, [r"reference\.\* .* with loss=simpo"]),
        ({"reference": CACHE, "model": STORED}, [r"model\.reference_dtype has no effect"]),
        ({"reference": AUTO}, ["auto is online here", r"reference\.cache_dir has no effect"]),
        ({"reference": AUTO, "n_epochs": 2}, ["auto is cache here"]),
    ],
)
def test_options_of_a_reference_that_is_not_kept_or_held_are_said(options, messages):
    assert_messages(Advice(make_config(**options)).on_reference(), messages)


def test_rows_that_get_weights_are_neither_divided_nor_mixed():
    data = DataConfig(shares=[1.0], test_fraction=0.1)
    weights = WeightsConfig(positive="a", negative="b", output_dir="c")
    config = make_config(task="estimate_weights", weights=weights, data=data)
    said = r"data\.shares, data\.test_fraction: no effect with task=estimate_weights"
    assert_messages(Advice(config).on_task(), [said])
    assert_messages(Advice(make_config(data=data)).on_task(), [])


def test_a_run_says_what_its_options_come_to(tmp_path, capsys):
    options = [
        "loss=dpo",
        "n_examples=6",
        "batch_size=4",
        "gradient_accumulation_steps=9",
        "lr=0.5",
    ]
    options += ["n_eval_examples=3", "eval_batch_size=2", "do_first_eval=false", "eval_every=6"]
    options += ["sample_during_eval=false", "warmup_steps=2", f"run_dir={tmp_path / 'run'}"]
    options += ["weights.round=2"]
    assert main(options, train.compose_choices, train.CONFIG_DIR) == 0
    lines = capsys.readouterr().err.splitlines()
    said = [
        line
        for line in lines
        if re.search("no effect|but the run|rounded|micro-batches|multiple|stand still", line)
    ]
    assert_messages(
        said,
        [
            r"weights\.\* have no effect",
            r"warmup_steps=2, but the run has 2 optimizer steps: .* 66\.7 % of lr=0\.5",
            "n_examples=6 is rounded up to 8",
            "n_eval_examples=3 is rounded up to 4",
            "gradient_accumulation_steps=9 has no effect with packing.max_tokens=auto",
            "eval_every=6 is no multiple of batch_size=4: evaluating every 4 examples",
        ],
    )
    assert [line.split(":")[0] for line in lines if line.startswith("eval ")] == [
        "eval after 4",
        "eval after 8",
    ]


def assert_messages(found: Any, patterns: list[str]) -> None:
    lines = list(found)
    assert len(lines) == len(patterns), lines
    for line, pattern in zip(lines, patterns, strict=True):
        assert re.search(pattern, line), line
