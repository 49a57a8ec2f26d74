"""The size of a training checkpoint, estimated before the first one, and the free disk space."""

import shutil
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from fastpref.checkpoint.probe import PROBE_SIZE, probe_state
from fastpref.checkpoint.state import policy_weights, trained_parameters

BYTES_PER_TENSOR = 2048
"""Overhead of each rank's shard of a tensor: its header in the file and its metadata entries."""
BYTES_PER_RANK = 32768
"""Size of a rank's random states as JSON."""


def estimate_bytes(policy: nn.Module, optimizer: Optimizer, world_size: int) -> int:
    """Size of one checkpoint on disk in bytes, the files of all ranks together.

    Args:
        policy: The trained model; sharded or not.
        optimizer: Its optimizer, which need not have stepped yet.
        world_size: Number of ranks that write.
    """
    weights = policy_weights(policy)
    num_bytes = sum(weight.numel() * weight.itemsize for weight in weights.values())
    num_tensors = len(weights)
    share, num_entries = probe_share(optimizer)
    for parameter in trained_parameters(policy, optimizer).values():
        if parameter.requires_grad:
            num_bytes += int(share * parameter.numel() * parameter.itemsize)
            num_tensors += num_entries
    return num_bytes + world_size * (num_tensors * BYTES_PER_TENSOR + BYTES_PER_RANK)


def probe_share(optimizer: Optimizer) -> tuple[float, int]:
    """Size of an optimizer's state for a matrix.

    Returns:
        Bytes of state per byte of parameters, and the number of state tensors per parameter.
    """
    state = probe_state(optimizer, torch.device("cpu"))
    num_bytes = PROBE_SIZE * PROBE_SIZE * torch.get_default_dtype().itemsize
    return sum(value.nbytes for value in state.values()) / num_bytes, len(state)


def free_bytes(folder: Path) -> int:
    """Free bytes on the file system of a folder, or of its nearest existing ancestor."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
