"""Whether and how a run's transformer blocks are compiled."""

import logging
from typing import Any

import torch
from torch import nn

from fastpref.distributed import World

logger = logging.getLogger("fastpref")

PAYS_FROM = 3e17
"""FLOPs per device from which on `compile=auto` compiles: twenty minutes of an H100 at a quarter of
its peak, so that a gain of a few percent outweighs the minute that compiling takes."""
OPERATIONS_OF_A_WEIGHT = 8
"""FLOPs per weight and token of a step with a reference: two forwards and a backward."""
SHAPES = 64
"""Torch's recompilation limit for a block: some lengths of rows, each for policy and reference,
kinds of layers, training and evaluation."""


def choose_compilation(wish: str, model: Any, world: World, *, num_tokens: int) -> bool:
    """Whether blocks are compiled: if requested, or if the run is long enough for it to pay.

    Depends only on the run and the number of devices, so that a resumed run computes as before.

    Args:
        wish: "auto", "true" or "false"; auto compiles only on a GPU.
        model: A causal LM of transformers.
        num_tokens: Tokens of the whole run, over all devices.
    """
    if wish != "auto":
        return wish == "true"
    if world.device.type != "cuda":
        return False
    # a token passes through few of the experts
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
    """Compile a block's forward, in place, except for its attention.

    Args:
        block: A transformer block.
        few_lengths: Rows have one of a few lengths, each of which is compiled for; else the block
            is compiled with dynamic shapes.
    """
    # no option of torch.compile before torch 2.14
    config: Any = torch._dynamo.config
    config.recompile_limit = max(config.recompile_limit, SHAPES)
    block.forward = torch.compile(block.forward, dynamic=not few_lengths)
