"""A run put together: data, models, optimizer and log, everything the loop works on."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastpref.batches.loader import RowLayout, Split
from fastpref.batches.order import GlobalOrder
from fastpref.config import Config
from fastpref.data.audit import describe_example
from fastpref.data.chat import read_chat_template
from fastpref.data.encode import PreferenceSplit, load_split
from fastpref.data.source import check_sources, read_rows
from fastpref.distributed import World, main_first
from fastpref.model.attention.choice import Packing, choose_packing
from fastpref.model.build import (
    build_scorer,
    check_positions,
    load_causal_lm,
    load_reference,
    starts_exactly_equal,
    try_model,
)
from fastpref.model.liger import choose_liger
from fastpref.model.paths import resolve_model
from fastpref.model.scorer import TokenScorer
from fastpref.model.source import (
    load_model_tokenizer,
    pad_token_id,
    read_vocab_size,
)
from fastpref.objectives.objective import Objective, build_objective
from fastpref.objectives.step_loss import StepLoss
from fastpref.train.export import ExportPlan, plan_export
from fastpref.train.metrics import MetricsLog, first_loss_tolerance
from fastpref.train.optim import build_optimizer, build_scheduler
from fastpref.train.run_folder import create_run_dir
from fastpref.train.trackers import build_trackers

logger = logging.getLogger("fastpref")


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


def announce(config: Config, world: World, objective: Objective) -> None:
    """Say what is about to happen, and what in it a user may not expect."""
    logger.info(
        "%s of %s on %s: %d x %s, weights in %s, arithmetic in %s",
        objective.title,
        config.model.name_or_path,
        ", ".join(config.datasets),
        world.size,
        world.device.type,
        config.model.policy_dtype,
        config.model.compute_dtype,
    )
    transform = config.transform
    if objective.needs.weights and transform.method == "binary":
        logger.warning(
            "transform.method=binary at %g percent: %g percent of a response's tokens weigh 1, "
            "the others 0, whatever their estimated weights; transform=paper uses the estimates",
            transform.binary.top_percent,
            transform.binary.top_percent,
        )


class Data(NamedTuple):
    """What is known of the data before there is a model."""

    train: PreferenceSplit
    train_order: GlobalOrder
    eval: PreferenceSplit | None
    eval_order: GlobalOrder | None
    tokenizer: Any

    @property
    def longest(self) -> int:
        """Tokens of the longest sequence."""
        return max(split.audit.longest_tokens for split in (self.train, self.eval) if split)


def load_data(config: Config, world: World) -> Data:
    """Read and encode the train and test splits, rank 0 first so that the others find its cache.

    Rows are validated before the tokenizer is loaded, and everything before any model.
    """
    quiet = not world.is_main
    splits = ["train", "test"] if config.n_eval_examples else ["train"]
    check_sources(config, splits)
    main_first(world, lambda: [read_rows(config, split, quiet=quiet) for split in splits])
    vocab_size = read_vocab_size(resolve_model(config.model.name_or_path), config.model.revision)
    tokenizer = load_model_tokenizer(config.model)

    def encode() -> list[PreferenceSplit]:
        return [
            load_split(config, split, tokenizer, vocab_size=vocab_size, quiet=quiet)
            for split in splits
        ]

    train, *held_out = main_first(world, encode)
    if world.is_main:
        logger.info("one example, as the model sees it:\n%s", describe_example(train, tokenizer))
    train_order = GlobalOrder(
        train.groups,
        batch_size=config.batch_size,
        seed=config.seed,
        n_epochs=config.n_epochs,
        n_examples=config.n_examples,
        drop_last=config.data.drop_last,
        order=config.data.order,
        num_prompts=train.num_prompts,
    )
    if world.is_main and train_order.warning:
        logger.warning(train_order.warning)
    if not held_out:
        return Data(train, train_order, None, None, tokenizer)
    eval_order = GlobalOrder(
        held_out[0].groups,
        batch_size=config.eval_batch_size,
        seed=config.seed,
        n_epochs=1,
        n_examples=config.n_eval_examples,
        drop_last=False,
        order=config.data.order,
        num_prompts=held_out[0].num_prompts,
    )
    return Data(train, train_order, held_out[0], eval_order, tokenizer)


def build_splits(
    config: Config, data: Data, policy: TokenScorer, packing: Packing | None
) -> tuple[Split, Split | None]:
    """The splits with how their rows become batches."""
    layout = RowLayout(
        packed=packing is not None,
        share_prompt=packing is not None and packing.share_prompt,
        max_tokens=config.packing.max_tokens,
        pad_token_id=pad_token_id(data.tokenizer, policy.num_embeddings),
    )
    train = Split(
        data=data.train,
        order=data.train_order,
        layout=layout,
        min_micro_batches=config.gradient_accumulation_steps,
    )
    if data.eval is None or data.eval_order is None:
        return train, None
    return train, Split(data=data.eval, order=data.eval_order, layout=layout)


def announce_tokens(split: Split, world: World) -> None:
    """Say what of the data the model's body will compute, by the first steps."""
    steps = min(32, split.order.num_steps)
    in_data, computed = split.savings(world.size, steps)
    logger.info(
        "first %d steps: %s tokens in the data, %s computed, %.0f %% %s",
        steps,
        f"{in_data:,}",
        f"{computed:,}",
        100 * abs(1 - computed / in_data),
        "saved" if computed <= in_data else "more, for padding",
    )


def build_run(config: Config, world: World) -> Run:
    """Everything a run needs, in the order in which mistakes are cheap to find: data, then models.

    Raises:
        FastprefError: whatever is wrong with the config, the data or the model.
    """
    objective = build_objective(config.loss)
    if world.is_main:
        announce(config, world, objective)
    data = load_data(config, world)
    model = load_causal_lm(config.model, world, trainable=True)
    check_positions(model, data.longest)
    findings = try_model(model, config.model, world, trainable=True)
    packing = choose_packing(model, config, world, path=findings.path, longest=data.longest)
    attention = packing.attention if packing else None
    liger = choose_liger(config.model.liger, model, world, compiled=config.compile)
    policy = build_scorer(
        model,
        config.model,
        world,
        path=findings.path,
        trainable=True,
        attention=attention,
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
            attention=attention,
            compile=config.compile,
            liger=liger,
        )
    train_split, eval_split = build_splits(config, data, policy, packing)
    if world.is_main:
        announce_tokens(train_split, world)
    optimizer = build_optimizer(
        config.optimizer,
        policy.parameters(),
        lr=config.lr,
        options=config.optim.arguments(),
    )
    scheduler = build_scheduler(
        optimizer,
        schedule=config.optim.schedule,
        warmup_steps=config.warmup_steps,
        num_steps=train_split.order.num_steps,
        min_lr_ratio=config.optim.min_lr_ratio,
    )
    tolerance = None
    if objective.starts_at_log_two:
        tolerance = first_loss_tolerance(exact=starts_exactly_equal(config, findings))
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
        reference=reference,
        step_loss=StepLoss(objective, policy, reference),
        optimizer=optimizer,
        scheduler=scheduler,
        log=log,
        export=export[0] if export else None,
    )
