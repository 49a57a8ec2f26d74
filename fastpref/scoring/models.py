"""Loads the models of both sides, one at a time; adapters of one base share one model."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import replace

from fastpref.batches.layouts import RowLayout
from fastpref.config import ModelConfig, PackingConfig
from fastpref.distributed import World
from fastpref.memory.repetition import release_memory
from fastpref.model.adapters.base import AdapterBase, find_shared_base
from fastpref.model.adapters.lora import add_given_adapters
from fastpref.model.attention.choice import choose_rows
from fastpref.model.build import build_scorer
from fastpref.model.loading import load_causal_lm, try_model
from fastpref.model.scorer import TokenScorer
from fastpref.scoring.side import Side

logger = logging.getLogger("fastpref")


class SideModels:
    """Loads each side's model on request; sides that are adapters of one base share a model.

    Args:
        sides: In scoring order.
        longest: Tokens in the longest sequence that any side scores.
    """

    def __init__(
        self, sides: Sequence[Side], packing: PackingConfig, world: World, *, longest: int
    ) -> None:
        self._sides = sides
        self._packing = packing
        self._world = world
        self._longest = longest
        self._base: ModelConfig | None = None
        self._adapters: dict[str, str] = {}
        self._shared: tuple[TokenScorer, RowLayout] | None = None
        bases = world.on_main(lambda: find_shared_base([side.model for side in sides]))
        self._quantized = any(side.quantized for side in sides)
        assert bases is not None or not self._quantized
        if bases is not None:
            self._base = on_base(sides[0].model, bases[0])
            starts = zip(sides, (base.start for base in bases), strict=True)
            self._adapters = {side.label: start for side, start in starts if start is not None}

    def load(self, side: Side) -> tuple[TokenScorer, RowLayout]:
        """A side's frozen scorer, with the side's adapter active, and the scorer's row layout."""
        if self._base is None:
            return self._load(side.model)
        if self._shared is None:
            self._shared = self._load(self._base)
        scorer, _ = self._shared
        if scorer.adapters is not None:
            scorer.adapters.activate(side.label if side.label in self._adapters else None)
        return self._shared

    def _load(self, model: ModelConfig) -> tuple[TokenScorer, RowLayout]:
        return load_frozen_scorer(
            model,
            self._packing,
            self._world,
            longest=self._longest,
            adapters=self._adapters,
            quantized=self._quantized,
        )

    def release(self, side: Side) -> None:
        """Free what no later side needs; call when a side is done, before the next is loaded."""
        if side is self._sides[-1]:
            self._shared = None
        release_memory()


def load_frozen_scorer(
    options: ModelConfig,
    packing: PackingConfig,
    world: World,
    *,
    longest: int,
    adapters: Mapping[str, str] | None = None,
    quantized: bool = False,
) -> tuple[TokenScorer, RowLayout]:
    """Load a frozen model as a scorer, and choose its row layout.

    Args:
        longest: Tokens in the longest sequence that will be scored.
        adapters: Adapter folders by adapter name; inserted unmerged, and inactive at first.
        quantized: Quantize the linear layers of its blocks to 4 bits.
    """
    model = load_causal_lm(options, world, trainable=False)
    path = try_model(model, options, world, trainable=False).path
    rows = choose_rows(model, options, packing, world, path=path, longest=longest)
    beside = None
    if adapters or quantized:
        beside = add_given_adapters(
            model, adapters or {}, world, quantized=quantized, block_name=options.block_name
        )
    scorer = build_scorer(
        model,
        options,
        world,
        path=path,
        trainable=False,
        attention=rows.attention,
        adapters=beside,
        replicated=quantized,
    )
    return scorer, rows.layout


def on_base(model: ModelConfig, base: AdapterBase) -> ModelConfig:
    """A model's options, changed to load the base that its adapter belongs to."""
    revision = None if base.source.adapters else base.source.revision
    return replace(model, name_or_path=base.name, revision=revision)
