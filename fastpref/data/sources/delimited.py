"""Tables of text, .csv and .tsv: records of texts, by the names in the first line."""

import ast
import csv
import json
import sys
from collections.abc import Callable, Iterable, Iterator
from typing import Any

from fastpref.checks import listed
from fastpref.data.layouts.row_values import RowError
from fastpref.data.layouts.rows import WEIGHT_FIELDS
from fastpref.data.layouts.turns import WRITTEN_MESSAGES, are_messages
from fastpref.errors import DataError

SEPARATORS = {"csv": ",", "tsv": "\t"}


def read_delimited(
    lines: Iterable[bytes], separator: str, name: str
) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Records of a table as RFC 4180 writes it, UTF-8; a value in quotes may have line breaks.

    Every value is a text as it stands: 5, NA and nothing at all are texts too. Messages and token
    weights, for which a table has no lists, are what their JSON text stands for, messages also as
    Python prints them, which is what pandas writes. A column without a name, as the index of
    pandas has none, is left out.

    Args:
        lines: Of the file, without byte order mark.
        separator: What stands between two values.
        name: Of the file, for messages.

    Yields:
        The line that a record begins in, counted from 1, and the record; a `RowError` in its place
        where it is none.

    Raises:
        DataError: the first line does not name the columns.
    """
    # the bound of 128 KiB is one of the whole process
    csv.field_size_limit(sys.maxsize)
    # a byte that is no UTF-8 is told of where it stands
    texts = (line.decode("utf-8", "surrogateescape") for line in lines)
    rows = csv.reader(texts, delimiter=separator, strict=True)
    try:
        header = next(filter(None, rows), [])
    except csv.Error as error:
        raise DataError(f"{name}:1: the names of the columns cannot be read: {error}") from None
    _check_header(header, separator, name)
    while True:
        number = rows.line_num + 1
        try:
            row = next(rows)
        except StopIteration:
            return
        except csv.Error as error:
            yield number, RowError(f"cannot be read: {error}")
            continue
        if row:
            yield number, _record(header, row)


def _record(header: list[str], row: list[str]) -> dict[str, Any] | RowError:
    if len(row) != len(header):
        return RowError(f"{len(row)} values, where the first line names {len(header)} columns")
    for column, value in zip(header, row, strict=True):
        if byte := _stray_byte(value):
            return RowError(f"{column} is no UTF-8: byte {byte}", column)
    try:
        return {
            column: _value(column, text) for column, text in zip(header, row, strict=True) if column
        }
    except RowError as error:
        return error


def _value(column: str, text: str) -> Any:
    if column in WEIGHT_FIELDS:
        return _loaded(json.loads, text)
    if not text.startswith("[{"):
        return text
    for load in (json.loads, ast.literal_eval):
        value = _loaded(load, text)
        if are_messages(value):
            return value
    if WRITTEN_MESSAGES.match(text):
        raise RowError(
            f"{column} begins as a list of messages and is none in JSON or Python, got "
            f"{text!r:.60}; json.dumps of the list writes it",
            column,
        )
    return text


def _loaded(load: Callable[[str], Any], text: str) -> Any:
    """What a text stands for; itself where that is nothing."""
    try:
        return load(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def _check_header(header: list[str], separator: str, name: str) -> None:
    if byte := _stray_byte("".join(header)):
        raise DataError(f"{name}:1: invalid UTF-8: byte {byte}")
    named = [column for column in header if column]
    if len(set(named)) < len(named):
        twice = sorted({column for column in named if named.count(column) > 1})
        raise DataError(f"{name}:1: several columns of one name: {listed(twice)}")
    marks = [
        mark for mark in (",", ";", "\t", "|") if mark != separator and mark in "".join(header)
    ]
    if len(header) == 1 and marks:
        raise DataError(
            f"{name}:1: the names of the columns must be separated by {separator!r}, got "
            f"{header[0]!r:.80}, where {marks[0]!r} stands"
        )


def _stray_byte(text: str) -> str:
    """The first byte that was no UTF-8, "0x93"; "" for none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"0x{ord(text[error.start]) - 0xDC00:02x}"
    return ""
