"""Loading a training checkpoint; saving is in `store`."""

import json
import logging
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastpref.checkpoint.agreement import Agreement, describe
from fastpref.checkpoint.manifest import Checkpoint
from fastpref.checkpoint.random_states import set_random_states
from fastpref.checkpoint.restore import restore_state
from fastpref.checkpoint.writer import STATE, random_states_file
from fastpref.errors import CheckpointError, is_shortage

logger = logging.getLogger("fastpref")


def read_record(checkpoint: Checkpoint, agreement: Agreement) -> dict[str, Any]:
    """The caller's record of a checkpoint, readable before any model is built."""
    return _read_state(checkpoint, agreement)["record"]


def load_checkpoint(
    checkpoint: Checkpoint,
    policy: nn.Module,
    optimizer: Optimizer,
    scheduler: LambdaLR,
    *,
    agreement: Agreement,
    device: torch.device,
) -> dict[str, Any]:
    """Load a checkpoint's state; every rank calls this, on any number of ranks.

    The random generators are restored if as many ranks load as saved; otherwise they stay as they
    are, which is logged.

    Args:
        checkpoint: The checkpoint to resume from.
        policy, optimizer, scheduler: As built for this run, with its own learning rate, weight
            decay and the like, which they keep.
        agreement: Connects the ranks.
        device: This rank's device.

    Returns:
        The record that was given to `save`.

    Raises:
        CheckpointError: it is of another model or optimizer, or cannot be read.
    """
    state = _read_state(checkpoint, agreement)
    restore_state(
        checkpoint.folder,
        state,
        policy,
        optimizer,
        scheduler,
        agreement=agreement,
    )
    if checkpoint.manifest.world_size == agreement.size:
        file = checkpoint.folder / random_states_file(agreement.rank)
        set_random_states(json.loads(file.read_text(encoding="utf-8")), device)
    else:
        logger.warning(
            "saved by %d ranks, loaded by %d: random numbers (dropout, sampling) are not those of "
            "an uninterrupted run",
            checkpoint.manifest.world_size,
            agreement.size,
        )
    return state["record"]


def _read_state(checkpoint: Checkpoint, agreement: Agreement) -> dict[str, Any]:
    path = checkpoint.folder / STATE

    def read() -> dict[str, Any]:
        try:
            state = json.loads(path.read_text(encoding="utf-8"))
            return {name: state[name] for name in ("record", "optimizer", "scheduler")}
        except (OSError, ValueError, KeyError, TypeError) as error:
            if is_shortage(error):
                raise
            raise CheckpointError(f"{path} cannot be read: {describe(error)}") from error

    return agreement.on_main(read)
