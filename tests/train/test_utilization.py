"""The share of a device's operations that a step needs."""

import json

import pytest
import torch
import torch.distributed as dist
from ranks import ALONE
from tiny_models import save_tiny_model

from fastpref.config import AdapterConfig, Config, DPOConfig, ModelConfig, PackingConfig, SFTConfig
from fastpref.distributed import init_world
from fastpref.model.pair import build_pair
from fastpref.train.logs.metrics import MetricsLog, PendingStep
from fastpref.train.logs.utilization import UsefulWork, count_work, peak_of, useful_work

# of the tiny model, a block: q and o, k and v, the three of the MLP
BLOCKS = 2 * (2 * 32 * 32 + 2 * 32 * 16 + 3 * 32 * 64)
TRAINED = {
    # passes over a weight: forward, gradients of input and weight, the reference's forward
    "dpo": (DPOConfig(beta=0.1), AdapterConfig(), 4),
    "sft": (SFTConfig(), AdapterConfig(), 3),
    "adapters": (DPOConfig(beta=0.1), AdapterConfig(kind="lora"), 3),
}


@pytest.fixture
def world():
    yield init_world()
    dist.destroy_process_group()


@pytest.mark.parametrize("case", list(TRAINED))
def test_products_with_weights_are_counted(tmp_path, world, case):
    loss, adapter, passes = TRAINED[case]
    save_tiny_model(tmp_path / "model")
    model = ModelConfig(name_or_path=str(tmp_path / "model"), fsdp_policy_mp=None)
    config = Config(model=model, loss=loss, adapter=adapter)
    pair = build_pair(config.training, PackingConfig(), world, longest=64)
    work = count_work(pair, None, peak=1e6)
    vocab_size = json.loads((tmp_path / "model" / "config.json").read_text())["vocab_size"]
    assert work.per_token == 2 * passes * BLOCKS
    assert work.per_scored == 2 * passes * vocab_size * 32
    assert work.share(3, 2) == (3 * work.per_token + 2 * work.per_scored) / 1e6
    # of a CPU nobody knows what it could do
    assert useful_work(pair, model, world) is None


def test_of_a_mixture_of_experts_no_share_is_said(tmp_path, world):
    sizes = {"moe_intermediate_size": 16, "num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8}
    save_tiny_model(tmp_path / "model", model_type="qwen3_moe", **sizes)
    model = ModelConfig(name_or_path=str(tmp_path / "model"), fsdp_policy_mp=None)
    config = Config(model=model, loss=DPOConfig(beta=0.1))
    pair = build_pair(config.training, PackingConfig(), world, longest=64)
    assert count_work(pair, None, peak=1e6) is None


def test_devices_are_known_by_their_names():
    assert peak_of("NVIDIA H100 80GB HBM3") == 989e12
    assert peak_of("NVIDIA H100 PCIe") == 756e12
    assert peak_of("NVIDIA A100-SXM4-40GB") == 312e12
    assert peak_of("NVIDIA L4") == 121e12 and peak_of("NVIDIA L40") == 181e12
    assert peak_of("NVIDIA GeForce GTX 1080") is None
    # a laptop's GPU of a few TFLOP/s
    assert peak_of("NVIDIA RTX A1000 Laptop GPU") is None


@pytest.mark.parametrize(
    ("computed", "padding", "useful"),
    [(100, 0.0, 100), (160, 0.375, 100), (60, 0.0, 60)],
)
def test_shared_tokens_count_once_and_padding_not_at_all(
    tmp_path, monkeypatch, computed, padding, useful
):
    log = MetricsLog(
        path=tmp_path / "metrics.jsonl",
        min_interval_seconds=0,
        world=ALONE,
        work=UsefulWork(per_token=5, per_scored=7, peak=1e4),
    )
    monkeypatch.setattr(
        "fastpref.train.logs.metrics.time.perf_counter", lambda: log._last_flush + 0.5
    )
    log.add_step(
        PendingStep(
            step=1,
            examples=8,
            num_examples=8,
            num_tokens=100,
            num_computed=computed,
            num_scored=30,
            lr=1e-6,
            names=["loss/train"],
            values=torch.zeros(1),
        )
    )
    record = log.flush()
    assert record["padding_share"] == pytest.approx(padding)
    assert record["mfu"] == pytest.approx((5 * useful + 7 * 30) / 0.5 / 1e4)
