"""What the plan says is sent in a step is what the collectives of one send."""

from pathlib import Path
from typing import Any

import pytest
import torch
from ranks import run_on_ranks
from tiny_models import save_tiny_model
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from fastpref.config import AdapterConfig, Config, DPOConfig, ModelConfig, SFTConfig
from fastpref.distributed import World, init_world
from fastpref.memory.plan import GIB, Device, communicated_bytes
from fastpref.memory.planning import Measured, count_training
from fastpref.memory.worst_rows import Rows
from fastpref.model.pair import build_pair
from fastpref.objectives.objective import build_objective
from fastpref.objectives.step_loss import StepLoss

LONGEST, NUM_RANKS, NUM_MICRO_BATCHES = 32, 2, 3
LOSSES = {"dpo": DPOConfig(beta=0.1), "sft": SFTConfig()}
CASES = [
    ("dpo", "none", "auto"),
    ("sft", "none", "auto"),
    ("dpo", "lora", "replicated"),
    ("dpo", "lora", "sharded"),
    ("sft", "lora", "sharded"),
]


class SentBytes(TorchDispatchMode):
    """Counts what a rank sends in collectives on tensors, as rings of ranks send it."""

    def __init__(self) -> None:
        super().__init__()
        self.sent = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        name = func.name()
        if name.startswith("c10d::"):
            largest = max(x.nbytes for x in tree_leaves(args) if isinstance(x, torch.Tensor))
            self.sent += largest * (2 if "allreduce" in name else 1) * (NUM_RANKS - 1) // NUM_RANKS
        return func(*args, **(kwargs or {}))


def compare_all(folder: Path) -> None:
    world = init_world()
    for case in CASES:
        compare(world, folder, *case)


def compare(world: World, folder: Path, loss: str, kind: str, base: str) -> None:
    config = Config(
        model=ModelConfig(name_or_path=str(folder), fsdp_policy_mp=None),
        datasets=["words"],
        loss=LOSSES[loss],
        adapter=AdapterConfig(kind=kind, base=base),
        batch_size=8,
    )
    pair = build_pair(config.training, config.packing, world, longest=LONGEST)
    needs = config.loss.needs
    rows_like = Rows(pair.layout, LONGEST, pairs=needs.pairs, gathers_keys=False)
    rows = rows_like.worst(pair.policy, 2 * LONGEST, weighted=False)
    batch = pair.layout.build_rows(rows, pad_token_id=0)
    step_loss = StepLoss(build_objective(config.loss), pair.policy, pair.reference)
    with SentBytes() as counted:
        for _ in range(NUM_MICRO_BATCHES):
            losses, _ = step_loss.compute(batch, 0)
            losses.sum().backward()
            step_loss.done()
        pair.policy.sum_gradients()
    device = Device("cpu", NUM_RANKS, GIB, replicated=pair.replicated)
    measured = Measured(body=None, rows=rows_like, state_bytes=8)
    model = count_training(config.training, measured, device)
    planned = communicated_bytes(
        model.weights, model.sizes, device, num_micro_batches=NUM_MICRO_BATCHES
    )
    assert planned == pytest.approx(counted.sent, rel=0.02), (loss, kind, base)


def test_a_step_sends_what_the_plan_says(tmp_path):
    save_tiny_model(tmp_path / "model", num_hidden_layers=6)
    run_on_ranks(compare_all, NUM_RANKS, tmp_path / "model")
