"""The models of a run: what is trained, and what it is compared with."""

from typing import NamedTuple

from fastpref.batches.layouts import RowLayout
from fastpref.config import Config
from fastpref.distributed import World
from fastpref.model.attention.choice import choose_rows
from fastpref.model.build import build_scorer
from fastpref.model.liger import choose_liger
from fastpref.model.loading import (
    load_causal_lm,
    load_reference,
    starts_exactly_equal,
    try_model,
)
from fastpref.model.positions import check_positions
from fastpref.model.scorer import TokenScorer
from fastpref.objectives.objective import Objective
from fastpref.objectives.step_loss import StepLoss


class Models(NamedTuple):
    """What is trained, what it is compared with, and what was found out about them."""

    policy: TokenScorer
    reference: TokenScorer | None
    step_loss: StepLoss
    """The objective on them."""
    layout: RowLayout
    """How they take rows."""
    starts_equal: bool
    """Whether both give the same bits before the first update."""


def build_models(config: Config, world: World, objective: Objective, *, longest: int) -> Models:
    """Policy and, where the loss has one, reference: loaded, tried, sharded.

    Args:
        config: Of the run.
        world: Whoever computes.
        objective: What is computed of them.
        longest: Tokens of the longest sequence.
    """
    model = load_causal_lm(config.model, world, trainable=True)
    check_positions(model, longest)
    findings = try_model(model, config.model, world, trainable=True)
    rows = choose_rows(
        model, config.model, config.packing, world, path=findings.path, longest=longest
    )
    liger = choose_liger(config.model.liger, model, world, compiled=config.compile)
    policy = build_scorer(
        model,
        config.model,
        world,
        path=findings.path,
        trainable=True,
        attention=rows.attention,
        activation_checkpointing=config.activation_checkpointing,
        compile=config.compile,
        liger=liger,
    )
    reference = None
    if objective.needs.reference:
        reference = build_scorer(
            load_reference(config.model, world, findings),
            config.model,
            world,
            path=findings.path,
            trainable=False,
            attention=rows.attention,
            compile=config.compile,
            liger=liger,
        )
    starts_equal = starts_exactly_equal(
        config.model,
        findings,
        compile=config.compile,
        activation_checkpointing=config.activation_checkpointing,
    )
    step_loss = StepLoss(objective, policy, reference)
    return Models(policy, reference, step_loss, rows.layout, starts_equal)
