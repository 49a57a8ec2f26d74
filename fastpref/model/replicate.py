"""Adapters in a frozen model, and the whole of it on every rank."""

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
    """New adapters in a frozen model, or those to go on from, and whether all ranks have all of it;
    None where all of a model is trained.

    Args:
        model: What `load_frozen_base` returned.
        start: Folder of the adapter to go on from; None for new ones.
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


def fits_whole(model: Any, adapters: Adapters, options: AdapterConfig, world: World) -> bool:
    """Whether every rank is to have the whole of a frozen model, see `is_replicated`.

    Args:
        model: In the dtype that it is stored in, on the CPU or the meta device.
        adapters: In it.
        world: Whoever computes; all ranks decide alike.

    Raises:
        ConfigError: the model is to be sharded, and its adapters cannot stand beside that.
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
    """Give every rank the whole of a scorer, whose weights rank 0 alone has."""
    scorer.to(device)
    for tensor in (*scorer.parameters(), *scorer.buffers()):
        dist.broadcast(tensor.detach(), src=0)
