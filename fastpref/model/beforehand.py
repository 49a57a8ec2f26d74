"""Checks before rows are tokenized and weights are read: a model's vocabulary, and whether it
supports a run's options, found out on its twin on the meta device.
"""

from functools import partial
from typing import Any, NamedTuple

import torch

from fastpref.config import AdapterConfig, ModelConfig, PackingConfig
from fastpref.distributed import World
from fastpref.model.adapters.base import find_adapter_base
from fastpref.model.adapters.lora import Adapters, insert_adapters
from fastpref.model.adapters.quantize import check_quantizable
from fastpref.model.attention.packing_probe import check_attention, check_layout
from fastpref.model.files.paths import archive_file, archived_model, named_model
from fastpref.model.filling import check_files
from fastpref.model.positions import check_company, check_positions
from fastpref.model.replicate import fits_whole
from fastpref.model.router import check_coefficient
from fastpref.model.source import build_meta, load_model_tokenizer, read_vocab_size


class Twin(NamedTuple):
    """A model on the meta device: its modules and shapes without weights."""

    model: Any
    """A causal LM of transformers, on the meta device."""
    adapters: Adapters | None
    """The adapters in it; None if the whole model is trained, or it only scores."""

    def check_longest(self, num_tokens: int, *, is_kept: bool) -> None:
        """Refuse rows that are too long for the model; called once their lengths are known.

        Args:
            num_tokens: Length of the longest sequence.
            is_kept: Whether a row's scores are cached, to be compared with ones of other batches.

        Raises:
            ConfigError: naming the greatest length that is possible.
        """
        check_positions(self.model, num_tokens)
        if is_kept:
            check_company(self.model, num_tokens)


def check_options(
    config: ModelConfig,
    adapter: AdapterConfig,
    packing: PackingConfig,
    *,
    trainable: bool,
    world: World | None = None,
) -> Twin:
    """Refuse options that a model does not support.

    Args:
        config: Model options.
        adapter: Adapter options.
        packing: Requested packing.
        trainable: False if the model only scores.
        world: The ranks that train it; None if it is not trained here.

    Returns:
        The model's twin, for checks that depend on the rows.

    Raises:
        ConfigError: naming the option.
        CheckpointError: there is no such model, its family cannot be built, `model.archive` is
            neither a file nor a model's folder, or the adapter to train on does not fit its base or
            is of a kind that can only be merged.
    """
    if config.archive and not archive_file(config):
        archived_model(config)
    source, start = named_model(config), None
    if trainable and adapter.trained:
        source, start = find_adapter_base(config)
    twin = build_meta(source, dtype=getattr(torch, config.compute_dtype))
    check_attention(twin, config.attention)
    check_layout(twin, packing, config.block_name)
    if trainable:
        check_coefficient(config.router_coefficient, twin)
    if adapter.quantized:
        check_quantizable(twin, config.block_name)
    if not (trainable and adapter.trained):
        return Twin(twin, None)
    # last, because it changes the twin
    adapters = insert_adapters(twin, adapter, config.block_name, start)
    if world is not None:
        fits_whole(twin, adapters, adapter, world)
    return Twin(twin, adapters)


def check_training(
    config: ModelConfig, adapter: AdapterConfig, packing: PackingConfig, world: World
) -> Twin:
    """Refuse options that the model to train does not support, and weights that do not fit it.

    Args:
        config, adapter, packing, world: See `check_options`.

    Returns:
        The model's twin.

    Raises:
        ConfigError, CheckpointError: see `check_options` and `check_files`.
    """
    twin = check_options(config, adapter, packing, trainable=True, world=world)
    beside = adapter.trained and not adapter.merge
    world.on_main(partial(check_files, config, beside=beside))
    return twin


def load_vocabulary(config: ModelConfig, adapter: AdapterConfig) -> tuple[Any, int]:
    """The tokenizer that model options name, and the number of rows of the embedding of the model
    to train; no weights are loaded.

    Raises:
        CheckpointError: there is no such model.
        ConfigError: see `find_adapter_base`.
    """
    # an archive fills the model that `name_or_path` names, or is itself the base of adapters
    source = find_adapter_base(config).source if adapter.trained else named_model(config)
    return load_model_tokenizer(config), read_vocab_size(source)
