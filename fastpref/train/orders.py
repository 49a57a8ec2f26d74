"""The order in which a run reads its rows."""

import logging
from collections.abc import Sequence

import numpy as np

from fastpref.batches.mixed_order import MixedOrder
from fastpref.batches.order import GlobalOrder
from fastpref.config import DataConfig
from fastpref.data.encode import PreferenceSplit
from fastpref.errors import DataError

logger = logging.getLogger("fastpref")


def build_train_order(
    train: PreferenceSplit,
    options: DataConfig,
    *,
    seed: int,
    batch_size: int,
    n_epochs: int | None,
    n_examples: int | None,
) -> GlobalOrder:
    """The order of the training rows: all datasets together, or mixed by `data.shares`.

    Raises:
        ConfigError: the run would have no step.
        DataError: a dataset that has a share has no rows left.
    """
    if options.shares is not None:
        _check_sources(train, options.shares)
        return MixedOrder(
            train.groups,
            sources=np.repeat(np.arange(len(train.sizes)), train.sizes),
            shares=options.shares,
            batch_size=batch_size,
            seed=seed,
            n_epochs=n_epochs,
            n_examples=n_examples,
            drop_last=options.drop_last,
        )
    return GlobalOrder(
        train.groups,
        batch_size=batch_size,
        seed=seed,
        n_epochs=n_epochs,
        n_examples=n_examples,
        drop_last=options.drop_last,
        order=options.order,
        num_prompts=train.num_prompts,
    )


def _check_sources(train: PreferenceSplit, shares: Sequence[float]) -> None:
    if len(train.sizes) == len(shares):
        return
    raise DataError(
        f"data.shares has {len(shares)} shares, and rows to train on are left of "
        f"{len(train.sizes)} datasets only, {', '.join(train.audit.sources)}: every row of the "
        "others is a copy of one in an earlier dataset; leave these out with their shares, or set "
        "data.deduplicate=false"
    )


def build_eval_order(
    held_out: PreferenceSplit, options: DataConfig, *, seed: int, batch_size: int, n_examples: int
) -> GlobalOrder:
    """The order of held-out rows, of which the first ones are evaluated; shares have no effect."""
    return GlobalOrder(
        held_out.groups,
        batch_size=batch_size,
        seed=seed,
        n_epochs=1,
        n_examples=n_examples,
        drop_last=False,
        order=options.order,
        num_prompts=held_out.num_prompts,
    )


def log_mix(order: GlobalOrder, names: Sequence[str]) -> list[str]:
    """Log how many passes a mix by shares makes over each source.

    Returns:
        The logged lines; none without shares.
    """
    if not isinstance(order, MixedOrder):
        return []
    lines = [
        f"data.shares: an epoch has {order.examples_per_epoch:,} examples, the run "
        f"{order.num_examples:,}"
    ]
    in_epoch, in_run = order.mix(order.examples_per_epoch), order.mix(order.num_examples)
    for name, epoch, run in zip(names, in_epoch, in_run, strict=True):
        lines.append(
            f"  {name}: {epoch.num_rows:,} rows, share {epoch.share:.4g}, passed "
            f"{epoch.passes:.3g} times in an epoch, {run.passes:.3g} times in the run"
        )
    for line in lines:
        logger.info(line)
    return lines
