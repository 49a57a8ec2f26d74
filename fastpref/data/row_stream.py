"""Generator of a source's checked rows, which `datasets` writes to its cache."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import datasets

from fastpref.data.layouts.layout_reader import LayoutReader
from fastpref.data.layouts.recognition import AmbiguousRowError, Layout
from fastpref.data.layouts.row_values import RowError, refusing_depth
from fastpref.data.layouts.rows import DIGEST_FIELD, MALFORMED, WEIGHT_FIELDS, make_row
from fastpref.data.options import ReadOptions
from fastpref.data.pair_tracker import Noted, PairTracker, row_remarks
from fastpref.data.places import LINES, place_of
from fastpref.data.sources.built_in import SOURCES
from fastpref.data.sources.files import Location
from fastpref.data.sources.hub import hub_records
from fastpref.data.sources.readers import read_records
from fastpref.errors import DataError

FEATURES = datasets.Features(
    {
        # `Layout.what`; "" for a malformed row
        "layout": datasets.Value("string"),
        "form": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "chosen": datasets.Value("string"),
        "rejected": datasets.Value("string"),
        "tools": datasets.Value("string"),
        "chosen_weights": datasets.List(datasets.Value("float64")),
        "rejected_weights": datasets.List(datasets.Value("float64")),
        "weights_digest": datasets.Value("string"),
        "fields": datasets.List(datasets.Value("string")),
        # null: the chosen response of the prompt's last row
        "sft_target": datasets.Value("string"),
        # row number as in `places`
        "row": datasets.Value("int64"),
        # number of the prompt by first appearance, dropped rows included; -1: no prompt
        "group": datasets.Value("int64"),
        # equal for equivalent prompts and for equal pairs, of any source
        "prompt_hash": datasets.Value("int64"),
        "pair_hash": datasets.Value("int64"),
        "remarks": datasets.Value("int32"),
        "drop": datasets.Value("string"),
        # error message of a malformed row
        "note": datasets.Value("string"),
        # unread columns of the file, each listed only in the first row with a value in it
        "unread": datasets.List(datasets.Value("string")),
    }
)

NO_VALUE: tuple[Any, ...] = (None, "", [], {})
"""What columns hold that are of no use to a row, such as the images of a dataset of texts."""


def generate_rows(
    *, location: Location, cache_dir: str | None, state: str, options: ReadOptions
) -> Iterator[dict[str, Any]]:
    """Yield the checked rows of a source, including those to drop, with the columns `FEATURES`.

    The arguments are plain values because the cache key is computed from them; `state` is used
    only for that key.

    Raises:
        DataError: the source cannot be read or has no rows, or a row breaks a rule.
    """
    layouts = LayoutReader(
        {} if location.is_built_in else options.columns,
        single=options.single,
        weighted=options.weighted,
        allow_roles=options.allow_roles,
    )
    left_out = [column for column, as_field in options.columns.items() if as_field is None]
    unread_of = UnreadColumns(layouts, weighted=options.weighted, left_out=left_out)
    tracker = PairTracker()
    number = 0
    for number, record in source_records(location, cache_dir):
        message, what, unread = "", "", list[str]()
        place = place_of(location.files, number)
        try:
            if isinstance(record, RowError):
                raise record
            row, layout = layouts.parse(record)
            with refusing_depth():
                noted = tracker.add(row, paired=options.paired)
        except AmbiguousRowError as error:
            raise DataError(error.at(place)) from None
        except RowError as error:
            message = error.at(place)
            if options.on_error == "raise":
                raise DataError(message) from None
            row, noted = make_row(drop=MALFORMED), Noted(-1)
        else:
            what = layout.what
            unread = [] if location.is_built_in else unread_of.add(record, layout)
        if options.strict and row["drop"] not in ("", MALFORMED):
            raise DataError(f"{place}: {row['drop']} (data.strict=true)")
        yield {
            **row,
            "layout": what,
            # set by built-in datasets only: a column of that name in a file is ignored
            "sft_target": _nonblank(record.get("sft_target")) if location.is_built_in else None,
            "row": number,
            "group": noted.group,
            "prompt_hash": noted.prompt_hash,
            "pair_hash": noted.pair_hash,
            "remarks": int(noted.remarks | row_remarks(row)),
            "note": message,
            "unread": unread,
        }
    if number == 0:
        raise DataError(f"0 rows in split {location.split_there!r} of {location.source}")


class UnreadColumns:
    """Finds columns of a source that have values and that no row reads, except those left out by
    `data.columns`."""

    def __init__(
        self, layouts: LayoutReader, *, weighted: bool, left_out: Sequence[str] = ()
    ) -> None:
        self._layouts = layouts
        self._weights = (*WEIGHT_FIELDS, DIGEST_FIELD) if weighted else ()
        self._known = set(left_out)

    def add(self, record: dict[str, Any], layout: Layout) -> list[str]:
        """Unread columns with values in a record that were not returned for an earlier one."""
        read = {*self._layouts.columns_read(layout), *self._weights}
        filled = [column for column, value in record.items() if value not in NO_VALUE]
        columns = [column.encode(errors="backslashreplace").decode() for column in filled]
        unread = [column for column in columns if column not in self._known | read]
        self._known.update(unread)
        return unread


def source_records(location: Location, cache_dir: str | None) -> Iterator[tuple[int, Any]]:
    """Raw records of a source, each with its row number (see `places`).

    A record that cannot be decoded is given as a `RowError`.

    Raises:
        DataError: the source cannot be read.
    """
    for i, path in enumerate(location.paths):
        for line, record in read_records(Path(path)):
            yield i * LINES + line, record
    if location.is_hub:
        yield from hub_records(location.name, location.hub_config, location.split_there, cache_dir)
    elif location.is_built_in:
        rows = SOURCES[location.name].rows(location.split, cache_dir)
        yield from enumerate(rows, start=1)


def _nonblank(text: str | None) -> str | None:
    return text if text and text.strip() else None
