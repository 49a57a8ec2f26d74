"""Read data files record by record, with line numbers for error messages."""

import bz2
import gzip
import json
import lzma
import zlib
from collections.abc import Callable, Iterable, Iterator
from functools import partial
from io import BufferedReader, RawIOBase
from itertools import chain
from pathlib import Path
from typing import Any, BinaryIO, cast

import pyarrow
import pyarrow.parquet

from fastpref.checks import listed
from fastpref.data.layouts.row_values import RowError, kind
from fastpref.data.sources.delimited import SEPARATORS, read_delimited
from fastpref.errors import DataError, is_shortage

COMPRESSED = (".gz", ".bz2", ".xz", ".zst")
"""Suffixes of compressed text files."""
SUFFIXES = tuple(
    form + end
    for form in (".jsonl", ".ndjson", ".parquet", ".json", ".arrow", ".csv", ".tsv")
    for end in ("", *(() if form in (".parquet", ".arrow") else COMPRESSED))
)
"""Suffixes of data files, in order of precedence."""

ARROW_MAGIC = b"ARROW1"
JSON_TYPE = "arrow.json"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
FIRST_BYTES = {
    b"PAR1": "a parquet file",
    ARROW_MAGIC: "an Arrow file",
    b"\x1f\x8b": "compressed by gzip",
    b"\x28\xb5\x2f\xfd": "compressed by zstd",
    b"BZh": "compressed by bzip2",
    b"\xfd7zXZ": "compressed by xz",
    b"PK\x03\x04": "a zip archive",
    b"\xff\xfe": "text in UTF-16, not UTF-8",
    b"\xfe\xff": "text in UTF-16, not UTF-8",
    b"<!": "a page of the web",
    b"<html": "a page of the web",
    b"version https://git-lfs": "a pointer of Git LFS; `git lfs pull` brings the file itself",
}
"""First bytes of a file -> its format, whatever its name says."""
OWN_FIRST_BYTES = {
    ".parquet": (b"PAR1",),
    ".arrow": (ARROW_MAGIC,),
    ".gz": (b"\x1f\x8b",),
    ".zst": (b"\x28\xb5\x2f\xfd",),
    ".bz2": (b"BZh",),
    ".xz": (b"\xfd7zXZ",),
}


def read_records(path: Path) -> Iterator[tuple[int, Any]]:
    """Records of a file whose name ends in one of `SUFFIXES`.

    JSON lines are UTF-8, with or without byte order mark, ended by LF or CRLF; blank lines are
    skipped. A .json file holds one array of objects, or JSON lines. In parquet and Arrow files all
    structs of a column have the same keys, and those that a message or a tool call lacks are null:
    null keys of structs are removed at any depth. Maps become objects, and columns declared as JSON
    are decoded, null included. Arrow files may be streams, as `save_to_disk` of `datasets` writes
    them, or have an index. For .csv and .tsv see `read_delimited`.

    Yields:
        The line (in parquet and Arrow the row, in an array the element), counted from 1, and the
        record, or a `RowError` if it cannot be decoded.

    Raises:
        DataError: the file as a whole cannot be read.
    """
    form = Path(path.stem if path.suffix in COMPRESSED else path.name).suffix.removeprefix(".")
    readers = {"parquet": _read_parquet, "arrow": _read_arrow, "json": _read_json}
    readers |= {table: partial(_read_delimited, mark) for table, mark in SEPARATORS.items()}
    reader = readers.get(form, _read_json_lines)
    try:
        _check_form(path)
        yield from reader(path)
    except (OSError, EOFError, zlib.error, lzma.LZMAError, pyarrow.ArrowException) as error:
        if is_shortage(error):
            raise
        # a damaged file of any format
        raise DataError(f"{path}: cannot be read: {error}") from error


def _check_form(path: Path) -> None:
    """Raise a DataError for a file whose first bytes are those of another format."""
    with path.open("rb") as file:
        start = file.read(32)
    for first_bytes, form in FIRST_BYTES.items():
        if start.startswith(first_bytes) and first_bytes not in OWN_FIRST_BYTES.get(
            path.suffix, ()
        ):
            raise DataError(f"{path}: must be {path.suffix} as its name says; it is {form}")


def _read_json_lines(path: Path) -> Iterator[tuple[int, Any]]:
    offset = 0
    with _open(path) as lines:
        for number, line in enumerate(lines, start=1):
            content = line.removeprefix(BYTE_ORDER_MARK) if number == 1 else line
            if content.strip():
                yield number, _parse_line(content, offset + len(line) - len(content), number)
            offset += len(line)


def _read_json(path: Path) -> Iterator[tuple[int, Any]]:
    with _open(path) as file:
        content = file.read().removeprefix(BYTE_ORDER_MARK)
    if _is_lines(content.lstrip()):
        yield from _read_json_lines(path)
        return
    try:
        value = decode(content.decode().strip()) if content.strip() else []
    except UnicodeDecodeError as error:
        raise DataError(
            f"{path}: invalid UTF-8: byte 0x{content[error.start]:02x} at offset {error.start}"
        ) from None
    except json.JSONDecodeError as error:
        raise DataError(
            f"{path}:{error.lineno}: invalid JSON: {error.msg} at column {error.colno}; expected "
            "one array of objects, or one object per line"
        ) from None
    except (ValueError, RecursionError) as error:
        raise DataError(f"{path}: invalid JSON: {error}") from None
    if not isinstance(value, list):
        keys = f" with {listed(list(value))}" if isinstance(value, dict) else ""
        raise DataError(
            f"{path}: must be one array of objects, or one object per line, got {kind(value)}{keys}"
        )
    yield from enumerate(value, start=1)


def _read_delimited(separator: str, path: Path) -> Iterator[tuple[int, Any]]:
    with _open(path) as lines:
        first = lines.readline().removeprefix(BYTE_ORDER_MARK)
        yield from read_delimited(chain([first], lines), separator, str(path))


def _is_lines(content: bytes) -> bool:
    """Whether content is JSON lines: its first line is valid JSON, or the whole is not and another
    line is an object."""
    if content.startswith(b"["):
        return False
    first, *others = content.splitlines() or [b""]
    if not isinstance(_parse_line(first, 0, 1), RowError):
        return True
    try:
        json.loads(content.decode())
        return False
    except (ValueError, RecursionError):
        return any(isinstance(_parse_line(line, 0, 2), dict) for line in others)


def _open(path: Path) -> BinaryIO:
    if path.suffix == ".zst":
        # pyarrow's stream has the methods that BufferedReader needs of a raw file
        return BufferedReader(cast(RawIOBase, pyarrow.input_stream(path, compression="zstd")))
    opens: dict[str, Callable[..., Any]] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
    return opens.get(path.suffix, open)(path, "rb")


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Raise a ValueError for a duplicate key: which value is meant is unknown."""
    record = dict(pairs)
    if len(record) < len(pairs):
        keys = [key for key, _ in pairs]
        raise ValueError(f"{next(key for key in keys if keys.count(key) > 1)!r} stands twice")
    return record


decode = json.JSONDecoder(object_pairs_hook=_object).decode


def _parse_line(line: bytes, offset: int, number: int) -> Any:
    try:
        # without the line break an error at its end is not reported for the next line
        return decode(line.decode().rstrip("\r\n"))
    except UnicodeDecodeError as error:
        return RowError(
            f"invalid UTF-8: byte 0x{line[error.start]:02x} at offset {offset + error.start}"
        )
    except json.JSONDecodeError as error:
        if number == 1 and line.lstrip().startswith(b"["):
            return RowError("invalid JSON lines: an array; write one object per line")
        if number == 1 and line.strip() == b"{":
            return RowError("invalid JSON lines: an object over several lines; write one on each")
        return RowError(f"invalid JSON: {error.msg} at column {error.colno}")
    except (ValueError, RecursionError) as error:
        return RowError(f"invalid JSON: {error}")


def _read_parquet(path: Path) -> Iterator[tuple[int, Any]]:
    with pyarrow.parquet.ParquetFile(path) as file:
        yield from read_batches(file.iter_batches(batch_size=1000), str(path))


def _read_arrow(path: Path) -> Iterator[tuple[int, Any]]:
    with pyarrow.memory_map(str(path)) as file:
        has_index = file.read(len(ARROW_MAGIC)) == ARROW_MAGIC
        file.seek(0)
        if has_index:
            table = pyarrow.ipc.open_file(file)
            batches = map(table.get_batch, range(table.num_record_batches))
        else:
            batches = iter(pyarrow.ipc.open_stream(file))
        yield from read_batches(map(_validated, batches), str(path))


def _validated(batch: pyarrow.RecordBatch) -> pyarrow.RecordBatch:
    """Raise ArrowInvalid for damaged offsets, which would be followed out of the file's memory."""
    for column in batch.columns:
        try:
            column.validate(full=True)
        except pyarrow.ArrowInvalid as error:
            # reported with its row
            if "Invalid UTF8" not in str(error):
                raise
    return batch


def read_batches(
    batches: Iterable[pyarrow.RecordBatch | pyarrow.Table], name: str
) -> Iterator[tuple[int, Any]]:
    """Records of tables, numbered from 1, without null keys of structs; a `RowError` for a record
    with a value that is no JSON though its column is declared as such, or that Python cannot hold.

    Args:
        name: Their source, for error messages.

    Raises:
        DataError: several columns have one name.
    """
    number = 0
    for batch in batches:
        fields = {field.name: field.type for field in batch.schema}
        if len(fields) < len(batch.schema):
            twice = sorted({x for x in batch.schema.names if batch.schema.names.count(x) > 1})
            raise DataError(f"{name}: several columns of one name: {listed(twice)}")
        for record in _rows_of(batch):
            number += 1
            failed = isinstance(record, RowError)
            yield number, record if failed else _given_fields(record, fields)


def _rows_of(batch: pyarrow.RecordBatch | pyarrow.Table) -> list[Any]:
    """The rows of a table as objects; a `RowError` for one with an invalid value."""
    try:
        return batch.to_pylist()
    # text that is no UTF-8, or a date beyond the year 9999
    except (ValueError, OverflowError):
        return [_row_of(batch, i) for i in range(len(batch))]


def _row_of(batch: pyarrow.RecordBatch | pyarrow.Table, i: int) -> Any:
    row = {}
    for name in batch.schema.names:
        try:
            row[name] = batch.column(name)[i].as_py()
        except UnicodeDecodeError as error:
            byte = error.object[error.start]
            return RowError(f"{name} is no UTF-8: byte 0x{byte:02x}", name)
        except (ValueError, OverflowError) as error:
            return RowError(f"{name} cannot be read: {error}", name)
    return row


def _given_fields(record: dict[str, Any], fields: dict[str, pyarrow.DataType]) -> Any:
    given = {}
    for name, value in record.items():
        try:
            given[name] = _given(value, fields[name])
        except (ValueError, RecursionError) as error:
            return RowError(f"{name} is declared as JSON and is none: {error}", name)
    return given


def _given(value: Any, declared: pyarrow.DataType) -> Any:
    """An Arrow value with null keys of structs removed, maps as objects, and JSON decoded.

    Raises:
        ValueError: a value declared as JSON is invalid.
    """
    kinds = pyarrow.types
    if value is None:
        return None
    if isinstance(declared, pyarrow.BaseExtensionType):
        # the type `Json` of `datasets`, for tool calls with varying arguments
        return json.loads(value) if declared.extension_name == JSON_TYPE else value
    if kinds.is_struct(declared):
        inner = {field.name: field.type for field in declared}
        return {key: _given(item, inner[key]) for key, item in value.items() if item is not None}
    if kinds.is_map(declared):
        return {str(key): _given(item, declared.item_type) for key, item in value}
    # lists of numbers, such as token weights, are long and have no keys to remove
    if isinstance(value, list) and not kinds.is_primitive(declared.value_type):
        return [_given(item, declared.value_type) for item in value]
    return value
