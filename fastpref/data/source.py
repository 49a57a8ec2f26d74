"""Read a named source into checked preference rows of one form, cached by `datasets`."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import datasets
import numpy as np
import pyarrow.compute as pc
from datasets.fingerprint import Hasher

from fastpref.data.cache import cache_errors, cache_folder, code_digest, made_whole, progress_bars
from fastpref.data.counts import AuditCounts, check_counts, count_rows
from fastpref.data.options import DataOptions
from fastpref.data.parts import Part, find_part
from fastpref.data.places import place_of, places_of
from fastpref.data.row_stream import FEATURES, generate_rows, source_records
from fastpref.data.selection import COPY, Division, Selection, select_rows
from fastpref.data.sources.files import Location
from fastpref.data.weights_file import WeightsOrigin, check_complete, read_origin
from fastpref.errors import DataError

NO_RESPONSE = ("", "[]")
"""An absent response, as text and as JSON messages."""


@dataclass(frozen=True, kw_only=True)
class Rows:
    """The checked rows of one source in one split, without those to drop."""

    name: str
    source: str
    """The file or files, the hub id, or `planted`."""
    dataset: datasets.Dataset
    """Columns as `FEATURES`."""
    dropped: datasets.Dataset
    """The split's dropped rows; `drop` is empty for copies."""
    fingerprint: str
    """Changes with the source, the options, the code that reads it and the selected rows."""
    counts: AuditCounts
    num_prompts: int
    """Distinct prompts of the source, including those of dropped rows."""
    location: Location
    """Location of the rows; of rows held out of the train split, that of the train split."""
    division: Division | None
    """Sizes of both sides if test prompts are held out of the train split."""
    state: str
    """`Location.state` when the rows were read."""
    cache_dir: str | None
    origin: WeightsOrigin | None
    """Origin of the token weights in a file that `task=estimate_weights` wrote."""

    def place(self, index: int) -> str:
        """File and line of a row of `dataset`, "words/train.jsonl:17"."""
        return place_of(self.location.files, self.dataset[index]["row"])

    @property
    def has_chats(self) -> bool:
        """Whether any row consists of chat messages."""
        forms = self.dataset.with_format("arrow")["form"][:]
        return bool(pc.any(pc.equal(forms, "chat")).as_py())

    def records(self) -> Iterator[dict[str, Any]]:
        """Reread the raw record of each row of `dataset`, with all its fields.

        Raises:
            DataError: the source has changed since its rows were read.
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


def read_rows(options: DataOptions, split: str, *, quiet: bool) -> list[Rows]:
    """Read and check the rows of all datasets; needs neither tokenizer nor model.

    Returns:
        The rows of each dataset, except those that `data.deduplicate` leaves empty.

    Raises:
        DataError: a source is missing, a row breaks a rule, or too few rows are left.
    """
    # locate all before reading any
    parts = [find_part(name, split, options) for name in options.names]
    earlier: set[int] | None = set() if options.deduplicate else None
    read = (load_rows(part, options, earlier=earlier, quiet=quiet) for part in parts)
    return [rows for rows in read if len(rows.dataset)]


def load_rows(part: Part, options: DataOptions, *, earlier: set[int] | None, quiet: bool) -> Rows:
    """Read and check one source, or take the result from the cache.

    Args:
        part: Location of its rows.
        earlier: See `select_rows`.
        quiet: Show no progress bar.

    Raises:
        DataError: the source is missing, a row breaks a rule (file:row: field), or too few rows
            are left.
    """
    location, split = part.location, part.split
    is_file = len(location.paths) == 1
    origin = read_origin(Path(location.source)) if is_file and options.read.weighted else None
    dataset, state = _checked_rows(location, options, quiet=quiet)
    if origin is not None:
        check_complete(location.source, len(dataset), origin)
    selection = select_rows(
        dataset,
        location.source,
        held_out=options.held_out if part.is_divided else None,
        is_test=split != location.split,
        earlier=earlier,
    )
    counts, kept = count_dataset(dataset, location, split, selection)
    has_copies = bool(selection.is_copy.any())
    check_counts(counts, max_dropped=options.read.max_dropped, has_earlier_rows=has_copies)
    unread = pc.list_flatten(dataset.with_format("arrow")["unread"][:]).to_pylist()
    return Rows(
        name=location.name,
        source=location.source,
        dataset=dataset if len(kept) == len(dataset) else dataset.select(kept),
        dropped=dataset.select(np.setdiff1d(selection.rows, kept)),
        fingerprint=selection.fingerprint(dataset),
        counts=replace(counts, unread={location.source: unread} if unread else {}),
        num_prompts=int(np.max(dataset.with_format("numpy")["group"][:])) + 1,
        location=location,
        division=selection.division,
        state=state,
        cache_dir=options.cache_dir,
        origin=origin,
    )


def _checked_rows(
    location: Location, options: DataOptions, *, quiet: bool
) -> tuple[datasets.Dataset, str]:
    """All rows of a source, including those to drop, in the cache of `datasets`, and the source's
    `Location.state`."""
    cache_dir = options.cache_dir
    with progress_bars(quiet), cache_errors(cache_dir):
        state = location.state(cache_dir)
        read = {
            # no part of the cache key: these files are not read
            "location": location._replace(passed_over=()),
            "cache_dir": cache_dir,
            "state": code_digest("data") + state,
            # max_dropped is no part of the key: it is checked after reading
            "options": replace(options.read, max_dropped=0.0),
        }
        # one folder per key
        folder = Path(cache_folder(cache_dir), f"fastpref-{Hasher.hash(read)}")
        dataset = made_whole(
            folder.with_name(f"{folder.name}.sums"),
            lambda: datasets.Dataset.from_generator(
                generate_rows,
                features=FEATURES,
                cache_dir=str(folder),
                split=datasets.NamedSplit(location.split),
                gen_kwargs=read,
            ),
            files=folder.name,
            read=_open_files,
        )
    # a fingerprint of our own, equal whether the rows were opened or made
    named = {"info": dataset.info, "split": dataset.split, "fingerprint": folder.name}
    return datasets.Dataset(dataset.data, **named), state


def _open_files(paths: Sequence[Path]) -> datasets.Dataset:
    """Open the rows in a cache folder of `datasets` without writing to it: it may be read-only."""
    arrow = [str(path) for path in paths if path.suffix == ".arrow"]
    return datasets.concatenate_datasets(list(map(datasets.Dataset.from_file, arrow)))


def count_dataset(
    dataset: datasets.Dataset, location: Location, split: str, selection: Selection | None = None
) -> tuple[AuditCounts, np.ndarray]:
    """`count_rows` on the columns `drop note row group remarks` of a dataset.

    Args:
        dataset: All rows of a source.
        location, split: The source, and the split to count.
        selection: The rows of the split; None: all.

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
        source=location.source,
        drop=drop,
        note=table["note"].to_pylist(),
        places=places_of(location.files, table["row"].to_numpy()),
        group=table["group"].to_numpy(),
        remarks=table["remarks"].to_numpy(),
    )
    return counts, kept if selection is None else selection.rows[kept]


def sft_targets(dataset: datasets.Dataset) -> datasets.Dataset:
    """The last row of each prompt, in the order in which prompts first appear; rows with a single
    response are all kept."""
    # the first row decides, as a source has one layout; a pair with an empty response was dropped
    if dataset[0]["rejected"] in NO_RESPONSE:
        return dataset
    groups = dataset.with_format("numpy")["group"][:]
    _, first = np.unique(groups, return_index=True)
    _, last_from_end = np.unique(groups[::-1], return_index=True)
    return dataset.select((len(groups) - 1 - last_from_end)[np.argsort(first)])
