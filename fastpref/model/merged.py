"""A trained adapter and its base as one model."""

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
    """The model that was trained, its adapter in its weights, in float32 on the CPU.

    Args:
        folder: Of the trained adapter.
        model: Options of the run that trained it.
        adapter: Options of that run. Beside layers in 4 bits the adapter learnt what they lack, so
            it is merged into what 4 bits hold, not into the weights that they were made of.
        device: That quantized them.

    Raises:
        CheckpointError: what is merged does not compute what the two do beside one another.
    """
    if not adapter.quantized:
        return load_model(
            find_model(folder, trust_remote_code=model.trust_remote_code), dtype=torch.float32
        )
    source = find_adapter_base(model).source
    base = load_model(source, dtype=getattr(torch, model.compute_dtype))
    round_blocks(base, model.block_name, device)
    return merge_adapter(base.float(), folder)
