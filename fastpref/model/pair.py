"""A policy and its reference: two models, or one base with and without the trained adapters."""

from functools import partial
from typing import NamedTuple

from fastpref.batches.layouts import RowLayout
from fastpref.config import PackingConfig, TrainingOptions
from fastpref.distributed import World
from fastpref.model.attention.choice import choose_rows
from fastpref.model.build import build_scorer
from fastpref.model.compilation import choose_compilation
from fastpref.model.liger import choose_liger
from fastpref.model.loading import (
    load_causal_lm,
    load_frozen_base,
    load_reference,
    starts_exactly_equal,
    try_model,
)
from fastpref.model.own_reference import OwnReference, beginning_of
from fastpref.model.replicate import place_adapters
from fastpref.model.scorer import TokenScorer


class Pair(NamedTuple):
    """A policy, its reference, and how they compute."""

    policy: TokenScorer
    reference: TokenScorer | OwnReference | None
    """None if the loss has no reference, or its scores are cached."""
    layout: RowLayout
    """Row layout of both models."""
    starts_equal: bool
    """Whether policy and reference are bit-identical before the first update."""
    replicated: bool
    """Whether every rank holds a full replica of the frozen base of adapters."""
    compiled: bool
    """Whether blocks are compiled."""

    @property
    def beginning(self) -> TokenScorer | OwnReference:
        """See `beginning_of`."""
        return beginning_of(self.policy)


def build_pair(
    options: TrainingOptions,
    packing: PackingConfig,
    world: World,
    *,
    longest: int,
    num_tokens: int = 0,
) -> Pair:
    """Load and check a policy, load its reference if it computes in every step, build both scorers.

    Args:
        longest: Tokens in the longest sequence.
        num_tokens: Tokens of the whole run, approximately; 0 if there is no run.
    """
    frozen = options.adapter.trained
    if frozen:
        model, start = load_frozen_base(options.model, world)
    else:
        model, start = load_causal_lm(options.model, world, trainable=True), None
    findings = try_model(model, options.model, world, trainable=True, frozen=frozen)
    compiled = choose_compilation(options.compile, model, world, num_tokens=num_tokens)
    rows = choose_rows(
        model,
        options.model,
        packing,
        world,
        path=findings.path,
        longest=longest,
        few_lengths=compiled,
    )
    build = partial(
        build_scorer,
        config=options.model,
        world=world,
        path=findings.path,
        attention=rows.attention,
        compile=compiled,
        liger=choose_liger(options.model.liger, model, world, compiled=compiled),
    )
    adapters, replicated = place_adapters(model, options, world, start)
    policy = build(
        model,
        trainable=True,
        activation_checkpointing=options.activation_checkpointing,
        adapters=adapters,
        replicated=replicated,
        router=findings.router,
    )
    reference: TokenScorer | OwnReference | None = None
    if options.has_reference and adapters is not None:
        reference = OwnReference(policy)
    elif options.has_reference:
        reference = build(load_reference(options.model, world, findings), trainable=False)
    starts_equal = not options.adapter.dropout and starts_exactly_equal(
        options.model,
        findings,
        compile=compiled,
        activation_checkpointing=options.activation_checkpointing,
    )
    return Pair(policy, reference, rows.layout, starts_equal, replicated, compiled)
