"""What of a conversation is not in the text that a chat template makes of it, or should not be."""

import json
from collections.abc import Iterator
from typing import Any

from fastpref.data.layouts.messages import Messages
from fastpref.data.layouts.row_values import string_leaves

UNSAID = ("role", "type", "id", "tool_call_id", "index")
"""Keys of messages and tool calls that organise them: a template may leave them out."""
ARGUMENTS = ("arguments", "parameters")
"""Keys of a tool call whose values all count, whatever their names."""


def field_left_out(name: str, messages: Messages, text: str, start: int) -> str:
    """The first text of a response that the rendered conversation does not hold.

    White space is passed over, and a text counts as held where it stands there as JSON writes it.

    Args:
        name: Of the response.
        messages: Of the response.
        text: The whole conversation, rendered.
        start: Where in it the response begins; what it says may begin before that and end after.

    Returns:
        The way to the text, "chosen.tool_calls.function.name", or "" where nothing is left out.
    """
    for message in messages:
        for path, leaf in text_leaves(message):
            said = leaf.strip()
            if not _holds(text[max(0, start - len(said) + 1) :], said):
                return f"{name}.{path}"
    return ""


def prompt_is_left_out(messages: Messages, tools: Messages | None, text: str) -> bool:
    """Whether the name of a tool or the text of a system message is not in the rendered prompt."""
    functions = [tool.get("function", tool) for tool in tools or []]
    said = [function.get("name") for function in functions if isinstance(function, dict)]
    said += [m.get("content") for m in messages if m["role"] in ("system", "developer")]
    return any(isinstance(part, str) and not _holds(text, part.strip()) for part in said)


def spells_eos(parts: list[Messages], eos_token: str) -> bool:
    """Whether a message of some says EOS before its end: it becomes the token, and no template
    makes another of it."""
    return any(
        eos_token in leaf.rstrip().removesuffix(eos_token)
        for messages in parts
        for message in messages
        for _, leaf in text_leaves(message)
    )


def text_leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Texts in a message that a template should show, with the keys that lead to them."""
    if isinstance(value, list):
        for item in value:
            yield from text_leaves(item, path)
    elif not isinstance(value, dict):
        yield from string_leaves(value, path)
    else:
        for key, item in value.items():
            way = f"{path}.{key}" if path else key
            if key in ARGUMENTS:
                yield from string_leaves(_decoded(item), way)
            elif key not in UNSAID:
                yield from text_leaves(item, way)


def _holds(text: str, said: str) -> bool:
    if said in text:
        return True
    squeezed = _squeezed(text)
    escaped = (json.dumps(said, ensure_ascii=False), json.dumps(said), repr(said))
    return any(_squeezed(form) in squeezed for form in (said, *(form[1:-1] for form in escaped)))


def _decoded(arguments: Any) -> Any:
    """The arguments of a tool call; as JSON text they may be written anew, value by value."""
    if not isinstance(arguments, str):
        return arguments
    try:
        return json.loads(arguments)
    except (ValueError, RecursionError):
        return arguments


def _squeezed(text: str) -> str:
    return "".join(text.split())
