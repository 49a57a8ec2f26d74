"""Values of a data row: their type names, the strings in them, serialization and comparison."""

import base64
import datetime
import json
import re
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any


class RowError(ValueError):
    """A row breaks a rule.

    Args:
        message: A sentence that names the problem.
        field: The field at fault; "" for the row as a whole.
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field

    def at(self, place: str) -> str:
        """The message prefixed with the row's place, "train.jsonl:8:chosen: chosen is null"."""
        place = f"{place}:{self.field}" if self.field else place
        # a message may quote a lone surrogate, which cannot be printed
        return f"{place}: {self}".encode(errors="backslashreplace").decode()


@contextmanager
def refusing_depth() -> Iterator[None]:
    """Refuse a row on which a function in the block exceeds Python's depth of recursion.

    Raises:
        RowError: the row is nested too deeply.
    """
    try:
        yield
    except RecursionError:
        raise RowError("the row is nested too deeply") from None


def kind(value: Any) -> str:
    """Name of a JSON value's type for messages: text, list, object, boolean, number or null."""
    if value is None:
        return "null"
    names = {str: "text", list: "list", dict: "object", bool: "boolean", int: "number"}
    return names.get(type(value), "number" if isinstance(value, float) else type(value).__name__)


def json_text(value: Any) -> str:
    """JSON that preserves key order, null and non-ASCII characters."""
    return json.dumps(value, ensure_ascii=False, default=_plain)


def normal_form(value: Any) -> str:
    """JSON with sorted keys, to compare values regardless of key order."""
    return json.dumps(value, ensure_ascii=False, default=_plain, sort_keys=True)


def string_leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path, text) for every string in a value: "tool_calls.function.name", "add"."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from string_leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from string_leaves(item, path)


def map_strings(change: Callable[[str], str], value: Any) -> Any:
    """A value with `change` applied to every string in it, except keys."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: map_strings(change, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(change, item) for item in value]
    return value


def says_something(value: Any) -> bool:
    """Whether a value contains anything besides null and blank text."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, dict):
        return any(map(says_something, value.values()))
    if isinstance(value, list | tuple):
        return any(map(says_something, value))
    return value is not None


def check_unicode(field: str, text: str) -> None:
    """Refuse a lone surrogate, which no tokenizer accepts.

    Raises:
        RowError: naming the position of the character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"{field} holds half a surrogate pair at character {error.start}"
        raise RowError(message, re.split(r"\W", field)[0]) from None


def _plain(value: Any) -> str:
    """Text of a parquet value that JSON cannot represent."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return str(value)
