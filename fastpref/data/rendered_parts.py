"""Check a rendered conversation: text that the template omits, EOS that a message contains."""

import json
from collections.abc import Iterator
from typing import Any

from fastpref.data.layouts.messages import Messages
from fastpref.data.layouts.row_values import string_leaves
from fastpref.data.layouts.turns import loaded

UNSAID = ("role", "type", "id", "tool_call_id", "index")
"""Structural keys of messages and tool calls, which a template need not render."""
ARGUMENTS = ("arguments", "parameters")
"""Keys of a tool call whose values must all be rendered, whatever their own keys."""


def field_left_out(name: str, messages: Messages, text: str, start: int) -> str:
    """Path of the first text in a response that the rendered conversation does not contain.

    White space is ignored, and texts escaped as by JSON or Python count as contained.

    Args:
        name: Name of the response.
        messages: Its messages.
        text: The whole conversation, rendered.
        start: Start of the response in `text`; a text may begin before it if it ends after it.

    Returns:
        The path, "chosen.tool_calls.function.name", or "" if nothing is missing.
    """
    for message in messages:
        for path, leaf in text_leaves(message):
            said = leaf.strip()
            if not _holds(text[max(0, start - len(said) + 1) :], said):
                return f"{name}.{path}"
    return ""


def prompt_is_left_out(messages: Messages, tools: Messages | None, text: str) -> bool:
    """Whether the rendered prompt lacks the name of a tool or the text of a system message."""
    functions = [tool.get("function", tool) for tool in tools or []]
    said = [function.get("name") for function in functions if isinstance(function, dict)]
    said += [m.get("content") for m in messages if m["role"] in ("system", "developer")]
    return any(isinstance(part, str) and not _holds(text, part.strip()) for part in said)


def spells_eos(parts: list[Messages], eos_token: str) -> bool:
    """Whether a message contains EOS before its end, which is tokenized as the EOS token."""
    return any(
        eos_token in leaf.rstrip().removesuffix(eos_token)
        for messages in parts
        for message in messages
        for _, leaf in text_leaves(message)
    )


def text_leaves(value: Any, path: str = "") -> Iterator[tuple[str, str]]:
    """Yield (path, text) for each text in a message that a template should render."""
    if isinstance(value, list):
        for item in value:
            yield from text_leaves(item, path)
    elif not isinstance(value, dict):
        yield from string_leaves(value, path)
    else:
        for key, item in value.items():
            way = f"{path}.{key}" if path else key
            if key in ARGUMENTS:
                # decoded from JSON text: a template may reformat it
                decoded = loaded(json.loads, item) if isinstance(item, str) else item
                yield from string_leaves(decoded, way)
            elif key not in UNSAID:
                yield from text_leaves(item, way)


def _holds(text: str, said: str) -> bool:
    if said in text:
        return True
    squeezed = _squeezed(text)
    escaped = (json.dumps(said, ensure_ascii=False), json.dumps(said), repr(said))
    return any(_squeezed(form) in squeezed for form in (said, *(form[1:-1] for form in escaped)))


def _squeezed(text: str) -> str:
    return "".join(text.split())
