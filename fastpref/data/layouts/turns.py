"""Convert the forms of messages in datasets to lists of messages with role and content.

A column's value may be a text, one message, or a list of messages; a message has `role` and
`content`, or, as in ShareGPT, `from` and `value`.
"""

import ast
import json
import re
from collections.abc import Callable
from typing import Any

from fastpref.checks import hint
from fastpref.data.layouts.messages import RESPONSE_ROLES, Messages, content_text, read_messages
from fastpref.data.layouts.row_values import RowError, kind

SHAREGPT_ROLES = {
    **dict.fromkeys(("human", "user"), "user"),
    **dict.fromkeys(("gpt", "assistant", "chatgpt", "bot"), "assistant"),
    "system": "system",
    **dict.fromkeys(("tool", "observation", "function_response"), "tool"),
    "function_call": "assistant",
}
"""Value of `from` -> role."""
SPEAKERS = ("role", "from")
"""Keys that name the speaker; a message has one of them."""
WRITTEN_LIST = re.compile(r"\s*\[\s*\{")
"""Beginning of a list of objects as text."""
WRITTEN_MESSAGES = re.compile(rf"""{WRITTEN_LIST.pattern}\s*(['"])(role|content|from)\1\s*:""")
"""Beginning of a list of messages as JSON text or Python's repr, as in CSV files."""


def user(text: str) -> Messages:
    """A single user message."""
    return [{"role": "user", "content": text}]


def is_sharegpt(value: Any) -> bool:
    """Whether a message, or the first one of a list, has `from` and no `role`."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict) and "from" in first and "role" not in first


def is_messages(value: Any) -> bool:
    """Whether a value is one message or begins a list of them."""
    first = value[0] if isinstance(value, list) and value else value
    return isinstance(first, dict)


def are_messages(value: Any) -> bool:
    """Whether a value is a list of objects with a `role` or `from` each."""
    return isinstance(value, list) and all(
        isinstance(message, dict) and any(key in message for key in SPEAKERS) for message in value
    )


def read_written(column: str, text: str) -> Any:
    """Decode text that is a list of messages, as JSON or Python's repr; return other text as it is.

    Raises:
        RowError: the text begins like a list of messages but does not decode to one.
    """
    if not WRITTEN_LIST.match(text):
        return text
    for load in (json.loads, ast.literal_eval):
        # Python's reader takes white space before an expression for indentation
        value = loaded(load, text.strip())
        if are_messages(value):
            return value
    if WRITTEN_MESSAGES.match(text):
        raise RowError(
            f"{column} begins as a list of messages and is none in JSON or Python, got "
            f"{text!r:.60}; json.dumps of the list writes it",
            column,
        )
    return text


def loaded(load: Callable[[str], Any], text: str) -> Any:
    """The value that a text decodes to, or the text itself if it does not decode."""
    try:
        return load(text)
    except (ValueError, SyntaxError, MemoryError, RecursionError):
        return text


def transposed(record: dict[str, Any]) -> dict[str, Any]:
    """Convert structs of lists, as older versions of `datasets` write messages, to lists of
    messages: `{"role": […], "content": […]}`.

    Raises:
        RowError: the lists of a struct differ in length.
    """
    lists = {
        field: _as_list(field, value)
        for field, value in record.items()
        if isinstance(value, dict) and any(isinstance(value.get(key), list) for key in SPEAKERS)
    }
    return record | lists if lists else record


def is_response(message: Any) -> bool:
    """Whether a message, checked or not, has a role of responses, assistant or tool."""
    role = message.get("role", SHAREGPT_ROLES.get(str(message.get("from"))))
    return role in RESPONSE_ROLES


def read_turns(field: str, value: Any) -> Messages:
    """Read and check a column that holds one message or a list of messages.

    Raises:
        RowError: one of them breaks a rule, or `from` and `role` messages are mixed.
    """
    if isinstance(value, dict):
        place, messages = field, [value]
    elif isinstance(value, list):
        place, messages = "", value
    else:
        raise RowError(f"{field} must be a message or a list of messages, got {kind(value)}", field)
    if is_sharegpt(value):
        messages = [
            _from_sharegpt(place or f"{field}[{i}]", field, message)
            for i, message in enumerate(messages)
        ]
    return read_messages(field, messages)


def read_response(field: str, value: Any) -> Messages:
    """Read and check a column that holds a response: messages, or the assistant's text.

    Raises:
        RowError: see `read_turns`.
    """
    if isinstance(value, str):
        return [{"role": "assistant", "content": value}]
    if value is None or not isinstance(value, dict | list):
        said = "is null" if value is None else f"must be text or messages, got {kind(value)}"
        raise RowError(f"{field} {said}", field)
    return read_turns(field, value)


def read_text(field: str, value: Any) -> str:
    """Read a column of text that must not be blank.

    Raises:
        RowError: it is null, no text, or blank.
    """
    if value is None:
        raise RowError(f"{field} is null", field)
    if not isinstance(value, str):
        raise RowError(f"{field} must be text, got {kind(value)}", field)
    if not value.strip():
        raise RowError(f"{field} is empty: at least one token must come before the response", field)
    return value


def divide_at_response(field: str, messages: Messages) -> tuple[Messages, Messages]:
    """Divide a conversation into prompt and response: the response is the final run of assistant
    and tool messages.

    Raises:
        RowError: prompt or response is empty.
    """
    start = len(messages)
    while start and messages[start - 1]["role"] in RESPONSE_ROLES:
        start -= 1
    if not messages:
        raise RowError(f"{field} has no messages", field)
    if start == len(messages):
        raise RowError(
            f"{field} ends with a message of role {messages[-1]['role']!r}: no response follows it",
            field,
        )
    if start == 0:
        raise RowError(f"{field} has no message before the response", field)
    return messages[:start], messages[start:]


def user_says(messages: Messages, text: str) -> bool:
    """Whether some user message is `text`, ignoring white space around the message."""
    return any(
        message["role"] == "user" and content_text(message.get("content", "")).strip() == text
        for message in messages
    )


def _as_list(field: str, struct: dict[str, Any]) -> Messages:
    # -1 for a value that is no list, so that the lengths differ
    lengths = {key: len(item) if isinstance(item, list) else -1 for key, item in struct.items()}
    if len(set(lengths.values())) > 1:
        sizes = [f"{key} {size if size >= 0 else 'none'}" for key, size in lengths.items()]
        raise RowError(
            f"{field} is an object of lists, which must have one element a message each, got "
            f"{', '.join(sizes)}",
            field,
        )
    return [dict(zip(struct, values, strict=True)) for values in zip(*struct.values(), strict=True)]


def _from_sharegpt(place: str, field: str, message: Any) -> dict[str, Any]:
    if not isinstance(message, dict) or "from" not in message:
        found = "a message with role" if isinstance(message, dict) else kind(message)
        raise RowError(
            f"{place} must be a message with from and value, as the first one is, got {found}",
            field,
        )
    speaker, value = message["from"], message.get("value")
    if not isinstance(speaker, str):
        raise RowError(f"{place}.from must be text, got {kind(speaker)}", field)
    if speaker not in SHAREGPT_ROLES:
        raise RowError(
            f"{place}.from is {speaker!r:.40}; known: {', '.join(SHAREGPT_ROLES)}"
            f"{hint(speaker, SHAREGPT_ROLES)}",
            field,
        )
    if value is None:
        raise RowError(f"{place}.value is {'null' if 'value' in message else 'missing'}", field)
    if not isinstance(value, str):
        raise RowError(f"{place}.value must be text, got {kind(value)}", field)
    if speaker != "function_call":
        return {"role": SHAREGPT_ROLES[speaker], "content": value}
    return {"role": "assistant", "tool_calls": _read_calls(place, field, value)}


def _read_calls(place: str, field: str, value: str) -> list[dict[str, Any]]:
    """Tool calls of a `function_call` message: JSON text of `{"name", "arguments"}` or a list."""
    decoded = loaded(json.loads, value)
    calls = decoded if isinstance(decoded, list) else [decoded]
    if not all(isinstance(call, dict) and isinstance(call.get("name"), str) for call in calls):
        raise RowError(
            f"{place}.value of a function_call must be JSON with name and arguments, got "
            f"{value!r:.60}",
            field,
        )
    return [{"type": "function", "function": call} for call in calls]
