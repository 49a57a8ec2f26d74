"""Storage of frozen models: in 16 bits as on disk, even where they compute in float32.

Float32 holds every bfloat16 and float16 number exactly, so widening a block's parameters when it
runs gives the same bits as widening them at load, in half the memory.
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
    """Storage dtype of a frozen model: `model.reference_dtype`, or if that is null the checkpoint's
    16-bit dtype if this changes no result, or else the compute dtype.

    Args:
        beside_policy: It is the reference of a policy; if that is stored in 16 bits, so is this.

    Raises:
        CheckpointError: no such model.
    """
    if config.reference_dtype is not None:
        return config.reference_dtype
    if beside_policy and config.policy_dtype != "float32":
        return config.policy_dtype
    source = named_model(config)
    # an archive or an adapter changes the weights that the checkpoint holds
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
        source: The model; one on the hub is downloaded.

    Returns:
        An empty set if there are no such files or one of them is damaged.
    """
    try:
        folder = weights_folder(source.name, source.revision)
        return {part.get_dtype() for _, part in stored_weights(folder)}
    # the load that follows reports what is wrong
    except (OSError, ValueError, SafetensorError):
        return set()


def is_stored_exactly(model: Any) -> bool:
    """Whether loading a family in 16 bits rounds all of its parameters and nothing else.

    Gemma also rounds its embedding's scale, a buffer; some mixtures of experts keep a few
    parameters in float32, but FSDP refuses mixed dtypes.

    Args:
        model: Built in 16 bits; may be on the meta device.
    """
    kept = ("_keep_in_fp32_modules", "_keep_in_fp32_modules_strict")
    if any(getattr(module, name, None) for module in model.modules() for name in kept):
        return False
    return all(not b.is_floating_point() or b.dtype == torch.float32 for b in model.buffers())


def rounds_more_than_parameters(source: ModelSource, dtype: str) -> bool:
    """Whether loading a model in a dtype changes more than its parameters' dtype, see
    `is_stored_exactly`.
    """
    if dtype == "float32":
        return False
    return not is_stored_exactly(build_meta(source, dtype=getattr(torch, dtype)))


def store_parameters(
    model: nn.Module, dtype: torch.dtype, *, kept: Sequence[nn.Parameter] = ()
) -> None:
    """Cast a model's parameters, except `kept`, to one dtype, as FSDP2 requires; buffers are not.

    Some families keep parameters in float32 when the others are loaded in 16 bits.
    """
    as_they_are = set(kept)
    for parameter in model.parameters():
        if parameter.is_floating_point() and parameter not in as_they_are:
            parameter.data = parameter.data.to(dtype)


def round_buffers(model: Any, dtype: torch.dtype) -> None:
    """Cast a model's buffers to the dtypes that they have when the family is loaded in `dtype`."""
    with torch.device("meta"):
        twin = type(model)._from_config(model.config, dtype=dtype)
    for name, like in twin.named_buffers():
        path, _, buffer = name.rpartition(".")
        module = model.get_submodule(path)
        module._buffers[buffer] = module._buffers[buffer].to(like.dtype)
