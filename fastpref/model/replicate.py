"""The whole of a frozen model on every rank."""

from typing import Any

import torch
import torch.distributed as dist

from fastpref.checkpoint.size import available_to_rank
from fastpref.config import AdapterConfig
from fastpref.distributed import World
from fastpref.model.scorer import TokenScorer


def is_replicated(options: AdapterConfig, *, num_bytes: int, room: int) -> bool:
    """Whether every one of several devices is to have the whole of a frozen model.

    Args:
        options: `base` is replicated, sharded or auto, half of a device's memory at most; layers
            in 4 bits are always whole.
        num_bytes: Of the model with its adapters.
        room: Memory of a device, bytes.
    """
    if options.quantized:
        return True
    if options.base != "auto":
        return options.base == "replicated"
    return 2 * num_bytes <= room


def fits_whole(model: Any, options: AdapterConfig, world: World) -> bool:
    """Whether every rank is to have the whole of a frozen model, see `is_replicated`.

    Args:
        model: On the CPU, with adapters.
        options: Of the adapters.
        world: Whoever computes; all ranks decide alike.
    """
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    if world.device.type == "cuda":
        room = torch.cuda.get_device_properties(world.device).total_memory
    else:
        room = available_to_rank()
    replicated = is_replicated(options, num_bytes=num_bytes, room=room)
    return world.agree_max(int(not replicated)) == 0


def replicate(scorer: TokenScorer, device: torch.device) -> None:
    """Give every rank the whole of a scorer, whose weights rank 0 alone has."""
    scorer.to(device)
    for tensor in (*scorer.parameters(), *scorer.buffers()):
        dist.broadcast(tensor.detach(), src=0)
