"""What is known of a model before rows are tokenized and weights are read: its vocabulary, and what
of a run's options it cannot do, asked of its twin without memory.

A family that cannot be built so is asked once it is loaded: each of these rules holds there, too.
"""

from pathlib import Path
from typing import Any

import torch

from fastpref.config import AdapterConfig, ModelConfig, PackingConfig
from fastpref.errors import CheckpointError, ConfigError
from fastpref.model.adapters.base import find_adapter_base
from fastpref.model.adapters.given import given_config
from fastpref.model.adapters.lora import insert_adapters
from fastpref.model.adapters.quantize import check_quantizable
from fastpref.model.attention.packing_probe import check_layout
from fastpref.model.blocks import find_blocks
from fastpref.model.files.paths import ModelSource, archived_model, named_model
from fastpref.model.router import check_coefficient
from fastpref.model.source import build_meta, load_model_tokenizer, read_vocab_size


def check_options(
    config: ModelConfig, adapter: AdapterConfig, packing: PackingConfig, *, trainable: bool
) -> None:
    """Refuse what a model cannot do.

    Args:
        config: Of the model.
        adapter: Of what is trained beside it.
        packing: How rows are to lie.
        trainable: False where it scores only.

    Raises:
        ConfigError: naming the option.
        CheckpointError: `model.archive` is neither a file nor a model's folder, or the adapter to
            train on is of a kind that can only be merged.
    """
    if config.archive and not Path(config.archive).expanduser().is_file():
        archived_model(config)
    source, start = named_model(config), None
    if trainable and adapter.trained:
        source, start = find_adapter_base(config)
    if start is not None:
        given_config(start)
    twin = _build_twin(source)
    if twin is None:
        return
    if config.attention == "sdpa" and not twin._supports_sdpa:
        raise ConfigError(
            f"model.attention=sdpa: {type(twin).__name__} has no such attention in "
            "transformers; set model.attention=auto or eager"
        )
    find_blocks(twin, config.block_name)
    check_layout(twin, packing, config.block_name)
    if trainable:
        check_coefficient(config.router_coefficient, twin)
    if adapter.quantized:
        check_quantizable(twin, config.block_name)
    # last, because it changes the twin
    if trainable and adapter.trained:
        insert_adapters(twin, adapter, config.block_name, start)


def load_vocabulary(config: ModelConfig) -> tuple[Any, int]:
    """The tokenizer of a model's options, and the rows of its embedding; no weights are loaded.

    Raises:
        CheckpointError: there is no such model.
    """
    num_embeddings = read_vocab_size(named_model(config))
    return load_model_tokenizer(config), num_embeddings


def _build_twin(source: ModelSource) -> Any:
    """The model without memory; None where it cannot be had, which those say who load it."""
    try:
        return build_meta(source, dtype=torch.float32)
    except CheckpointError:
        return None
