"""Frozen models in memory as they are on the disk, in 16 bits, though they compute in float32.

Float32 holds every bfloat16 and float16 number, so a block whose parameters are widened when it
runs computes what it would if they had been widened at load, bit for bit, in half the memory.
"""

from collections.abc import Sequence
from typing import Any

import torch
from safetensors import SafetensorError
from torch import nn

from fastpref.config import ModelConfig
from fastpref.model.files.paths import ModelSource, named_model
from fastpref.model.files.weight_files import stored_weights, weights_folder
from fastpref.model.source import build_meta

HALF_DTYPES = {"BF16": "bfloat16", "F16": "float16"}
"""Safetensors' names of the dtypes that float32 contains."""


def frozen_dtype(config: ModelConfig, *, beside_policy: bool = False) -> str:
    """How a model that is not trained is stored: `model.reference_dtype`, or where that is null
    the checkpoint's 16 bits if this changes no number, or else the compute dtype.

    Args:
        beside_policy: It is the reference of a policy, which may be stored in 16 bits itself.

    Raises:
        CheckpointError: no such model.
    """
    if config.reference_dtype is not None:
        return config.reference_dtype
    if beside_policy and config.policy_dtype != "float32":
        return config.policy_dtype
    source = named_model(config)
    # an archive brings other weights, and an adapter's are added to the model's
    has_own_weights = config.archive is None and not source.adapters
    if config.compute_dtype != "float32" or not has_own_weights:
        return config.compute_dtype
    dtypes = checkpoint_dtypes(source)
    dtype = HALF_DTYPES.get(dtypes.pop()) if len(dtypes) == 1 else None
    if dtype is None:
        return config.compute_dtype
    model = build_meta(source, dtype=getattr(torch, dtype))
    return dtype if is_stored_exactly(model) else config.compute_dtype


def checkpoint_dtypes(source: ModelSource) -> set[str]:
    """Dtypes of the weights in a model's safetensors files, by safetensors' names.

    Args:
        source: Where it lies; a hub model is downloaded.

    Returns:
        An empty set if there are no such files or one of them is damaged.
    """
    try:
        folder = weights_folder(source.name, source.revision)
        return {part.get_dtype() for _, part in stored_weights(folder)}
    # what is wrong is said by the load that follows
    except (OSError, ValueError, SafetensorError):
        return set()


def is_stored_exactly(model: Any) -> bool:
    """Whether a family in 16 bits differs from itself in float32 by nothing but its parameters.

    Gemma rounds its embedding's scale, a buffer, with them; some mixtures of experts keep a few
    parameters in float32, which FSDP takes for a mistake.

    Args:
        model: Built in 16 bits; may be on the meta device.
    """
    kept = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    if any(getattr(module, name, None) for module in model.modules() for name in kept):
        return False
    return all(not b.is_floating_point() or b.dtype == torch.float32 for b in model.buffers())


def rounds_more_than_parameters(source: ModelSource, dtype: str) -> bool:
    """Whether a model loaded in a dtype differs in more than its parameters' dtype, see
    `is_stored_exactly`.
    """
    if dtype == "float32":
        return False
    return not is_stored_exactly(build_meta(source, dtype=getattr(torch, dtype)))


def store_parameters(
    model: nn.Module, dtype: torch.dtype, *, kept: Sequence[nn.Parameter] = ()
) -> None:
    """Store all of a model's parameters in one dtype, as FSDP2 asks; buffers stay as they are.

    Some families keep parameters in float32 when the others are loaded in 16 bits.
    """
    as_they_are = set(kept)
    others = [
        name
        for name, parameter in model.named_parameters()
        if parameter.is_floating_point()
        and parameter.dtype != dtype
        and parameter not in as_they_are
    ]
    for name in others:
        parameter = model.get_parameter(name)
        parameter.data = parameter.data.to(dtype)


def round_buffers(model: Any, dtype: torch.dtype) -> None:
    """Give a model's buffers the dtypes that they have where the family is loaded in a dtype."""
    with torch.device("meta"):
        twin = type(model)._from_config(model.config, dtype=dtype)
    for name, like in twin.named_buffers():
        path, _, buffer = name.rpartition(".")
        module = model.get_submodule(path)
        module._buffers[buffer] = module._buffers[buffer].to(like.dtype)
