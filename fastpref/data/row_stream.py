"""Checked rows of a source, one at a time: what `datasets` writes to its cache."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import datasets

from fastpref.data.built_in import SOURCES
from fastpref.data.pair_tracker import PairTracker, row_remarks
from fastpref.data.readers import read_records
from fastpref.data.row_values import RowError
from fastpref.data.rows import MALFORMED, fields_read, make_row, parse_row
from fastpref.errors import DataError

FEATURES = datasets.Features(
    {
        "form": datasets.Value("string"),
        "prompt": datasets.Value("string"),
        "chosen": datasets.Value("string"),
        "rejected": datasets.Value("string"),
        "tools": datasets.Value("string"),
        "chosen_weights": datasets.List(datasets.Value("float64")),
        "rejected_weights": datasets.List(datasets.Value("float64")),
        "weights_digest": datasets.Value("string"),
        # null: the chosen response of the prompt's last row
        "sft_target": datasets.Value("string"),
        "row": datasets.Value("int64"),
        # ascending by first appearance of the prompt, those of rows to drop included; -1: none
        "group": datasets.Value("int64"),
        # equal for equal prompts and for equal pairs, of any source
        "prompt_hash": datasets.Value("int64"),
        "pair_hash": datasets.Value("int64"),
        "remarks": datasets.Value("int32"),
        "drop": datasets.Value("string"),
        # the message of a malformed row
        "note": datasets.Value("string"),
        # columns of the file that are read in no row up to this one, each in the first that has it
        "unread": datasets.List(datasets.Value("string")),
    }
)


def generate_rows(
    *,
    name: str,
    split: str,
    path: str | None,
    cache_dir: str | None,
    state: str,
    weighted: bool,
    paired: bool,
    on_error: str,
    strict: bool,
    allow_roles: bool,
) -> Iterator[dict[str, Any]]:
    """Checked rows of a source, those to drop included; what `datasets` writes to its cache.

    All arguments are plain values, because the cache is found by them; `state` is there for
    nothing else.
    """
    source = path or SOURCES[name].origin
    tracker = PairTracker()
    known: set[str] = set()
    number = 0
    for number, record in source_records(name, split, Path(path) if path else None, cache_dir):
        message = ""
        try:
            if isinstance(record, RowError):
                raise record
            row = parse_row(record, weighted=weighted, allow_roles=allow_roles)
        except RowError as error:
            message = error.at(source, number)
            if on_error == "raise":
                raise DataError(message) from None
            row = make_row(drop=MALFORMED)
        if strict and row["drop"] not in ("", MALFORMED):
            raise DataError(f"{source}:{number}: {row['drop']} (data.strict=true)")
        noted = tracker.add(row, paired=paired)
        unread = []
        if path is not None and row["drop"] != MALFORMED:
            read = fields_read(row, weighted=weighted)
            columns = [column.encode(errors="backslashreplace").decode() for column in record]
            unread = [column for column in columns if column not in known and column not in read]
            known.update(unread)
        yield {
            **row,
            # only a built-in dataset says what to imitate: a file's other fields are ignored
            "sft_target": _nonblank(record.get("sft_target")) if path is None else None,
            "row": number,
            "group": noted.group,
            "prompt_hash": noted.prompt_hash,
            "pair_hash": noted.pair_hash,
            "remarks": int(noted.remarks | row_remarks(row)),
            "note": message,
            "unread": unread,
        }
    if number == 0:
        raise DataError(f"0 rows in split {split!r} of {source}")


def source_records(
    name: str, split: str, path: Path | None, cache_dir: str | None
) -> Iterator[tuple[int, Any]]:
    """Records of a file or a built-in dataset as they come, each with its number from 1.

    In the place of a line that is no JSON stands a `RowError`.

    Raises:
        DataError: the source cannot be read.
    """
    if path is not None:
        yield from read_records(path)
    else:
        yield from enumerate(SOURCES[name].rows(split, cache_dir), start=1)


def _nonblank(text: str | None) -> str | None:
    return text if text and text.strip() else None
