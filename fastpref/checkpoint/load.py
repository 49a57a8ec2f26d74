"""Going on from a training checkpoint.

Saving is `store`.
"""

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
from fastpref.errors import CheckpointError

logger = logging.getLogger("fastpref")


def read_record(checkpoint: Checkpoint, agreement: Agreement) -> dict[str, Any]:
    """The caller's record of a checkpoint, before there is anything to load it into."""
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
    """Put a checkpoint's state in place; every rank calls this, however many wrote it.

    The generators go on where they were if as many ranks load as saved; otherwise they are left
    as they are, which is logged.

    Args:
        checkpoint: To go on from.
        policy, optimizer, scheduler: As built for the run, with the learning rate, weight decay
            and the like to go on with.
        agreement: Of the ranks.
        device: Where this rank computes.

    Returns:
        The record that was given to `save`.

    Raises:
        CheckpointError: it is not of this model, this optimizer, or cannot be read.
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
            raise CheckpointError(f"{path} cannot be read: {describe(error)}") from error

    return agreement.on_main(read)
