"""How large a training checkpoint will be, before the first one, and how much room there is."""

import shutil
from pathlib import Path

import torch
from torch import nn
from torch.optim import Optimizer

from fastpref.checkpoint.probe import PROBE_SIZE, probe_state
from fastpref.checkpoint.state import policy_weights, trained_parameters

BYTES_PER_TENSOR = 2048
"""Of a file, around a rank's part of a tensor, and of the tables that say where it is."""
BYTES_PER_RANK = 32768
"""Of a rank's random states, as JSON."""


def estimate_bytes(policy: nn.Module, optimizer: Optimizer, world_size: int) -> int:
    """Bytes of one checkpoint on the disk, of all ranks' files together.

    Args:
        policy: What is trained; sharded or not.
        optimizer: What trains it, whether or not it has stepped.
        world_size: How many ranks write.
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
    """What an optimizer keeps of a matrix.

    Returns:
        Bytes of state per byte of parameters, and the number of tensors.
    """
    state = probe_state(optimizer, torch.device("cpu"))
    num_bytes = PROBE_SIZE * PROBE_SIZE * torch.get_default_dtype().itemsize
    return sum(value.nbytes for value in state.values()) / num_bytes, len(state)


def free_bytes(folder: Path) -> int:
    """Room on the file system of a folder, or of the nearest one above it that is there."""
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    return shutil.disk_usage(existing).free
