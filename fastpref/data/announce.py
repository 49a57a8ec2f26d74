"""Log messages about a run's rows: their layouts, held-out prompts and duplicates."""

import json
import logging
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np

from fastpref.checks import both_ends, listed, share_of
from fastpref.config.data import SPLITS
from fastpref.data.options import DataOptions
from fastpref.data.parts import check_sources, own_parts
from fastpref.data.source import Rows, load_rows, read_rows

logger = logging.getLogger("fastpref")


class ReadSplits(NamedTuple):
    """Rows that were read, with messages about their layouts and about several files together."""

    rows: list[list[Rows]]
    """For each split, the rows of each dataset."""
    facts: list[str]
    warnings: list[str]


def read_splits(options: DataOptions, splits: Sequence[str], *, quiet: bool) -> ReadSplits:
    """Read and check the rows of some splits; log their layouts, held-out prompts and duplicates.

    Args:
        splits: train first.
        quiet: No progress bars, no log lines, and no messages in the result.

    Raises:
        DataError: see `read_rows`.
    """
    check_sources(options, splits)
    rows = [read_rows(options, split, quiet=quiet) for split in splits]
    if quiet:
        return ReadSplits(rows, [], [])
    every_part = [part for parts in rows for part in parts]
    log_layouts(every_part)
    division = list(describe_division(options, rows[0]))
    warnings = [*find_copied(options, splits, rows), *find_repetitions(rows)]
    for line in division:
        logger.info(line)
    for line in warnings:
        logger.warning(line)
    layouts = filter(None, map(describe_layout, every_part))
    return ReadSplits(rows, [*layouts, *division], warnings)


def read_files(options: DataOptions, *, quiet: bool) -> list[Rows]:
    """Read and check all existing splits, nothing held out and no copy left out.

    Raises:
        DataError: a dataset has no split; see `read_rows`.
    """
    rows = [load_rows(part, options, earlier=None, quiet=quiet) for part in own_parts(options)]
    if not quiet:
        log_layouts(rows)
    return rows


def log_layouts(sources: Sequence[Rows]) -> None:
    """Log the layout of each source, with an example row per dataset and layout."""
    shown: dict[str, str] = {}
    for rows in sources:
        lines = [describe_layout(rows)]
        if not lines[0]:
            continue
        row = rows.dataset[0]
        if shown.get(rows.name) != row["layout"]:
            parts = {field: example_text(row, field) for field in ("prompt", "chosen", "rejected")}
            lines += [f"  {field}: {text}" for field, text in parts.items() if text]
            shown[rows.name] = row["layout"]
        logger.info("\n".join(lines))


def describe_layout(rows: Rows) -> str:
    """The layout of a source's rows, and its files that are not read; "" for built-in data."""
    if rows.location.is_built_in:
        return ""
    others = rows.location.passed_over
    beside = f"; not read, as they come after it: {listed(others)}" if others else ""
    return f"{rows.counts.split}: {rows.source}: rows of {rows.dataset[0]['layout']}{beside}"


def example_text(row: dict[str, Any], field: str) -> str:
    """A field of a checked row, shortened in the middle if long; messages with their roles."""
    text: str = row[field]
    if row["form"] == "chat":
        messages = json.loads(text)
        said = (message.get("content") or json.dumps(message) for message in messages)
        text = " ".join(f"[{m['role']}] {part}" for m, part in zip(messages, said, strict=True))
    return repr(both_ends(text)) if text else ""


def describe_division(options: DataOptions, train: Sequence[Rows]) -> Iterator[str]:
    """With `data.test_fraction`: how many prompts of each dataset are held out."""
    fraction = options.held_out.fraction
    if not fraction:
        return
    called = f" {options.split_names['test']!r}" if "test" in options.split_names else ""
    for rows in train:
        if rows.division is None:
            yield f"data.test_fraction={fraction:g}: {rows.name} has a test split, taken as it is"
            continue
        _, test_prompts, _, test_rows = rows.division
        num_prompts = rows.division.train_prompts + test_prompts
        yield (
            f"data.test_fraction={fraction:g}: {rows.name} has no test split{called}: "
            f"{share_of(test_prompts, num_prompts)} prompts of {rows.source} are held out, with "
            f"{test_rows:,} rows"
        )


def find_copied(
    options: DataOptions, splits: Sequence[str], read: Sequence[Sequence[Rows]]
) -> Iterator[str]:
    """Warnings about datasets of which `data.deduplicate` leaves no row."""
    for split, parts in zip(splits, read, strict=True):
        for name in options.names:
            if name not in {rows.name for rows in parts}:
                yield (
                    f"{split}: every row of {name} is a copy of one of an earlier dataset and left "
                    "out (data.deduplicate=true)"
                )


def find_repetitions(splits: Sequence[Sequence[Rows]]) -> Iterator[str]:
    """Warnings about rows that another dataset of the same split has too, and about test prompts
    that the train split contains."""
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
    """Rows of a source whose hash others have: number, number of distinct hashes, first place."""
    if not others:
        return None
    own = _hashes(rows, column)
    is_repeated = np.isin(own, np.concatenate([_hashes(other, column) for other in others]))
    if not is_repeated.any():
        return None
    first = rows.place(int(np.argmax(is_repeated)))
    return int(is_repeated.sum()), len(np.unique(own[is_repeated])), first


def _hashes(rows: Rows, column: str) -> np.ndarray:
    return rows.dataset.select_columns([column]).with_format("arrow")[:][column].to_numpy()
