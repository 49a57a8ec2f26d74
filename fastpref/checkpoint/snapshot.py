"""The training state at one step, copied to memory that training does not modify."""

import hashlib
import json
import mmap
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastpref.checkpoint.agreement import AgreedError, Agreement
from fastpref.checkpoint.random_states import read_random_states
from fastpref.checkpoint.state import TrainingState, collect_state, local_part
from fastpref.errors import CheckpointError, WritingMemoryError

MAPPED_BYTES = 2**20
"""Copies of at least this size are mapped with mmap. malloc would place them in memory that a step
on a CPU reuses for its activations, which would then need fresh pages in every step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """Everything that one rank saves."""

    step: int
    """Optimizer steps completed."""
    metrics: dict[str, float]
    """Held-out metrics of these weights."""
    record: dict[str, Any]
    """The caller's record, JSON."""
    state: TrainingState
    """Names, shapes and layouts; training may change the tensors' values meanwhile."""
    local_parts: dict[str, Tensor]
    """This rank's shards or host copies of them, by tensor name: the bytes that are written."""
    random_states: dict[str, Any]
    """States of this rank's random generators, JSON."""

    def num_bytes(self) -> int:
        """Size of this rank's shards."""
        return sum(part.nbytes for part in self.local_parts.values())


class HostCopies:
    """Buffers in host memory, pinned for a GPU, which all snapshots reuse."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def fill(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copy this rank's shards to the buffers; the copies are complete on return."""
        for name, part in parts.items():
            buffer = self.buffers.get(name)
            if buffer is None or buffer.shape != part.shape or buffer.dtype != part.dtype:
                buffer = self.buffers[name] = _host_buffer(part)
            buffer.copy_(part, non_blocking=True)
        if any(part.is_cuda for part in parts.values()):
            torch.cuda.current_stream().synchronize()
        return {name: self.buffers[name] for name in parts}


def _host_buffer(part: Tensor) -> Tensor:
    """A buffer in host memory for a copy of one shard."""
    if part.is_cuda or part.nbytes < MAPPED_BYTES:
        return torch.empty(part.shape, dtype=part.dtype, pin_memory=part.is_cuda)
    return torch.frombuffer(mmap.mmap(-1, part.nbytes), dtype=part.dtype).view(part.shape)


def take_snapshot(
    step: int,
    policy: nn.Module,
    optimizer: Optimizer,
    scheduler: LambdaLR,
    *,
    record: dict[str, Any],
    metrics: dict[str, float],
    copies: HostCopies | None,
    agreement: Agreement,
    device: torch.device,
) -> Snapshot:
    """Take a snapshot on every rank, or on none.

    Args:
        step: Optimizer steps completed.
        policy, optimizer, scheduler: The state to save.
        record: The caller's record; JSON.
        metrics: Held-out metrics of these weights.
        copies: Buffers to copy the tensors to; None: no copy, the tensors themselves.
        agreement: Connects the ranks.
        device: This rank's device.

    Raises:
        CheckpointError: on every rank: one of them has no memory for the copies, or an
            optimizer's state cannot be saved.
    """
    # encoded now: a value that is not JSON raises here, and later changes have no effect
    record = json.loads(json.dumps(record))
    random_states = read_random_states(device)
    taken: list[tuple[TrainingState, dict[str, Tensor]]] = []

    def take() -> str:
        state = collect_state(policy, optimizer, scheduler)
        parts = {name: local_part(tensor) for name, tensor in state.tensors.items()}
        taken.append((state, copies.fill(parts) if copies else parts))
        return _digest(state)

    try:
        digests = agreement.each(take)
    except AgreedError as error:
        kind = WritingMemoryError if error.is_shortage else CheckpointError
        raise kind(f"step {step} was not saved: {error}") from error
    if len(set(digests)) > 1:
        raise CheckpointError(
            f"step {step} was not saved: the ranks' optimizers differ in what they keep"
        )
    state, parts = taken[0]
    return Snapshot(
        step=step,
        metrics=metrics,
        record=record,
        state=state,
        local_parts=parts,
        random_states=random_states,
    )


def _digest(state: TrainingState) -> str:
    """A digest of names, shapes and layouts, equal on ranks whose shards fit together."""
    shapes = {name: list(tensor.shape) for name, tensor in state.tensors.items()}
    return hashlib.sha256(json.dumps([state.description, shapes]).encode()).hexdigest()
