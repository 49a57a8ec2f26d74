"""A run put together: data, models, optimizer and log, everything the loop works on."""

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastpref.audit import describe_example
from fastpref.batch import EncodedRow, PackedBatch, pad_rows
from fastpref.checkpoint import create_run_dir
from fastpref.config import Config, ModelConfig
from fastpref.datasets import check_sources, read_rows
from fastpref.distributed import World, main_first
from fastpref.encode import PreferenceSplit, load_split
from fastpref.errors import ConfigError
from fastpref.metrics import MetricsLog
from fastpref.model import TokenScorer, check_head
from fastpref.objectives import Objective, build_objective
from fastpref.optim import build_optimizer, build_scheduler
from fastpref.parallelize import parallelize, send_weights
from fastpref.pretrained import (
    build_empty,
    load_model,
    load_tokenizer,
    pad_token_id,
    read_vocab_size,
    resolve_model,
)
from fastpref.reference import ScoreFn, build_score_fn
from fastpref.sampler import GlobalOrder
from fastpref.trackers import build_trackers

logger = logging.getLogger("fastpref")


@dataclass(frozen=True, slots=True, kw_only=True)
class Split:
    """A data split, the order it is visited in, and how its rows become batches."""

    data: PreferenceSplit
    order: GlobalOrder
    pad_token_id: int
    num_tokens: np.ndarray
    """(rows,) real tokens of each row: prompt + chosen, and prompt + rejected for a pair."""

    def batch(self, rows: np.ndarray, device: torch.device) -> PackedBatch:
        """The rows of that index as one padded micro-batch; none of them is a batch too."""
        columns = self.data.dataset[rows.tolist()] if len(rows) else {}
        encoded = [
            EncodedRow(*values)
            for values in zip(
                columns.get("prompt_ids", []),
                columns.get("chosen_ids", []),
                columns.get("rejected_ids", []),
                columns.get("chosen_weights", [None] * len(rows)),
                columns.get("rejected_weights", [None] * len(rows)),
                strict=True,
            )
        ]
        return pad_rows(encoded, pad_token_id=self.pad_token_id).to(device)


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
    score: ScoreFn
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


def load_data(config: Config, world: World) -> tuple[Split, Split | None, Any]:
    """Read and encode the train and test splits, rank 0 first so that the others find its cache.

    Rows are validated before the tokenizer is loaded, and everything before any model.
    """
    quiet = not world.is_main
    splits = ["train", "test"] if config.n_eval_examples else ["train"]
    check_sources(config, splits)
    main_first(world, "rows", lambda: [read_rows(config, split, quiet=quiet) for split in splits])
    name = resolve_model(config.model.tokenizer_name_or_path or config.model.name_or_path)
    tokenizer = load_tokenizer(name, config.model.revision)
    vocab_size = read_vocab_size(resolve_model(config.model.name_or_path), config.model.revision)

    def encode() -> list[PreferenceSplit]:
        return [
            load_split(config, split, tokenizer, vocab_size=vocab_size, quiet=quiet)
            for split in splits
        ]

    encoded = main_first(world, "encoded", encode)
    train_data = encoded[0]
    if world.is_main:
        logger.info(
            "one example, as the model sees it:\n%s", describe_example(train_data, tokenizer)
        )
    train_order = GlobalOrder(
        train_data.groups,
        batch_size=config.batch_size,
        seed=config.seed,
        n_epochs=config.n_epochs,
        n_examples=config.n_examples,
        drop_last=config.data.drop_last,
        order=config.data.order,
    )
    if world.is_main and train_order.warning:
        logger.warning(train_order.warning)
    train_split = _split(train_data, train_order, tokenizer)
    if not config.n_eval_examples:
        return train_split, None, tokenizer
    eval_order = GlobalOrder(
        encoded[1].groups,
        batch_size=config.eval_batch_size,
        seed=config.seed,
        n_epochs=1,
        n_examples=config.n_eval_examples,
        drop_last=False,
        order=config.data.order,
    )
    return train_split, _split(encoded[1], eval_order, tokenizer), tokenizer


def _split(data: PreferenceSplit, order: GlobalOrder, tokenizer: Any) -> Split:
    table = data.dataset.with_format("arrow")[:]
    lengths = {
        name: np.array([len(ids) for ids in table[f"{name}_ids"]], dtype=np.int64)
        for name in ("prompt", "chosen", "rejected")
    }
    num_tokens = lengths["prompt"] + lengths["chosen"]
    num_tokens += np.where(lengths["rejected"] > 0, lengths["prompt"] + lengths["rejected"], 0)
    return Split(
        data=data, order=order, pad_token_id=pad_token_id(tokenizer), num_tokens=num_tokens
    )


def build_run(config: Config, world: World) -> Run:
    """Everything a run needs, in the order in which mistakes are cheap to find: data, then models.

    Raises:
        FastprefError: whatever is wrong with the config, the data or the model.
    """
    objective = build_objective(config.loss)
    if world.is_main:
        announce(config, world, objective)
    train_split, eval_split, tokenizer = load_data(config, world)
    policy = load_scorer(
        config.model,
        world,
        trainable=True,
        activation_checkpointing=config.activation_checkpointing,
    )
    check_positions(policy, train_split, eval_split)
    reference = None
    if objective.needs_reference:
        reference = load_scorer(config.model, world, trainable=False)
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
        trackers=build_trackers(config, run_dir) if world.is_main else [],
    )
    return Run(
        config=config,
        world=world,
        run_dir=run_dir,
        tokenizer=tokenizer,
        train=train_split,
        eval=eval_split,
        objective=objective,
        policy=policy,
        reference=reference,
        score=build_score_fn(policy, reference, objective),
        optimizer=optimizer,
        scheduler=scheduler,
        log=log,
    )


def check_positions(policy: TokenScorer, *splits: Split | None) -> None:
    """Refuse sequences that run off a learned position table.

    Raises:
        ConfigError: naming the largest max_length that fits.
    """
    longest = max(split.data.audit.longest_tokens for split in splits if split is not None)
    if policy.num_positions is not None and longest > policy.num_positions:
        raise ConfigError(
            f"max_length: the longest sequence has {longest} tokens, the model has positions for "
            f"{policy.num_positions}; set max_length={policy.num_positions} or less"
        )


def load_scorer(
    config: ModelConfig,
    world: World,
    *,
    trainable: bool,
    activation_checkpointing: bool = False,
) -> TokenScorer:
    """A policy or a reference: loaded by rank 0, sharded, sent to the other ranks.

    Both compute in the same dtype through the same code; `reference_dtype` is how the reference is
    stored, by default the compute dtype itself.
    """
    stored = config.policy_dtype if trainable else config.reference_dtype or config.compute_dtype
    name = resolve_model(config.name_or_path)
    options: dict[str, Any] = {
        "dtype": getattr(torch, stored),
        "attention": config.attention,
        "revision": config.revision,
    }
    if world.is_main:
        scorer = TokenScorer(load_model(name, archive=config.archive, **options))
        check_head(scorer)
        weights = scorer.state_dict()
    else:
        scorer = TokenScorer(build_empty(name, **options))
        weights = {}
    parallelize(
        scorer,
        world.mesh,
        compute_dtype=getattr(torch, config.compute_dtype),
        block_name=config.block_name,
        activation_checkpointing=activation_checkpointing,
        trainable=trainable,
    )
    send_weights(scorer, weights)
    return scorer
