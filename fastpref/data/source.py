"""A named source of preference rows -> checked rows in one form, cached by `datasets`."""

import json
import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from fastpref.data.cache import cache_errors, code_digest, progress_bars
from fastpref.data.counts import AuditCounts, check_counts, count_rows
from fastpref.data.files import Location, find_source
from fastpref.data.hub import hub_splits
from fastpref.data.options import DataOptions, ReadOptions
from fastpref.data.places import place_of, places_of
from fastpref.data.row_stream import FEATURES, generate_rows, source_records
from fastpref.data.weights_file import WeightsOrigin, check_complete, read_origin
from fastpref.errors import DataError

logger = logging.getLogger("fastpref")

SPLITS = ("train", "test")
EXAMPLE_CHARACTERS = 160
"""Of each part of the row that the log shows."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The checked rows of one source, those to drop left out."""

    name: str
    source: str
    """The file or files, the hub name, or `planted`."""
    dataset: datasets.Dataset
    """Columns as `FEATURES`."""
    fingerprint: str
    """Changes with the source, the options and the code that reads."""
    counts: AuditCounts
    num_prompts: int
    """Different prompts of the source, those of rows left out included."""
    location: Location
    """Where it lies."""
    state: str
    """Of its files when they were read, see `file_state`."""
    cache_dir: str | None
    origin: WeightsOrigin | None
    """What is known of the weights in a file that `task=estimate_weights` wrote."""

    def place(self, index: int) -> str:
        """The file and the line of a row of `dataset`, "words/train.jsonl:17"."""
        return place_of(self.location.files, self.dataset[index]["row"])

    @property
    def has_chats(self) -> bool:
        """Whether any row is one of messages."""
        forms = self.dataset.with_format("arrow")["form"][:]
        return bool(pc.any(pc.equal(forms, "chat")).as_py())

    def records(self) -> Iterator[dict[str, Any]]:
        """The record that each row of `dataset` was made of, with all its fields.

        Raises:
            DataError: the file is no longer the one that was read.
        """
        numbers = iter(self.dataset["row"])
        wanted = next(numbers, None)
        self._check_unchanged()
        for number, record in source_records(self.location, self.cache_dir):
            if number == wanted:
                yield record
                wanted = next(numbers, None)
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        try:
            is_same = self.location.state(self.cache_dir) == self.state
        except DataError:
            is_same = False
        if not is_same:
            raise DataError(
                f"{self.source}: the file was changed after its rows were read; start again"
            )


def check_sources(options: DataOptions, splits: Sequence[str] = SPLITS) -> None:
    """See that every dataset has its files, before anything heavy is loaded.

    Raises:
        DataError: the path, what was expected, what lies there.
    """
    locations = [
        find_source(name, split, options.base_data_dir, options.split_names)
        for name in options.names
        for split in splits
    ]
    if all(location.is_built_in for location in locations):
        for key, value in (("columns", options.read.columns), ("split_names", options.split_names)):
            if value:
                raise DataError(
                    f"data.{key} is for files and data sets of the hub; all of datasets="
                    f"[{','.join(options.names)}] are built in"
                )


def available_splits(options: DataOptions) -> list[str]:
    """The splits that every dataset has.

    Raises:
        DataError: none.
    """
    splits, errors = [], []
    for split in SPLITS:
        try:
            for name in options.names:
                _check_split(name, split, options)
            splits.append(split)
        except DataError as error:
            errors.append(error)
    if not splits:
        raise errors[0]
    return splits


def read_rows(options: DataOptions, split: str, *, quiet: bool) -> list[Rows]:
    """Read and check the rows of all datasets; needs neither tokenizer nor model.

    Raises:
        DataError: a source is missing, a row breaks a rule, or too few rows are left.
    """
    locations = [
        find_source(name, split, options.base_data_dir, options.split_names)
        for name in options.names
    ]
    return [
        load_rows(location, options.read, cache_dir=options.cache_dir, quiet=quiet)
        for location in locations
    ]


def load_rows(
    location: Location, options: ReadOptions, *, cache_dir: str | None, quiet: bool
) -> Rows:
    """Read and check one source, or take the result of an earlier reading from the cache.

    Args:
        location: Where it lies.
        options, quiet: How to read; whether without progress bar.
        cache_dir: Of `datasets`; None for its default.

    Raises:
        DataError: the source is missing, a row breaks a rule (file:row: field), or too few rows
            are left.
    """
    source, split = location.source, location.split
    is_file = len(location.paths) == 1
    origin = read_origin(Path(source)) if is_file and options.weighted else None
    with progress_bars(quiet), cache_errors(cache_dir):
        state = location.state(cache_dir)
        dataset = datasets.Dataset.from_generator(
            generate_rows,
            features=FEATURES,
            cache_dir=cache_dir,
            split=datasets.NamedSplit(split),
            gen_kwargs={
                "location": location,
                "cache_dir": cache_dir,
                "state": code_digest("data") + state,
                # judged afterwards, whatever the cache holds
                "options": replace(options, max_dropped=0.0),
            },
        )
    if origin is not None:
        check_complete(source, len(dataset), origin)
    counts, kept = count_dataset(dataset, location)
    check_counts(counts, max_dropped=options.max_dropped)
    unread = pc.list_flatten(dataset.with_format("arrow")["unread"][:]).to_pylist()
    return Rows(
        name=location.name,
        source=source,
        dataset=dataset if len(kept) == len(dataset) else dataset.select(kept),
        fingerprint=dataset._fingerprint,
        counts=replace(counts, unread={source: unread} if unread else {}),
        num_prompts=int(np.max(dataset.with_format("numpy")["group"][:])) + 1,
        location=location,
        state=state,
        cache_dir=cache_dir,
        origin=origin,
    )


def count_dataset(dataset: datasets.Dataset, location: Location) -> tuple[AuditCounts, np.ndarray]:
    """`count_rows` on the columns `drop note row group remarks` of a dataset."""
    columns = dataset.select_columns(["drop", "note", "row", "group", "remarks"])
    table = columns.with_format("arrow")[:]
    return count_rows(
        split=location.split,
        source=location.source,
        drop=table["drop"].to_pylist(),
        note=table["note"].to_pylist(),
        places=places_of(location.files, table["row"].to_numpy()),
        group=table["group"].to_numpy(),
        remarks=table["remarks"].to_numpy(),
    )


def log_layouts(sources: Sequence[Rows]) -> None:
    """Say how the rows of each source were recognised, with the first row of each data set."""
    shown: dict[str, str] = {}
    for rows in sources:
        if rows.location.is_built_in:
            continue
        row = rows.dataset[0]
        lines = [f"{rows.counts.split}: {rows.source}: rows of {row['layout']}"]
        if shown.get(rows.name) != row["layout"]:
            parts = {field: example_text(row, field) for field in ("prompt", "chosen", "rejected")}
            lines += [f"  {field}: {text}" for field, text in parts.items() if text]
            shown[rows.name] = row["layout"]
        logger.info("\n".join(lines))


def example_text(row: dict[str, Any], field: str) -> str:
    """A part of a checked row, its middle left out where long; messages with their roles."""
    text: str = row[field]
    if row["form"] == "chat":
        messages = json.loads(text)
        said = (message.get("content") or json.dumps(message) for message in messages)
        text = " ".join(f"[{m['role']}] {part}" for m, part in zip(messages, said, strict=True))
    if len(text) > EXAMPLE_CHARACTERS:
        half = EXAMPLE_CHARACTERS // 2
        text = f"{text[:half]} … {text[-half:]}"
    return repr(text) if text else ""


def _check_split(name: str, split: str, options: DataOptions) -> None:
    """See that a split is there.

    Raises:
        DataError: it is not.
    """
    location = find_source(name, split, options.base_data_dir, options.split_names)
    if location.is_hub and location.split_there not in (found := hub_splits(name)):
        raise DataError(f"datasets: {name} has no split {location.split_there!r}, only {found}")
