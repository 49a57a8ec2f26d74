"""Read the records of one source as checked rows of a single layout."""

from collections.abc import Collection, Mapping
from contextlib import suppress
from functools import partial
from typing import Any

from fastpref.checks import listed
from fastpref.data.layouts.readings import Record
from fastpref.data.layouts.recognition import TEXTS, AmbiguousRowError, Layout, recognise
from fastpref.data.layouts.row_values import RowError, refusing_depth
from fastpref.data.layouts.rows import SIDES, Row, parse_row
from fastpref.data.layouts.turns import read_written, transposed


def find_written(record: Record) -> frozenset[str]:
    """Columns whose text decodes to a list of messages, see `read_written`."""
    found = set()
    for column, value in record.items():
        with suppress(RowError):
            if isinstance(value, str) and read_written(column, value) is not value:
                found.add(column)
    return frozenset(found)


def with_messages(record: Record, written: Collection[str]) -> Record:
    """The record with the texts of the columns `written` decoded to messages.

    Raises:
        RowError: a text begins like a list of messages but does not decode to one.
    """
    texts = {column: record[column] for column in written if isinstance(record.get(column), str)}
    return record | {column: read_written(column, text) for column, text in texts.items()}


class LayoutReader:
    """Checks the records of one source, whose layout its first valid record decides."""

    def __init__(
        self, columns: Mapping[str, str | None], *, single: bool, weighted: bool, allow_roles: bool
    ) -> None:
        """Args:
        columns: `data.columns`.
        single: Accept rows with one response.
        weighted, allow_roles: See `parse_row`.
        """
        self._columns = columns
        self._named = tuple(field for field, column in columns.items() if column is not None)
        self._single = single
        self._parse = partial(parse_row, weighted=weighted, allow_roles=allow_roles)
        self._layout: Layout | None = None
        self._written: frozenset[str] = frozenset()
        """Columns whose text in the first row decodes to messages."""

    def parse(self, record: Any) -> tuple[Row, Layout]:
        """Check a record; returns the row and its layout.

        Raises:
            RowError: the row breaks a rule, or has another layout than the rows before it.
            AmbiguousRowError: the record can be read in two ways.
        """
        with refusing_depth():
            return self._parsed(record)

    def _parsed(self, record: Any) -> tuple[Row, Layout]:
        if not isinstance(record, dict):
            return self._parse(record), TEXTS
        written = self._written if self._layout else find_written(record)
        record, layout = self._renamed(with_messages(record, written)), TEXTS
        try:
            record = transposed(record)
            layout = self._recognised(record)
            row = self._parse(layout.read(record), single=layout.single)
        except AmbiguousRowError:
            raise
        except RowError as error:
            raise self._as_named(error, layout) from None
        if self._layout is not None and not layout.is_beside(self._layout):
            raise RowError(
                f"the row is laid out as {layout.what}; the rows before it as {self._layout.what}"
            )
        self._layout, self._written = self._layout or layout, written
        row["fields"] = self._fields(layout)
        return row, layout

    def columns_read(self, layout: Layout) -> set[str]:
        """Columns that a layout reads, by their names in the source."""
        columns = (self._columns.get(field, field) for field in layout.columns)
        return {column for column in columns if column is not None}

    def _renamed(self, record: Record) -> Record:
        """Rename the columns of a record as `data.columns` says."""
        if not self._columns:
            return record
        taken = {*self._columns, *self._columns.values()}
        renamed = {column: value for column, value in record.items() if column not in taken}
        for field in self._named:
            column = self._columns[field]
            assert column is not None
            if column not in record:
                raise RowError(
                    f"no column {column!r}, which data.columns takes for {field}; columns found: "
                    f"{listed(sorted(map(str, record))) or 'none'}",
                    column,
                )
            renamed[field] = record[column]
        return renamed

    def _recognised(self, record: Record) -> Layout:
        layout = recognise(record, self._named, single=self._single)
        unused = [field for field in self._named if field not in layout.columns]
        if unused:
            raise AmbiguousRowError(
                f"data.columns.{unused[0]}: the row is laid out as {layout.what}, where no "
                f"{unused[0]} is read"
            )
        return layout

    def _as_named(self, error: RowError, layout: Layout) -> RowError:
        """The error with its field replaced by the source's column name."""
        column = self._column(error.field, layout)
        if column == error.field:
            return error
        return RowError(f"{error} ({error.field} is {column})", column)

    def _column(self, field: str, layout: Layout) -> str:
        """The source's column name of a field of `parse_row`."""
        field = layout.names.get(field, field)
        return self._columns.get(field) or field

    def _fields(self, layout: Layout) -> list[str]:
        """Column names of prompt, chosen and rejected; a prompt without a column of its own is the
        beginning of chosen."""
        has_prompt = layout.names.get("prompt", "prompt") in layout.columns
        return [
            self._column(field, layout) for field in ("prompt" if has_prompt else "chosen", *SIDES)
        ]
