"""Adapters in a frozen model, and whether every rank holds a full replica of it."""

from typing import Any

import torch
import torch.distributed as dist

from fastpref.config import AdapterConfig, TrainingOptions
from fastpref.distributed import World
from fastpref.host import available_to_rank
from fastpref.model.adapters.lora import Adapters, add_adapters
from fastpref.model.scorer import TokenScorer


def place_adapters(
    model: Any, options: TrainingOptions, world: World, start: str | None
) -> tuple[Adapters | None, bool]:
    """Insert adapters into a frozen model, and decide whether every rank holds a full replica.

    Args:
        model: What `load_frozen_base` returned.
        start: Folder of the adapter to train on; None for new ones.

    Returns:
        The adapters, None if the whole model is trained; and whether it is replicated.
    """
    if not options.adapter.trained:
        return None, False
    adapters = add_adapters(
        model,
        options.adapter,
        world,
        block_name=options.model.block_name,
        seed=options.seed,
        start=start,
    )
    return adapters, fits_whole(model, adapters, options.adapter, world)


def is_replicated(options: AdapterConfig, *, num_bytes: int, room: int) -> bool:
    """Whether each of several devices holds a full replica of a frozen model.

    Args:
        options: `base` is replicated, sharded or auto: replicated if the model takes at most half
            of a device's memory. Models in 4 bits are always replicated.
        num_bytes: Size of the model with its adapters.
        room: Memory of a device, in bytes.
    """
    if options.quantized:
        return True
    if options.base != "auto":
        return options.base == "replicated"
    return 2 * num_bytes <= room


def fits_whole(model: Any, adapters: Adapters, options: AdapterConfig, world: World) -> bool:
    """Whether every rank holds a full replica of a frozen model, see `is_replicated`.

    Args:
        model: In its storage dtype, on the CPU or the meta device.
        adapters: The adapters in it.
        world: The ranks, which all come to the same decision.

    Raises:
        ConfigError: the model is to be sharded, which its adapters do not support.
    """
    num_bytes = sum(parameter.nbytes for parameter in model.parameters())
    if world.device.type == "cuda":
        room = torch.cuda.get_device_properties(world.device).total_memory
    else:
        room = available_to_rank()
    replicated = is_replicated(options, num_bytes=num_bytes, room=room)
    replicated = world.agree_max(int(not replicated)) == 0
    if world.size > 1 and not replicated:
        adapters.check_shardable()
    return replicated


def replicate(scorer: TokenScorer, device: torch.device) -> None:
    """Move a scorer to its device, and broadcast parameters and buffers from rank 0."""
    scorer.to(device)
    for tensor in (*scorer.parameters(), *scorer.buffers()):
        dist.broadcast(tensor.detach(), src=0)
