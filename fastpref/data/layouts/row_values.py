"""Values of a data row: their kind, the texts in them, how they are written and compared."""

import base64
import datetime
import json
import re
from collections.abc import Callable, Iterator
from typing import Any


class RowError(ValueError):
    """A row breaks a rule.

    Args:
        message: A sentence that names what is wrong.
        field: The field it is wrong in, "" where it is the row as a whole.
    """

    def __init__(self, message: str, field: str = "") -> None:
        super().__init__(message)
        self.field = field

    def at(self, place: str) -> str:
        """The message behind the row's place, "train.jsonl:8:chosen: chosen is null"."""
        place = f"{place}:{self.field}" if self.field else place
        # a message may quote half a surrogate pair, which nothing can print
        return f"{place}: {self}".encode(errors="backslashreplace").decode()


def kind(value: Any) -> str:
    """The type of a JSON value in a reader's words."""
    if value is None:
        return "null"
    names = {str: "text", list: "list", dict: "object", bool: "boolean", int: "number"}
    return names.get(type(value), "number" if isinstance(value, float) else type(value).__name__)


def json_text(value: Any) -> str:
    """JSON of a value as it is: keys in their order, null where it says null, any script."""
    return json.dumps(value, ensure_ascii=False, default=_plain)


def normal_form(value: Any) -> str:
    """JSON in which two values are equal whatever the order of their keys; to compare, not show."""
    return json.dumps(value, ensure_ascii=False, default=_plain, sort_keys=True)


def string_leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Every text in a value with the keys that lead to it: "tool_calls.function.name", "add"."""
    if isinstance(value, str):
        yield path, value
    elif isinstance(value, dict):
        for key, item in value.items():
            yield from string_leaves(item, f"{path}.{key}" if path else str(key))
    elif isinstance(value, list | tuple):
        for item in value:
            yield from string_leaves(item, path)


def map_strings(change: Callable[[str], str], value: Any) -> Any:
    """A value with every text in it changed, keys as they are."""
    if isinstance(value, str):
        return change(value)
    if isinstance(value, dict):
        return {key: map_strings(change, item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [map_strings(change, item) for item in value]
    return value


def says_something(value: Any) -> bool:
    """Whether there is anything in a value: a number, a text that is not blank."""
    if isinstance(value, str):
        return bool(value.strip())
    if isinstance(value, dict):
        return any(map(says_something, value.values()))
    if isinstance(value, list | tuple):
        return any(map(says_something, value))
    return value is not None


def check_unicode(field: str, text: str) -> None:
    """Refuse half a surrogate pair, which no tokenizer takes.

    Raises:
        RowError: naming the character.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        message = f"{field} holds half a surrogate pair at character {error.start}"
        raise RowError(message, re.split(r"\W", field)[0]) from None


def _plain(value: Any) -> str:
    """The text of what a parquet file may hold and JSON has no form for."""
    if isinstance(value, datetime.date | datetime.time):
        return value.isoformat()
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError:
            return base64.b64encode(value).decode()
    return str(value)
