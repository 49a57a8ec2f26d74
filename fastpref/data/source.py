"""A named source of preference rows -> checked rows in one form, cached by `datasets`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow.compute as pc

from fastpref.checks import hint, listed
from fastpref.data.built_in import SOURCES
from fastpref.data.cache import cache_errors, code_digest, file_state, progress_bars
from fastpref.data.counts import AuditCounts, check_counts, count_rows
from fastpref.data.options import DataOptions
from fastpref.data.readers import SUFFIXES
from fastpref.data.row_stream import FEATURES, generate_rows, source_records
from fastpref.data.selection import COPY, Division, Selection, select_rows
from fastpref.data.weights_file import WeightsOrigin, check_complete, read_origin
from fastpref.errors import DataError

SPLITS = ("train", "test")


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The checked rows of one source, those to drop left out."""

    name: str
    source: str
    """The file, the hub name, or `planted`."""
    dataset: datasets.Dataset
    """Columns as `FEATURES`."""
    dropped: datasets.Dataset
    """The rows of the split that are left out, copies without a reason in `drop`."""
    fingerprint: str
    """Changes with the source, the options, the code that reads and which rows they are."""
    counts: AuditCounts
    num_prompts: int
    """Different prompts of the source, those of rows left out included."""
    path: Path | None
    """The file; None for a built-in dataset."""
    file_split: str
    """The split that the source calls them: train also where they are held out of it."""
    division: Division | None
    """How the prompts of a source without a test split are divided."""
    state: str
    """Of the file when it was read, see `file_state`."""
    cache_dir: str | None
    origin: WeightsOrigin | None
    """What is known of the weights in a file that `task=estimate_weights` wrote."""

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
        for number, record in source_records(self.name, self.file_split, self.path, self.cache_dir):
            if number == wanted:
                yield record
                wanted = next(numbers, None)
        self._check_unchanged()

    def _check_unchanged(self) -> None:
        if self.path is not None and not (
            self.path.is_file() and file_state(self.path) == self.state
        ):
            raise DataError(
                f"{self.path}: the file was changed after its rows were read; start again"
            )


def check_sources(options: DataOptions, splits: Sequence[str] = SPLITS) -> None:
    """See that every dataset has its files, before anything heavy is loaded.

    Raises:
        DataError: the path, what was expected, what lies there.
    """
    for name in options.names:
        for split in splits:
            find_part(name, split, options)


def available_splits(options: DataOptions) -> list[str]:
    """The splits that every dataset has.

    Raises:
        DataError: none.
    """
    splits, errors = [], []
    for split in SPLITS:
        try:
            for name in options.names:
                find_source(name, split, options.base_data_dir)
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
    check_sources(options, [split])
    earlier: set[int] | None = set() if options.deduplicate else None
    return [load_rows(name, split, options, earlier=earlier, quiet=quiet) for name in options.names]


class Part(NamedTuple):
    """Where the rows of a split of a dataset are."""

    path: Path | None
    """The file; None for a built-in dataset."""
    split: str
    """What the source calls it."""
    is_divided: bool = False
    """The file has the rows of both splits."""


def find_part(name: str, split: str, options: DataOptions) -> Part:
    """Where the rows of a split are: in a file of its own, or where nothing else is there and
    `data.test_fraction` is set, in that of the train split.

    Raises:
        DataError: no such dataset, see `find_source`.
    """
    train, test = SPLITS
    base_data_dir, is_divided = options.base_data_dir, False
    if split == test or options.held_out.fraction:
        try:
            find_source(name, test, base_data_dir)
        except DataError as error:
            is_divided = options.held_out.fraction > 0
            if not is_divided:
                # a dataset that is nowhere has no train split either, and this says so
                find_source(name, train, base_data_dir)
                raise DataError(f"{error}; or hold out prompts: data.test_fraction=0.05") from None
    own_split = train if is_divided else split
    return Part(find_source(name, own_split, base_data_dir), own_split, is_divided)


def find_source(name: str, split: str, base_data_dir: str | None) -> Path | None:
    """The file {base_data_dir}/{name}/{split}.*, or None for a built-in dataset.

    A local folder comes before a built-in dataset of the same name.

    Raises:
        DataError: neither exists; names what lies there instead.
    """
    folder = Path(base_data_dir).expanduser() / name if base_data_dir is not None else None
    if folder is not None and folder.is_dir():
        for suffix in SUFFIXES:
            if (folder / f"{split}{suffix}").is_file():
                return folder / f"{split}{suffix}"
        found = sorted(child.name for child in folder.iterdir())
        raise DataError(
            f"datasets: no file {folder / split}.jsonl (or .jsonl.gz, .parquet); found "
            f"{listed(found) or 'an empty folder'}{hint(f'{split}.jsonl', found)}"
        )
    if name in SOURCES:
        return None
    built_in = f"built in: {', '.join(SOURCES)}"
    if folder is None:
        raise DataError(
            f"datasets: no dataset {name!r}; {built_in}; a local folder DIR/{name} needs "
            f"base_data_dir=DIR{hint(name, SOURCES)}"
        )
    if not folder.parent.is_dir():
        raise DataError(f"base_data_dir: no folder {folder.parent}; expected it to hold {name}/")
    found = sorted(child.name for child in folder.parent.iterdir() if child.is_dir())
    raise DataError(
        f"datasets: no folder {folder}; expected {split}.jsonl, .jsonl.gz or .parquet in it; "
        f"folders there: {listed(found) or 'none'}; {built_in}"
        f"{hint(name, [*found, *SOURCES])}"
    )


def load_rows(
    name: str, split: str, options: DataOptions, *, earlier: set[int] | None, quiet: bool
) -> Rows:
    """Read and check one source, or take the result of an earlier reading from the cache.

    Args:
        name, split: Of the dataset.
        options, quiet: How to read; whether without progress bar.
        earlier: See `select_rows`.

    Raises:
        DataError: the source is missing, a row breaks a rule (file:row: field), or too few rows
            are left.
    """
    part = find_part(name, split, options)
    source = str(part.path) if part.path else SOURCES[name].origin
    origin = read_origin(part.path) if part.path and options.read.weighted else None
    state = file_state(part.path) if part.path else ""
    dataset = _checked_rows(name, part, state, options, quiet=quiet)
    if origin is not None:
        check_complete(source, len(dataset), origin)
    selection = select_rows(
        dataset,
        source,
        held_out=options.held_out if part.is_divided else None,
        is_test=split != part.split,
        earlier=earlier,
    )
    counts, kept = count_dataset(dataset, source, split, selection)
    check_counts(counts, max_dropped=options.read.max_dropped)
    unread = pc.list_flatten(dataset.with_format("arrow")["unread"][:]).to_pylist()
    return Rows(
        name=name,
        source=source,
        dataset=dataset if len(kept) == len(dataset) else dataset.select(kept),
        dropped=dataset.select(np.setdiff1d(selection.rows, kept)),
        fingerprint=selection.fingerprint(dataset),
        counts=replace(counts, unread={source: unread} if unread else {}),
        num_prompts=int(np.max(dataset.with_format("numpy")["group"][:])) + 1,
        path=part.path,
        file_split=part.split,
        division=selection.division,
        state=state,
        cache_dir=options.cache_dir,
        origin=origin,
    )


def _checked_rows(
    name: str, part: Part, state: str, options: DataOptions, *, quiet: bool
) -> datasets.Dataset:
    """All rows of a source, those to drop included, in the cache of `datasets`."""
    read, cache_dir = options.read, options.cache_dir
    with progress_bars(quiet), cache_errors(cache_dir):
        return datasets.Dataset.from_generator(
            generate_rows,
            features=FEATURES,
            cache_dir=cache_dir,
            split=datasets.NamedSplit(part.split),
            gen_kwargs={
                "name": name,
                "split": part.split,
                "path": str(part.path) if part.path else None,
                "cache_dir": cache_dir,
                "state": code_digest("data") + state,
                "weighted": read.weighted,
                "paired": read.paired,
                "on_error": read.on_error,
                "strict": read.strict,
                "allow_roles": read.allow_roles,
            },
        )


def count_dataset(
    dataset: datasets.Dataset, source: str, split: str, selection: Selection | None = None
) -> tuple[AuditCounts, np.ndarray]:
    """`count_rows` on the columns `drop note row group remarks` of a dataset.

    Args:
        dataset, source, split: Whose rows.
        selection: Which of them; None: all.

    Returns:
        The counts, and the indices in the dataset of the rows to keep.
    """
    columns = dataset.select_columns(["drop", "note", "row", "group", "remarks"])
    table = columns.with_format("arrow")[:]
    if selection is not None:
        table = table.take(selection.rows)
    drop = table["drop"].to_pylist()
    if selection is not None:
        drop = [
            COPY if copy else reason for copy, reason in zip(selection.is_copy, drop, strict=True)
        ]
    counts, kept = count_rows(
        split=split,
        source=source,
        drop=drop,
        note=table["note"].to_pylist(),
        row=table["row"].to_numpy(),
        group=table["group"].to_numpy(),
        remarks=table["remarks"].to_numpy(),
    )
    return counts, kept if selection is None else selection.rows[kept]


def sft_targets(dataset: datasets.Dataset) -> datasets.Dataset:
    """The last row of each prompt, in the order in which prompts appear first."""
    groups = dataset.with_format("numpy")["group"][:]
    _, first = np.unique(groups, return_index=True)
    _, last_from_end = np.unique(groups[::-1], return_index=True)
    return dataset.select((len(groups) - 1 - last_from_end)[np.argsort(first)])
