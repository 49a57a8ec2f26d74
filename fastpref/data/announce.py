"""What the log says of the rows of a run: their account, what is held out, what comes twice."""

import logging
from collections.abc import Iterator, Sequence
from typing import NamedTuple

import numpy as np

from fastpref.checks import share_of
from fastpref.data.options import DataOptions
from fastpref.data.source import SPLITS, Rows, check_sources, read_rows

logger = logging.getLogger("fastpref")


class ReadSplits(NamedTuple):
    """Rows that were read, and what of them concerns more than one file, in words."""

    rows: list[list[Rows]]
    """Of all datasets of each split."""
    facts: list[str]
    warnings: list[str]


def read_splits(options: DataOptions, splits: Sequence[str], *, quiet: bool) -> ReadSplits:
    """Read and check the rows of some splits, and say what of them concerns more than one file.

    Args:
        options: What the data depends on.
        splits: train first.
        quiet: Neither progress bars nor log lines, nor anything looked for to say.

    Raises:
        DataError: see `read_rows`.
    """
    check_sources(options, splits)
    rows = [read_rows(options, split, quiet=quiet) for split in splits]
    facts, warnings = list[str](), list[str]()
    if not quiet:
        facts += describe_division(options, rows[0])
        warnings += find_repetitions(rows)
    for line in facts:
        logger.info(line)
    for line in warnings:
        logger.warning(line)
    return ReadSplits(rows, facts, warnings)


def describe_division(options: DataOptions, train: Sequence[Rows]) -> Iterator[str]:
    """Which prompts are held out where `data.test_fraction` asks for it, dataset by dataset."""
    fraction = options.held_out.fraction
    if not fraction:
        return
    for rows in train:
        if rows.division is None:
            yield f"data.test_fraction={fraction:g}: {rows.name} has a test split, taken as it is"
            continue
        _, test_prompts, _, test_rows = rows.division
        num_prompts = rows.division.train_prompts + test_prompts
        yield (
            f"data.test_fraction={fraction:g}: {rows.name} has no test split: "
            f"{share_of(test_prompts, num_prompts)} prompts of {rows.source} are held out, with "
            f"{test_rows:,} rows"
        )


def find_repetitions(splits: Sequence[Sequence[Rows]]) -> Iterator[str]:
    """What a user may not expect to come twice: rows of one dataset in another of the same split,
    and held-out prompts that are trained on."""
    for parts in splits:
        for index, rows in enumerate(parts):
            earlier = parts[:index]
            if repeated := _repeated(rows, earlier, "pair_hash"):
                count, _, first = repeated
                others = ", ".join(other.source for other in earlier)
                yield (
                    f"{rows.counts.split}: {share_of(count, len(rows.dataset))} rows of "
                    f"{rows.source} are in {others} too (first: {first}); data.deduplicate=true "
                    "leaves copies out"
                )
    if len(splits) < len(SPLITS):
        return
    train, test = splits
    for rows in test:
        if repeated := _repeated(rows, train, "prompt_hash"):
            count, num_prompts, first = repeated
            yield (
                f"{rows.counts.split}: {share_of(num_prompts, rows.counts.prompts)} prompts of "
                f"{rows.source} are in the train split too ({count:,} rows, first: {first}): "
                "held-out numbers will be too good"
            )


def _repeated(rows: Rows, others: Sequence[Rows], column: str) -> tuple[int, int, str] | None:
    """Rows of a source whose hash others have: how many, how many different, where the first is."""
    if not others:
        return None
    own = _hashes(rows, column)
    is_repeated = np.isin(own, np.concatenate([_hashes(other, column) for other in others]))
    if not is_repeated.any():
        return None
    line = rows.dataset[int(np.argmax(is_repeated))]["row"]
    return int(is_repeated.sum()), len(np.unique(own[is_repeated])), f"{rows.source}:{line}"


def _hashes(rows: Rows, column: str) -> np.ndarray:
    return rows.dataset.select_columns([column]).with_format("arrow")[:][column].to_numpy()
