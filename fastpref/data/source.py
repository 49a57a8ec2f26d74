"""A named source of preference rows -> checked rows in one form, cached by `datasets`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc

from fastpref.checks import hint, listed
from fastpref.data.built_in import SOURCES
from fastpref.data.cache import cache_errors, code_digest, file_state, progress_bars
from fastpref.data.counts import AuditCounts, check_counts, count_rows
from fastpref.data.options import DataOptions, ReadOptions
from fastpref.data.readers import SUFFIXES
from fastpref.data.row_stream import FEATURES, generate_rows, source_records
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
    fingerprint: str
    """Changes with the source, the options and the code that reads."""
    counts: AuditCounts
    num_prompts: int
    """Different prompts of the source, those of rows left out included."""
    path: Path | None
    """The file; None for a built-in dataset."""
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
        for number, record in source_records(
            self.name, self.counts.split, self.path, self.cache_dir
        ):
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
            find_source(name, split, options.base_data_dir)


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
    return [
        load_rows(
            name,
            split,
            options.read,
            base_data_dir=options.base_data_dir,
            cache_dir=options.cache_dir,
            quiet=quiet,
        )
        for name in options.names
    ]


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
    name: str,
    split: str,
    options: ReadOptions,
    *,
    base_data_dir: str | None,
    cache_dir: str | None,
    quiet: bool,
) -> Rows:
    """Read and check one source, or take the result of an earlier reading from the cache.

    Args:
        name, split, base_data_dir: See `find_source`.
        options, quiet: How to read; whether without progress bar.
        cache_dir: Of `datasets`; None for its default.

    Raises:
        DataError: the source is missing, a row breaks a rule (file:row: field), or too few rows
            are left.
    """
    path = find_source(name, split, base_data_dir)
    source = str(path) if path else SOURCES[name].origin
    origin = read_origin(path) if path and options.weighted else None
    state = file_state(path) if path else ""
    with progress_bars(quiet), cache_errors(cache_dir):
        dataset = datasets.Dataset.from_generator(
            generate_rows,
            features=FEATURES,
            cache_dir=cache_dir,
            split=datasets.NamedSplit(split),
            gen_kwargs={
                "name": name,
                "split": split,
                "path": str(path) if path else None,
                "cache_dir": cache_dir,
                "state": code_digest("data") + state,
                "weighted": options.weighted,
                "paired": options.paired,
                "on_error": options.on_error,
                "strict": options.strict,
                "allow_roles": options.allow_roles,
            },
        )
    if origin is not None:
        check_complete(source, len(dataset), origin)
    counts, kept = count_dataset(dataset, source, split)
    check_counts(counts, max_dropped=options.max_dropped)
    unread = pc.list_flatten(dataset.with_format("arrow")["unread"][:]).to_pylist()
    return Rows(
        name=name,
        source=source,
        dataset=dataset if len(kept) == len(dataset) else dataset.select(kept),
        fingerprint=dataset._fingerprint,
        counts=replace(counts, unread={source: unread} if unread else {}),
        num_prompts=int(np.max(dataset.with_format("numpy")["group"][:])) + 1,
        path=path,
        state=state,
        cache_dir=cache_dir,
        origin=origin,
    )


def count_dataset(
    dataset: datasets.Dataset, source: str, split: str
) -> tuple[AuditCounts, np.ndarray]:
    """`count_rows` on the columns `drop note row group remarks` of a dataset."""
    columns = dataset.select_columns(["drop", "note", "row", "group", "remarks"])
    table = columns.with_format("arrow")[:]
    return count_rows(
        split=split,
        source=source,
        drop=table["drop"].to_pylist(),
        note=table["note"].to_pylist(),
        row=table["row"].to_numpy(),
        group=table["group"].to_numpy(),
        remarks=table["remarks"].to_numpy(),
    )
