"""A small policy with everything a checkpoint has to handle, and a way to train it step by step."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, fully_shard

from fastpref.checkpoint.agreement import Agreement
from fastpref.checkpoint.folders import CHECKPOINTS, find_named, find_newest
from fastpref.checkpoint.manifest import Checkpoint
from fastpref.checkpoint.state import collect_state
from fastpref.checkpoint.store import SaveReport
from fastpref.distributed import World
from fastpref.errors import CheckpointError
from fastpref.train.optim import build_optimizer, build_scheduler

NUM_ROWS = 6
"""Of every step, over all ranks."""


def raise_if_failed(report: SaveReport) -> None:
    if report.error is not None:
        raise CheckpointError(report.error)


def find_checkpoint(resume: str, run_dir: Path, agreement: Agreement) -> Checkpoint | None:
    """The newest one of a run for "auto", else the one that a path means, found by rank 0."""
    if resume == "auto":
        return agreement.on_main(lambda: find_newest(run_dir / CHECKPOINTS))
    return agreement.on_main(lambda: find_named(Path(resume)))


class SmallPolicy(nn.Module):
    """Tied head, frozen layer, persistent buffer, dropout; shards that are uneven or empty."""

    def __init__(self, width: int = 5, dropout: float = 0.0) -> None:
        super().__init__()
        self.embedding = nn.Embedding(7, width)
        self.blocks = nn.ModuleList(nn.Linear(width, width) for _ in range(2))
        self.frozen = nn.Linear(width, width).requires_grad_(False)
        # on three ranks the last one has no row of it
        self.scales = nn.Parameter(torch.ones(2, width))
        self.dropout = nn.Dropout(dropout)
        self.head = nn.Linear(width, 7, bias=False)
        self.head.weight = self.embedding.weight
        self.register_buffer("num_forwards", torch.zeros((), dtype=torch.int64))

    def forward(self, ids: Tensor) -> Tensor:
        self.num_forwards += 1
        hidden = self.embedding(ids) * self.scales[0] + self.scales[1]
        for block in self.blocks:
            hidden = self.dropout(block(hidden).tanh())
        return self.head(self.frozen(hidden))


class SmallTraining:
    """A policy sharded over the world, what trains it, and its rows: a function of the step."""

    def __init__(
        self, world: World, optimizer: str = "AdamW", *, lr: float = 0.01, **model: Any
    ) -> None:
        torch.manual_seed(0)
        self.world = world
        self.policy = SmallPolicy(**model)
        for block in self.policy.blocks:
            fully_shard(block, mesh=world.mesh)
        fully_shard(self.policy, mesh=world.mesh, reshard_after_forward=False)
        for module in self.policy.modules():
            if isinstance(module, FSDPModule):
                module.set_gradient_divide_factor(1.0)
                module.set_force_sum_reduction_for_comms(world.device.type == "cpu")
        self.optimizer = build_optimizer(optimizer, self.policy.parameters(), lr=lr, options={})
        self.scheduler = build_scheduler(
            self.optimizer, schedule="cosine", warmup_steps=2, num_steps=12, min_lr_ratio=0.1
        )

    @property
    def parts(self) -> tuple[Any, Any, Any]:
        """What is saved and loaded."""
        return self.policy, self.optimizer, self.scheduler

    def train(self, start: int, end: int) -> None:
        """Optimizer steps `start` to `end`, the latter not included."""
        for step in range(start, end):
            generator = torch.Generator().manual_seed(step)
            ids = torch.randint(7, (NUM_ROWS,), generator=generator)
            own_ids = ids[self.world.rank :: self.world.size].to(self.world.device)
            logits = self.policy(own_ids)
            self.optimizer.zero_grad()
            (logits.square().sum() / NUM_ROWS).backward()
            self.optimizer.step()
            self.scheduler.step()

    def whole_state(self) -> dict[str, Any]:
        """Every tensor of weights and optimizer, gathered and copied, and all that is no tensor."""
        state = collect_state(*self.parts)
        whole = {
            name: (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).clone()
            for name, tensor in state.tensors.items()
        }
        return whole | state.description


def assert_same_state(ours: dict[str, Any], expected: dict[str, Any], tolerance: float = 0) -> None:
    """Bitwise, or with a tolerance to that absolute difference."""
    assert ours.keys() == expected.keys()
    for name, value in expected.items():
        if not isinstance(value, Tensor):
            assert ours[name] == value, name
        elif tolerance:
            torch.testing.assert_close(ours[name], value, rtol=0, atol=tolerance, msg=name)
        else:
            assert torch.equal(ours[name], value), name
