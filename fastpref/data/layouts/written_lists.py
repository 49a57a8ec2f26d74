"""Lists of messages that a file has in another form: as a struct of lists, or as their JSON text.

Older versions of `datasets` write a sequence of structs as a struct of sequences, and a table of
text has no lists at all.
"""

import json
from typing import Any

from fastpref.checks import listed
from fastpref.data.layouts.row_values import RowError
from fastpref.data.layouts.rows import SIDES, WEIGHT_FIELDS

SPEAKERS = ("role", "from")
"""Keys of a message of which it has one."""
SIDE_PAIRS = (SIDES, ("response_0", "response_1"))
PROMPTS = ("prompt", "messages", "conversations")


def with_lists(record: dict[str, Any]) -> dict[str, Any]:
    """The record with its lists of messages, and of token weights, as lists.

    A text is one where both responses are, or where `messages`, `conversations` or, beside such
    responses, `prompt` is: what only looks so in one response stays a text.

    Raises:
        RowError: a struct's lists are of several lengths; a text is a list as Python writes it.
    """
    lists: dict[str, Any] = {
        field: _transposed(field, value)
        for field, value in record.items()
        if isinstance(value, dict) and any(isinstance(value.get(key), list) for key in SPEAKERS)
    }
    for pair in SIDE_PAIRS:
        one, other = (_decoded(side, record.get(side)) for side in pair)
        if one is not None and other is not None:
            lists |= dict(zip(pair, (one, other), strict=True))
    prompts = PROMPTS if lists else PROMPTS[1:]
    for field in prompts:
        if messages := _decoded(field, record.get(field)):
            lists[field] = messages
    for field in WEIGHT_FIELDS:
        if isinstance(record.get(field), str):
            lists[field] = _from_json(record[field])
    return record | lists if lists else record


def _transposed(field: str, struct: dict[str, Any]) -> list[dict[str, Any]]:
    columns = {key: values for key, values in struct.items() if isinstance(values, list)}
    lengths = {len(values) for values in columns.values()}
    if len(columns) < len(struct) or len(lengths) > 1:
        sizes = [f"{key} {len(values)}" for key, values in columns.items()]
        others = [f"{key} none" for key in struct if key not in columns]
        raise RowError(
            f"{field} is an object of lists, which must have one element a message each; they "
            f"have: {listed([*sizes, *others])}",
            field,
        )
    rows = zip(*columns.values(), strict=True)
    return [dict(zip(columns, values, strict=True)) for values in rows]


def _decoded(field: str, value: Any) -> list[dict[str, Any]] | None:
    """The messages that a text stands for; None for any other value."""
    if not isinstance(value, str) or not value.lstrip().startswith("[{"):
        return None
    messages = _from_json(value)
    if isinstance(messages, list) and all(map(_is_message, messages)):
        return messages
    start = value.lstrip().removeprefix("[{")
    if any(start.startswith(f"'{key}'") for key in (*SPEAKERS, "content", "value")):
        raise RowError(
            f"{field} is a list of messages as Python writes it, got {value!r:.60}; write it as "
            "JSON, or the rows as JSON lines",
            field,
        )
    return None


def _is_message(value: Any) -> bool:
    return isinstance(value, dict) and any(isinstance(value.get(key), str) for key in SPEAKERS)


def _from_json(text: str) -> Any:
    """The value of a JSON text; the text itself where it is none."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text
