"""Compute dtype by device: 16 bits only where the hardware supports them natively."""

import logging
from dataclasses import replace

import torch
from fastpref_kernels.gemm import cpu_multiplies_bfloat16

from fastpref.config import ModelConfig
from fastpref.distributed import World

logger = logging.getLogger("fastpref")


def precision_here(model: ModelConfig, world: World) -> ModelConfig:
    """A model's options with the compute dtype that all ranks use; logs it if it is not the
    requested one.

    A CPU without native support for a 16-bit dtype multiplies in it many times slower than in
    float32, and less exactly.
    """
    dtype = model.compute_dtype
    if world.device.type != "cpu" or world.on_main(lambda: has_units(dtype)):
        return model
    logger.info("this CPU has no units for %s: the arithmetic is in float32", dtype)
    return replace(model, fsdp_policy_mp="float32")


def has_units(dtype: str) -> bool:
    """Whether this CPU supports a dtype natively: products are no slower than in float32."""
    if dtype == "bfloat16":
        return cpu_multiplies_bfloat16()
    return dtype == "float32" or torch.cpu.get_capabilities().get("avx512_fp16", False)
