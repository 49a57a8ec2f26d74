"""Pickled weights, among them the seed repositories' `policy.pt`, a dict with 'state'."""

import logging
import zipfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref.errors import CheckpointError, is_out_of_memory
from fastpref.model.files.reading import reason

logger = logging.getLogger("fastpref")

WRAPPERS = ("_fsdp_wrapped_module.", "_checkpoint_wrapped_module.", "_orig_mod.")
"""Parts that FSDP, activation checkpointing and torch.compile insert into names of weights."""


def load_pickle(path: Path) -> Any:
    """Load what `torch.save` wrote, tensors and plain values only, memory-mapped if possible.

    Raises:
        ValueError: the file was cut; torch raises other errors for other files.
    """
    # the format from before torch 1.6 is not a zip file and cannot be memory-mapped
    mmap = zipfile.is_zipfile(path)
    if not mmap and begins_as_zip(path):
        raise ValueError(f"{path.name} was cut: its end is missing")
    return torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)


def begins_as_zip(path: Path) -> bool:
    """Whether a file begins as a zip archive, torch's format since 1.6; it may have been cut."""
    with path.open("rb") as file:
        return file.read(4) == b"PK\x03\x04"


def read_policy(path: Path) -> dict[str, Tensor]:
    """Weights of a seed-format `policy.pt`, by the names of a checkpoint on the hub.

    Raises:
        CheckpointError: it cannot be read, or has another format.
    """
    try:
        saved = load_pickle(path)
    # zip, pickle and operating system each raise errors of their own
    except Exception as error:
        if is_out_of_memory(error):
            raise
        raise CheckpointError(f"model.archive: {path} cannot be read: {reason(error)}") from error
    state = saved.get("state") if isinstance(saved, dict) else None
    if not isinstance(state, dict) or not all(isinstance(x, Tensor) for x in state.values()):
        raise CheckpointError(
            f"model.archive: {path} is no policy archive; expected a dict with 'state', a dict of "
            "weights"
        )
    _say_step(path, saved.get("step_idx"))
    return _unwrapped(state)


@cache
def _say_step(path: Path, step: Any) -> None:
    """Log once which training step an archive is from."""
    logger.info("model.archive: step %s of %s", step, path)


def _unwrapped(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    for wrapper in WRAPPERS:
        state = {name.replace(wrapper, ""): tensor for name, tensor in state.items()}
    # DistributedDataParallel wraps the whole model
    if state and all(name.startswith("module.") for name in state):
        return {name.removeprefix("module."): tensor for name, tensor in state.items()}
    return dict(state)
