"""A run put together: data, models, optimizer and log, everything the loop works on."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastpref.batches.layouts import RowLayout
from fastpref.batches.loader import Split
from fastpref.config import Config
from fastpref.data.chat import read_chat_template
from fastpref.distributed import World
from fastpref.model.attention.choice import choose_rows
from fastpref.model.build import (
    build_scorer,
    check_positions,
    load_causal_lm,
    load_reference,
    starts_exactly_equal,
    try_model,
)
from fastpref.model.checks import Findings
from fastpref.model.liger import choose_liger
from fastpref.model.scorer import TokenScorer
from fastpref.objectives.objective import Objective, build_objective
from fastpref.objectives.step_loss import StepLoss
from fastpref.train.announce import (
    announce,
    announce_tokens,
)
from fastpref.train.data import build_splits, load_data
from fastpref.train.export import ExportPlan, plan_export
from fastpref.train.metrics import MetricsLog, first_loss_tolerance
from fastpref.train.optim import build_optimizer, build_scheduler
from fastpref.train.run_folder import create_run_dir
from fastpref.train.trackers import build_trackers


@dataclass(frozen=True, slots=True, kw_only=True)
class Run:
    """All that the loop works on."""

    config: Config
    world: World
    run_dir: Path
    tokenizer: Any
    train: Split
    eval: Split | None
    policy: TokenScorer
    reference: TokenScorer | None
    step_loss: StepLoss
    optimizer: Optimizer
    scheduler: LambdaLR
    log: MetricsLog
    export: ExportPlan | None
    """On rank 0."""


class Models(NamedTuple):
    """What is trained, what it is compared with, and what was found out about them."""

    policy: TokenScorer
    reference: TokenScorer | None
    layout: RowLayout
    """How they take rows."""
    findings: Findings


def build_models(config: Config, world: World, objective: Objective, *, longest: int) -> Models:
    """Policy and, where the loss has one, reference: loaded, tried, sharded.

    Args:
        config: Of the run.
        world: Whoever computes.
        objective: The loss.
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
    return Models(policy, reference, rows.layout, findings)


def build_run(config: Config, world: World) -> Run:
    """Everything a run needs, in the order in which mistakes are cheap to find: data, then models.

    Raises:
        FastprefError: whatever is wrong with the config, the data or the model.
    """
    objective = build_objective(config.loss)
    if world.is_main:
        announce(config, world, objective)
    data = load_data(config, world)
    models = build_models(config, world, objective, longest=data.longest)
    policy = models.policy
    train_split, eval_split = build_splits(
        data,
        models.layout,
        num_embeddings=policy.num_embeddings,
        min_micro_batches=config.gradient_accumulation_steps,
    )
    if world.is_main:
        announce_tokens(train_split, world)
    optimizer = build_optimizer(
        config.optimizer,
        policy.parameters(),
        lr=config.lr,
        options=config.optim.arguments(),
    )
    policy.follow(optimizer)
    scheduler = build_scheduler(
        optimizer,
        schedule=config.optim.schedule,
        warmup_steps=config.warmup_steps,
        num_steps=train_split.order.num_steps,
        min_lr_ratio=config.optim.min_lr_ratio,
    )
    tolerance = None
    if objective.starts_at_log_two:
        exact = starts_exactly_equal(
            config.model,
            models.findings,
            compile=config.compile,
            activation_checkpointing=config.activation_checkpointing,
        )
        tolerance = first_loss_tolerance(exact=exact)
    export: list[ExportPlan] = []
    template = read_chat_template(config.data.chat_template)
    world.on_main(
        lambda: export.append(
            plan_export(config.model, policy.model.config, data.tokenizer, template)
        )
    )
    # last: what fails until here leaves no folder behind
    run_dir = create_run_dir(config, world)
    log = MetricsLog(
        path=run_dir / "metrics.jsonl",
        min_interval_seconds=config.minimum_log_interval_secs,
        device=world.device,
        is_main=world.is_main,
        first_loss_tolerance=tolerance,
        trackers=build_trackers(config, run_dir) if world.is_main else [],
    )
    return Run(
        config=config,
        world=world,
        run_dir=run_dir,
        tokenizer=data.tokenizer,
        train=train_split,
        eval=eval_split,
        policy=policy,
        reference=models.reference,
        step_loss=StepLoss(objective, policy, models.reference),
        optimizer=optimizer,
        scheduler=scheduler,
        log=log,
        export=export[0] if export else None,
    )
