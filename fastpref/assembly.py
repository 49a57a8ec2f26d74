"""A run put together: data, models, optimizer and log, everything the loop works on."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastpref.attention_choice import Packing, choose_packing
from fastpref.attention_kernels import PackedAttention
from fastpref.audit import describe_example
from fastpref.checkpoint import create_run_dir
from fastpref.config import Config, ModelConfig
from fastpref.config_groups import FLASH_PACKAGES
from fastpref.datasets import check_sources, read_rows
from fastpref.distributed import World, main_first
from fastpref.encode import PreferenceSplit, load_split
from fastpref.errors import ConfigError
from fastpref.feed import RowLayout, Split
from fastpref.frozen_storage import compute_in, frozen_dtype
from fastpref.liger import choose_liger, replace_layers
from fastpref.metrics import MetricsLog
from fastpref.model import TokenScorer, check_head
from fastpref.model_paths import resolve_model
from fastpref.objectives import Objective, build_objective
from fastpref.optim import build_optimizer, build_scheduler
from fastpref.parallelize import parallelize, send_weights
from fastpref.pretrained import (
    build_empty,
    load_model,
    load_model_tokenizer,
    pad_token_id,
    read_vocab_size,
)
from fastpref.reference import EvaluateFn, build_evaluate_fn
from fastpref.sampler import GlobalOrder
from fastpref.trackers import build_trackers

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
    objective: Objective
    policy: TokenScorer
    reference: TokenScorer | None
    evaluate: EvaluateFn
    optimizer: Optimizer
    scheduler: LambdaLR
    log: MetricsLog


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
    if objective.needs_weights and transform.method == "binary":
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
    main_first(world, "rows", lambda: [read_rows(config, split, quiet=quiet) for split in splits])
    vocab_size = read_vocab_size(resolve_model(config.model.name_or_path), config.model.revision)
    tokenizer = load_model_tokenizer(config.model)

    def encode() -> list[PreferenceSplit]:
        return [
            load_split(config, split, tokenizer, vocab_size=vocab_size, quiet=quiet)
            for split in splits
        ]

    train, *held_out = main_first(world, "encoded", encode)
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
    )
    return Data(train, train_order, held_out[0], eval_order, tokenizer)


def build_splits(config: Config, data: Data, packing: Packing | None) -> tuple[Split, Split | None]:
    """The splits with how their rows become batches."""
    layout = RowLayout(
        packed=packing is not None,
        share_prompt=packing is not None and packing.share_prompt,
        max_tokens=config.packing.max_tokens,
        pad_token_id=pad_token_id(data.tokenizer),
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
    if world.is_main:
        check_head(TokenScorer(model))
    packing = choose_packing(model, config, world, longest=data.longest)
    attention = packing.attention if packing else None
    liger = choose_liger(config.model.liger, model, world, compiled=config.compile)
    policy = build_scorer(
        model,
        config.model,
        world,
        trainable=True,
        attention=attention,
        activation_checkpointing=config.activation_checkpointing,
        compile=config.compile,
        liger=liger,
    )
    check_positions(policy, data.longest)
    reference = None
    if objective.needs_reference:
        reference = build_scorer(
            load_causal_lm(config.model, world, trainable=False),
            config.model,
            world,
            trainable=False,
            attention=attention,
            compile=config.compile,
            liger=liger,
        )
    train_split, eval_split = build_splits(config, data, packing)
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
    # last: what fails until here leaves no folder behind
    run_dir = create_run_dir(config, world)
    log = MetricsLog(
        path=run_dir / "metrics.jsonl",
        min_interval_seconds=config.minimum_log_interval_secs,
        device=world.device,
        is_main=world.is_main,
        starts_at_log_two=objective.starts_at_log_two,
        trackers=build_trackers(config, run_dir) if world.is_main else [],
    )
    return Run(
        config=config,
        world=world,
        run_dir=run_dir,
        tokenizer=data.tokenizer,
        train=train_split,
        eval=eval_split,
        objective=objective,
        policy=policy,
        reference=reference,
        evaluate=build_evaluate_fn(policy, reference, objective),
        optimizer=optimizer,
        scheduler=scheduler,
        log=log,
    )


def check_positions(policy: TokenScorer, longest: int) -> None:
    """Refuse sequences that run off a learned position table.

    Raises:
        ConfigError: naming the largest max_length that fits.
    """
    if policy.num_positions is not None and longest > policy.num_positions:
        raise ConfigError(
            f"max_length: the longest sequence has {longest} tokens, the model has positions for "
            f"{policy.num_positions}; set max_length={policy.num_positions} or less"
        )


def load_frozen_scorer(
    config: Config, world: World, *, longest: int
) -> tuple[TokenScorer, Packing | None]:
    """The config's model without gradients, and how it takes packed rows; None for padded ones.

    Args:
        config: Of the run.
        world: Whoever computes.
        longest: Tokens of the longest sequence that will be scored.
    """
    model = load_causal_lm(config.model, world, trainable=False)
    compute_in(model, getattr(torch, config.model.compute_dtype), config.model.block_name)
    if world.is_main:
        check_head(TokenScorer(model))
    packing = choose_packing(model, config, world, longest=longest)
    attention = packing.attention if packing else None
    if world.size == 1:
        return build_whole_scorer(model, config.model, world, attention), packing
    scorer = build_scorer(model, config.model, world, trainable=False, attention=attention)
    return scorer, packing


def build_whole_scorer(
    model: Any, config: ModelConfig, world: World, attention: PackedAttention | None
) -> TokenScorer:
    """A frozen model on one rank without FSDP, which would copy every parameter in each forward."""
    if attention is None and config.attention in FLASH_PACKAGES:
        model.set_attn_implementation(config.attention)
    return TokenScorer(model, attention).requires_grad_(False).eval().to(world.device)


def load_causal_lm(config: ModelConfig, world: World, *, trainable: bool) -> Any:
    """The model on the CPU; without weights on every rank but 0.

    Policy and reference compute in the same dtype through the same code, however each is stored.
    """
    name = resolve_model(config.name_or_path)
    stored = config.policy_dtype
    if not trainable:
        stored = world.share_from_main(frozen_dtype(config) if world.is_main else "")
    options: dict[str, Any] = {
        "dtype": getattr(torch, stored),
        "attention": config.attention,
        "revision": config.revision,
    }
    if not world.is_main:
        return build_empty(name, **options)
    return load_model(name, archive=config.archive, **options)


def build_scorer(
    model: Any,
    config: ModelConfig,
    world: World,
    *,
    trainable: bool,
    attention: PackedAttention | None = None,
    activation_checkpointing: bool = False,
    compile: bool = False,
    liger: bool = False,
) -> TokenScorer:
    """A loaded model as a scorer: sharded, its weights sent to the other ranks.

    Args:
        model: What `load_causal_lm` returned.
        config: Its options.
        world: Whoever computes.
        trainable: False for a reference.
        attention: What computes packed rows; None for padded ones.
        activation_checkpointing: Recompute activations in the backward.
        compile: Compile each block.
        liger: Norms and SwiGLU layers by Liger's kernels.
    """
    if attention is None and config.attention in FLASH_PACKAGES:
        model.set_attn_implementation(config.attention)
    if liger:
        replace_layers(model)
    scorer = TokenScorer(model, attention)
    weights = scorer.state_dict() if world.is_main else {}
    parallelize(
        scorer,
        world.mesh,
        compute_dtype=getattr(torch, config.compute_dtype),
        block_name=config.block_name,
        activation_checkpointing=activation_checkpointing,
        compile=compile,
        trainable=trainable,
    )
    send_weights(scorer, weights)
    return scorer
