"""Runs of mixtures of experts whose router is kept balanced: the same however a step is split."""

import dataclasses
import functools
import math
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from safetensors.torch import load_file
from tiny_models import read_metrics, save_dataset, save_tiny_model

from fastpref.config import (
    AdapterConfig,
    Config,
    DPOConfig,
    ModelConfig,
    PackingConfig,
    SFTConfig,
    TDPOConfig,
)
from fastpref.distributed import init_world
from fastpref.errors import ConfigError
from fastpref.train.task import train

EXPERTS: dict[str, Any] = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
MODELS: dict[str, dict[str, Any]] = {
    "mixtral": {
        "model_type": "mixtral",
        "num_local_experts": 4,
        "num_experts_per_tok": 2,
        "router_aux_loss_coef": 0.02,
        "router_jitter_noise": 0.5,
        "sliding_window": None,
    },
    "qwen3_moe": {"model_type": "qwen3_moe", "head_dim": 8, "tie_word_embeddings": True} | EXPERTS,
    "llama": {},
}
COEFFICIENT = 0.5
"""Large enough to be seen in every gradient."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("mixtures")
    save_dataset(base, "words")
    for name, config in MODELS.items():
        save_tiny_model(base / name, **config)
    return base


def make_config(
    base: Path,
    run_dir: Path,
    model: str = "mixtral",
    *,
    router_aux_loss: Any = COEFFICIENT,
    **options: Any,
) -> Config:
    values: dict[str, Any] = {
        "model": ModelConfig(
            name_or_path=str(base / model),
            fsdp_policy_mp=None,
            router_aux_loss=str(router_aux_loss),
        ),
        "loss": DPOConfig(),
        "datasets": ["words"],
        "base_data_dir": str(base),
        "run_dir": str(run_dir),
        "batch_size": 8,
        "n_epochs": 1,
        # the update is the gradient, so that no difference is divided away
        "optimizer": "SGD",
        "lr": 0.1,
        "warmup_steps": 0,
        "max_grad_norm": 1e9,
        "max_length": 64,
        "max_prompt_length": 32,
        "n_eval_examples": 8,
        "sample_during_eval": False,
        "minimum_log_interval_secs": 0.0,
    }
    return Config(**(values | options))


def run(config: Config) -> Path:
    """Train in this process (or on this rank); returns the run folder."""
    world = init_world()
    try:
        train(config, world)
    finally:
        dist.destroy_process_group()
    return Path(config.run_dir)


def run_each(configs: list[Config]) -> None:
    """On each rank: one run after the other, in the same world."""
    world = init_world()
    for config in configs:
        train(config, world)
    dist.destroy_process_group()


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    (path,) = (run_dir / "LATEST").glob("*.safetensors")
    return load_file(path)


def assert_same_run(ours: Path, expected: Path, tolerance: float = 1e-6) -> None:
    for a, b in zip(read_metrics(ours, "train"), read_metrics(expected, "train"), strict=True):
        assert a.keys() == b.keys()
        for key in ("loss/train", "router_aux_loss/train", "router_max_load/train", "grad_norm"):
            assert a[key] == pytest.approx(b[key], rel=10 * tolerance), key
    theirs = weights_of(expected)
    for name, weight in weights_of(ours).items():
        error = (weight - theirs[name]).norm() / theirs[name].norm()
        assert error <= tolerance, f"{name}: {error:.2e}"


SPLITS: dict[str, dict[str, Any]] = {
    "padded": {"packing": PackingConfig(enabled=False)},
    "micro-batches": {
        "packing": PackingConfig(max_tokens="8192"),
        "gradient_accumulation_steps": 3,
    },
    "small budget": {"packing": PackingConfig(max_tokens="64")},
    "unshared": {"packing": PackingConfig(share_prompt="false")},
    "recomputed": {"activation_checkpointing": True},
}


@pytest.mark.parametrize(
    ("model", "splits"), [("mixtral", list(SPLITS)), ("qwen3_moe", ["small budget", "recomputed"])]
)
def test_however_a_step_is_split_the_run_is_the_same(base, tmp_path, model, splits):
    whole = run(make_config(base, tmp_path / "whole", model))
    first = read_metrics(whole, "train")[0]
    assert first["loss/train"] == pytest.approx(math.log(2), abs=1e-7)
    for name in splits:
        ours = run(make_config(base, tmp_path / name, model, **SPLITS[name]))
        assert_same_run(ours, whole)


def test_the_router_gets_more_even_and_held_out_lines_know_nothing_of_it(base, tmp_path):
    run_dirs = {
        wish: run(make_config(base, tmp_path / wish, router_aux_loss=wish, lr=0.5, n_epochs=6))
        for wish in ("3", "1e-6")
    }
    last = {wish: read_metrics(path, "train")[-1] for wish, path in run_dirs.items()}
    assert last["3"]["router_aux_loss/train"] < last["1e-6"]["router_aux_loss/train"]
    assert last["3"]["router_max_load/train"] < last["1e-6"]["router_max_load/train"]
    assert not any("router" in key for line in read_metrics(run_dirs["3"], "eval") for key in line)


def test_auto_is_the_checkpoints_coefficient_and_zero_is_without(base, tmp_path):
    auto, given, none = (
        run(make_config(base, tmp_path / str(wish), router_aux_loss=wish))
        for wish in ("auto", 0.02, 0)
    )
    weights = [weights_of(path) for path in (auto, given, none)]
    assert all(torch.equal(weights[1][name], weight) for name, weight in weights[0].items())
    assert not all(torch.equal(weights[2][name], weight) for name, weight in weights[0].items())
    assert not any("router" in key for line in read_metrics(none, "train") for key in line)


def test_zero_is_the_run_of_a_model_that_nobody_asks_for_its_router(base, tmp_path, monkeypatch):
    none = run(make_config(base, tmp_path / "none", router_aux_loss=0))
    monkeypatch.setattr("fastpref.model.checks.find_router", lambda *_: None)
    unknown = run(make_config(base, tmp_path / "unknown", router_aux_loss="auto"))
    theirs = weights_of(unknown)
    assert all(torch.equal(theirs[name], weight) for name, weight in weights_of(none).items())


@pytest.mark.parametrize("loss", [SFTConfig(), TDPOConfig(), TDPOConfig(if_tdpo2=False)])
def test_every_way_to_a_loss_has_it(base, tmp_path, loss):
    run_dir = run(make_config(base, tmp_path / "run", loss=loss))
    values = [line["router_aux_loss/train"] for line in read_metrics(run_dir, "train")]
    # an even spread gives the experts of a token
    assert len(values) == 3 and all(1.9 < value < 4 for value in values)


LORA = AdapterConfig(kind="lora")


def test_two_ranks_give_the_single_process_run(base, tmp_path):
    cases: dict[str, dict[str, Any]] = {
        "whole": {},
        "uneven": {"batch_size": 5, "gradient_accumulation_steps": 3, "loss": TDPOConfig()},
        "recomputed": {"activation_checkpointing": True, "model": "qwen3_moe"},
        "adapters": {"adapter": dataclasses.replace(LORA, target_modules=["q_proj", "v_proj"])},
    }
    configs = {}
    for name, options in cases.items():
        config = make_config(base, tmp_path / name, **options)
        config.packing.max_tokens = "8192"
        if config.adapter.trained:
            config.adapter.base = "sharded"
        run(config)
        configs[name] = dataclasses.replace(config, run_dir=str(tmp_path / f"{name} x2"))
    run_on_ranks(run_each, 2, list(configs.values()))
    for name in cases:
        assert_same_run(tmp_path / f"{name} x2", tmp_path / name, tolerance=1e-5)


def test_adapters_beside_a_frozen_router_are_moved_by_it(base, tmp_path):
    runs = {
        wish: run(make_config(base, tmp_path / wish, router_aux_loss=wish, adapter=LORA))
        for wish in ("0", "0.5")
    }
    first = read_metrics(runs["0.5"], "train")[0]
    assert first["loss/train"] == pytest.approx(math.log(2), abs=1e-7)
    without = weights_of(runs["0"])
    moved = weights_of(runs["0.5"])
    assert any(not torch.equal(moved[name], weight) for name, weight in without.items())


def test_compiled_blocks_give_the_same_step(base, tmp_path, monkeypatch):
    # what a block leaves of its router is the tracer's affair, not the compiler's behind it
    monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend="aot_eager"))
    run_dirs = []
    for compiled in (False, True):
        torch._dynamo.reset()
        config = make_config(
            base,
            tmp_path / str(compiled),
            loss=SFTConfig(),
            n_examples=8,
            n_epochs=None,
            compile=compiled,
            activation_checkpointing=True,
        )
        run_dirs.append(run(config))
    assert_same_run(run_dirs[1], run_dirs[0], tolerance=1e-5)


def test_a_dense_model_refuses_a_coefficient_and_takes_the_default(base, tmp_path):
    with pytest.raises(ConfigError, match=r"model\.router_aux_loss=0\.5.*no router of experts"):
        run(make_config(base, tmp_path / "refused", "llama"))
    assert not (tmp_path / "refused").exists()
    run_dir = run(make_config(base, tmp_path / "auto", "llama", router_aux_loss="auto"))
    assert not any("router" in key for line in read_metrics(run_dir, "train") for key in line)


@pytest.mark.parametrize("value", ["-1", "nan", "inf", "some"])
def test_a_wrong_coefficient_is_refused(value):
    with pytest.raises(ValueError, match=r"model\.router_aux_loss must be"):
        ModelConfig(name_or_path="tiny", router_aux_loss=value)
