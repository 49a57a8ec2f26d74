"""What is known of a model before rows are tokenized and weights are read: its vocabulary, and what
of a run's options it cannot do, asked of its twin without memory.
"""

from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastpref.config import AdapterConfig, ModelConfig, PackingConfig
from fastpref.distributed import World
from fastpref.model.adapters.base import find_adapter_base
from fastpref.model.adapters.lora import Adapters, insert_adapters
from fastpref.model.adapters.quantize import check_quantizable
from fastpref.model.attention.packing_probe import check_attention, check_layout
from fastpref.model.files.full_weights import check_weights
from fastpref.model.files.paths import archived_model, named_model
from fastpref.model.positions import check_company, check_positions
from fastpref.model.replicate import fits_whole
from fastpref.model.router import check_coefficient
from fastpref.model.source import build_meta, load_model_tokenizer, read_vocab_size


class Twin(NamedTuple):
    """A model without memory."""

    model: Any
    """Of transformers, on the meta device."""
    adapters: Adapters | None
    """In it; None where all of it is trained, or it scores only."""

    def check_longest(self, num_tokens: int, *, is_kept: bool) -> None:
        """Refuse rows that the model cannot take, once it is known how long they are.

        Args:
            num_tokens: Of the longest sequence.
            is_kept: Whether what the model computes of a row is kept for others beside it.

        Raises:
            ConfigError: naming the longest one that it can.
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
    """Refuse what a model cannot do.

    Args:
        config: Of the model.
        adapter: Of what is trained beside it.
        packing: How rows are to lie.
        trainable: False where it scores only.
        world: Whoever trains it; None where that is not here.

    Returns:
        Its twin, for what depends on the rows.

    Raises:
        ConfigError: naming the option.
        CheckpointError: there is no such model, its family cannot be built, `model.archive` is
            neither a file nor a model's folder, or the adapter to train on is of a kind that can
            only be merged.
    """
    if config.archive and not Path(config.archive).expanduser().is_file():
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


def check_files(model: ModelConfig) -> None:
    """Refuse files of weights that are not all there, or do not fill their model; of a name on the
    hub none are there yet.

    Args:
        model: Its options.

    Raises:
        CheckpointError: naming them.
    """
    source = named_model(model)
    if model.archive:
        if Path(model.archive).expanduser().is_file():
            return
        source = archived_model(model)
    if Path(source.base).is_dir():
        # an adapter may bring a vocabulary of its own
        own = source._replace(adapters=())
        check_weights(build_meta(own, dtype=torch.float32), Path(source.base))


def load_vocabulary(config: ModelConfig) -> tuple[Any, int]:
    """The tokenizer of a model's options, and the rows of its embedding; no weights are loaded.

    Raises:
        CheckpointError: there is no such model.
    """
    num_embeddings = read_vocab_size(named_model(config))
    return load_model_tokenizer(config), num_embeddings
