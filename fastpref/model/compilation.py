"""Whether a run's blocks are compiled, and how."""

import logging
from typing import Any

import torch
from torch import nn

from fastpref.distributed import World

logger = logging.getLogger("fastpref")

PAYS_FROM = 3e17
"""Operations of a device from which on `compile=auto` compiles: twenty minutes of an H100 at a
quarter of its peak, of which a few percent are more than the minute that compiling takes."""
OPERATIONS_OF_A_WEIGHT = 8
"""A token's, in a step with a reference: two forwards and a backward."""
SHAPES = 64
"""Shapes that a block is compiled for before torch gives up on it: some lengths of rows, for policy
and reference, kinds of layers, training and evaluation."""


def choose_compilation(wish: str, model: Any, world: World, *, num_tokens: int) -> bool:
    """Whether blocks are compiled: where it was asked for, or where a run is long enough to pay.

    The same for the same run on the same number of devices, so that one that goes on computes as
    it did.

    Args:
        wish: "auto", "true" or "false"; auto compiles on a GPU alone.
        model: Of transformers.
        num_tokens: Of the whole run, over all devices.
    """
    if wish != "auto":
        return wish == "true"
    if world.device.type != "cuda":
        return False
    # of experts a token sees few
    num_weights = sum(
        parameter.numel() for name, parameter in model.named_parameters() if ".experts." not in name
    )
    operations = OPERATIONS_OF_A_WEIGHT * num_weights * num_tokens / world.size
    pays = operations >= PAYS_FROM
    logger.info(
        "compile=auto: blocks are %s: the run has %.2g operations a device, and compiling pays "
        "from about %.0g on",
        "compiled in the first step" if pays else "not compiled",
        operations,
        PAYS_FROM,
    )
    return pays


def compile_block(block: nn.Module, *, few_lengths: bool) -> None:
    """Compile a block's forward, in place; attention stays what it is.

    Args:
        block: Of a model.
        few_lengths: Rows have one of a few lengths, so each gets code of its own; else one code is
            for rows of any length.
    """
    # no option of torch.compile before torch 2.14
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, SHAPES)
    block.forward = torch.compile(block.forward, dynamic=not few_lengths)
