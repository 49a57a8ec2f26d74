"""Read .csv and .tsv files as records of texts, with the column names in the first line."""

import csv
import json
import sys
from collections.abc import Iterable, Iterator
from typing import Any

from fastpref.checks import listed
from fastpref.data.layouts.row_values import RowError
from fastpref.data.layouts.rows import WEIGHT_FIELDS
from fastpref.data.layouts.turns import loaded, read_written
from fastpref.errors import DataError

SEPARATORS = {"csv": ",", "tsv": "\t"}


def read_delimited(
    lines: Iterable[bytes], separator: str, name: str
) -> Iterator[tuple[int, dict[str, Any] | RowError]]:
    """Records of a UTF-8 table in the format of RFC 4180; quoted values may contain line breaks.

    Every value is taken literally as text, including 5, NA and the empty value. Only messages and
    token weights are decoded from JSON text, messages also from Python's repr, which pandas writes.
    A column without a name, such as the index of pandas, is left out.

    Args:
        lines: Lines of the file, without byte order mark.
        separator: Delimiter between values.
        name: File name for error messages.

    Yields:
        The line in which a record begins, counted from 1, and the record, or a `RowError` if it
        is invalid.

    Raises:
        DataError: the first line does not name the columns.
    """
    # the default limit of 128 KiB per value is global to the process
    csv.field_size_limit(sys.maxsize)
    # invalid UTF-8 is reported later, with the record and column it is in
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
        return loaded(json.loads, text)
    return read_written(column, text)


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
    """The first invalid UTF-8 byte of a text decoded with surrogateescape, "0x93"; "" for none."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        return f"0x{ord(text[error.start]) - 0xDC00:02x}"
    return ""
