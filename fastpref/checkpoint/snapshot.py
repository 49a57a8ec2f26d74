"""The state of training at one instant, in memory that training leaves alone meanwhile."""

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
from fastpref.errors import CheckpointError

MAPPED_BYTES = 2**20
"""Copies of this size and more are mapped by themselves. malloc would put them where each step on a
CPU finds room for its activations, which then come as new pages, step after step."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Snapshot:
    """All that one rank saves."""

    step: int
    """Optimizer steps done."""
    metrics: dict[str, float]
    """Held-out metrics of these weights."""
    record: dict[str, Any]
    """The caller's, JSON."""
    state: TrainingState
    """What is saved; if the tensors change meanwhile, their shapes do not."""
    local_parts: dict[str, Tensor]
    """This rank's parts of the tensors: where the bytes are taken from."""
    random_states: dict[str, Any]
    """Of this rank's generators, JSON."""

    def num_bytes(self) -> int:
        """Of this rank's parts."""
        return sum(part.nbytes for part in self.local_parts.values())


class HostCopies:
    """Buffers in the host's memory that every snapshot fills anew; pinned ones for a GPU."""

    def __init__(self) -> None:
        self.buffers: dict[str, Tensor] = {}

    def fill(self, parts: dict[str, Tensor]) -> dict[str, Tensor]:
        """Copies of this rank's parts, complete when this returns."""
        for name, part in parts.items():
            buffer = self.buffers.get(name)
            if buffer is None or buffer.shape != part.shape or buffer.dtype != part.dtype:
                buffer = self.buffers[name] = _host_buffer(part)
            buffer.copy_(part, non_blocking=True)
        if any(part.is_cuda for part in parts.values()):
            torch.cuda.current_stream().synchronize()
        return {name: self.buffers[name] for name in parts}


def _host_buffer(part: Tensor) -> Tensor:
    """Memory of the host for a copy of one part."""
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
    """What every rank has to save; all of them, or none.

    Args:
        step: Optimizer steps done.
        policy, optimizer, scheduler: The state.
        record: The caller's; JSON.
        metrics: Held-out metrics of these weights.
        copies: Where to copy the tensors to; None takes them where they are.
        agreement: Of the ranks.
        device: Where this rank computes.

    Raises:
        CheckpointError: on every rank: one of them has no memory for the copies, or an
            optimizer's state cannot be saved.
    """
    # now, so that what is not JSON is raised here and later changes do not count
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
        raise CheckpointError(f"step {step} was not saved: {error}") from error
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
    """The same on ranks whose parts fit together."""
    shapes = {name: list(tensor.shape) for name, tensor in state.tensors.items()}
    return hashlib.sha256(json.dumps([state.description, shapes]).encode()).hexdigest()
