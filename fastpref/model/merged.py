"""A trained adapter merged into its base."""

from typing import Any

import torch

from fastpref.config import AdapterConfig, ModelConfig
from fastpref.model.adapters.base import find_adapter_base
from fastpref.model.adapters.folders import merge_adapter
from fastpref.model.adapters.quantize import round_blocks
from fastpref.model.files.paths import find_model
from fastpref.model.source import load_model


def load_merged(
    folder: str, model: ModelConfig, adapter: AdapterConfig, device: torch.device
) -> Any:
    """Load a trained adapter merged into its base, in float32 on the CPU.

    Args:
        folder: The adapter's folder.
        model: Model options of the run that trained it.
        adapter: Adapter options of that run. An adapter of 4-bit layers learnt to compensate for
            their rounding, so it is merged into the dequantized weights, not the original ones.
        device: Device to quantize on, the one that the adapter was trained on.

    Raises:
        CheckpointError: the merged model does not compute the same as base and adapter.
    """
    if not adapter.quantized:
        return load_model(
            find_model(folder, trust_remote_code=model.trust_remote_code), dtype=torch.float32
        )
    source = find_adapter_base(model).source
    base = load_model(source, dtype=getattr(torch, model.compute_dtype))
    round_blocks(base, model.block_name, device)
    return merge_adapter(base.float(), folder)
