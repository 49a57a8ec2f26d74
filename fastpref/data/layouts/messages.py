"""Conversations in rows: rules for their messages, and their division into prompt and response.

A message keeps all its keys in their order, because the chat template may render any of them. Two
things are normalized: content given as a list of text parts is joined to a text, and keys that are
null are removed, as transformers does from 5.24 on.
"""

import json
from typing import Any, NamedTuple

from fastpref.checks import hint, listed
from fastpref.data.layouts.row_values import (
    RowError,
    check_unicode,
    kind,
    normal_form,
    says_something,
    string_leaves,
)

PROMPT_ROLES = ("system", "developer", "user", "assistant", "tool")
RESPONSE_ROLES = ("assistant", "tool")
TEXT_PARTS = ("text", "input_text", "output_text")
"""Types of content parts that are text."""

Message = dict[str, Any]
Messages = list[Message]


class Conversations(NamedTuple):
    """Prompt and responses of a row of messages."""

    prompt: Messages
    chosen: Messages
    rejected: Messages


def read_messages(field: str, messages: list[Any]) -> Messages:
    """Check and normalize the messages of a field.

    Raises:
        RowError: one of them breaks a rule.
    """
    return [_read_message(f"{field}[{i}]", field, message) for i, message in enumerate(messages)]


def divide_conversations(fields: dict[str, Messages]) -> Conversations | None:
    """Divide a row into prompt and responses; None if two conversations share no prompt.

    Without `prompt`, the prompt is the common prefix of both conversations. With `prompt`, chosen
    and rejected are either responses, or whole conversations that begin with it.

    Args:
        fields: Checked messages of `chosen`, `rejected` and, if the row has it, `prompt`.

    Raises:
        RowError: only one of chosen and rejected begins with `prompt`, or one ends with it.
    """
    chosen, rejected = fields["chosen"], fields["rejected"]
    if "prompt" in fields:
        num_shared = _num_repeated(fields)
        return Conversations(fields["prompt"], chosen[num_shared:], rejected[num_shared:])
    num_shared = _num_shared(chosen, rejected)
    if num_shared == 0 and chosen and rejected:
        return None
    return Conversations(chosen[:num_shared], chosen[num_shared:], rejected[num_shared:])


def add_system(prompt: Messages, system: Any) -> Messages:
    """Prepend the column `system` to the prompt as a system message.

    Args:
        prompt: Checked messages.
        system: The column's value; null or blank adds nothing.

    Raises:
        RowError: `system` is no text, or the prompt has a different system message.
    """
    if system is None or system == "":
        return prompt
    if not isinstance(system, str):
        raise RowError(f"system must be text, got {kind(system)}", "system")
    check_unicode("system", system)
    if not system.strip():
        return prompt
    present = [message.get("content") for message in prompt if message["role"] == "system"]
    if not present:
        return [{"role": "system", "content": system}, *prompt]
    if present != [system]:
        raise RowError(
            f"two system messages: the column says {system!r:.60}, the messages "
            f"{present[0]!r:.60}; leave one of them out",
            "system",
        )
    return prompt


def read_tools(tools: Any) -> list[Message] | None:
    """Read the column `tools`: a list of tool schemas, or its JSON text; None for no tools.

    Raises:
        RowError: the value is neither.
    """
    tools = _decoded("tools", tools)
    if tools is None:
        return None
    if not isinstance(tools, list):
        raise RowError(f"tools must be a list of tool schemas, got {kind(tools)}", "tools")
    schemas = [_decoded(f"tools[{i}]", tool) for i, tool in enumerate(tools)]
    for i, schema in enumerate(schemas):
        if not isinstance(schema, dict):
            raise RowError(f"tools[{i}] must be a tool schema, got {kind(schema)}", "tools")
    for path, text in string_leaves(schemas):
        check_unicode(f"tools.{path}", text)
    return schemas


def check_roles(field: str, messages: Messages, roles: tuple[str, ...]) -> None:
    """Refuse messages whose role is not allowed in a field.

    Raises:
        RowError: naming the role and those allowed.
    """
    for message in messages:
        if message["role"] not in roles:
            raise RowError(
                f"{field} has a message of role {message['role']!r}; roles allowed there: "
                f"{', '.join(roles)} (any with data.allow_roles=true)"
                f"{hint(message['role'], roles)}",
                field,
            )


def is_silent(messages: Messages) -> bool:
    """Whether messages contain nothing except roles, so that no template can render a response."""
    return not any(_says_more(message) for message in messages)


def content_text(content: Any, place: str = "content") -> str:
    """The text of a message's content: a text, or a list of texts and text parts.

    Raises:
        RowError: the content is neither, or a part is not text.
    """
    if isinstance(content, str):
        return content
    if not isinstance(content, list):
        raise RowError(f"{place} must be text or a list of text parts, got {kind(content)}")
    return "".join(_part_text(f"{place}[{i}]", part) for i, part in enumerate(content))


def _part_text(place: str, part: Any) -> str:
    if isinstance(part, str):
        return part
    if not isinstance(part, dict):
        raise RowError(f"{place} must be text or a text part, got {kind(part)}")
    part_type = part.get("type", "text")
    if part_type not in TEXT_PARTS:
        raise RowError(f"{place} is a part of type {part_type!r:.40}: only text can be read")
    if not isinstance(part.get("text"), str):
        raise RowError(f"{place} must have text, got {kind(part.get('text'))}")
    return part["text"]


def _read_message(place: str, field: str, message: Any) -> Message:
    if not isinstance(message, dict):
        raise RowError(
            f"{place} must be a message with role and content, got {kind(message)}", field
        )
    _check_present(place, field, message, "role")
    if not isinstance(message["role"], str):
        raise RowError(f"{place}.role must be text, got {kind(message['role'])}", field)
    present = {key: value for key, value in message.items() if value is not None}
    if "content" in present:
        try:
            present["content"] = content_text(present["content"], f"{place}.content")
        except RowError as error:
            raise RowError(str(error), field) from None
    elif not _says_more(present):
        _check_present(place, field, message, "content")
    for path, text in string_leaves(present):
        check_unicode(f"{place}.{path}", text)
    return present


def _check_present(place: str, field: str, message: Message, key: str) -> None:
    if key not in message:
        found = listed(sorted(map(str, message))) or "none"
        raise RowError(f"{place} has no {key}; keys found: {found}", field)
    if message[key] is None:
        raise RowError(f"{place}.{key} is null", field)


def _says_more(message: Message) -> bool:
    return any(says_something(value) for key, value in message.items() if key != "role")


def _num_shared(chosen: Messages, rejected: Messages) -> int:
    """Number of common first messages, leaving at least one message to each response."""
    longest = min(len(chosen), len(rejected)) - 1
    for index in range(longest):
        if normal_form(chosen[index]) != normal_form(rejected[index]):
            return index
    return max(longest, 0)


def _num_repeated(fields: dict[str, Messages]) -> int:
    """Number of prompt messages that chosen and rejected repeat: all, or 0."""
    prompt = fields["prompt"]
    start = normal_form(prompt)
    repeats = {
        field: bool(prompt) and normal_form(fields[field][: len(prompt)]) == start
        for field in ("chosen", "rejected")
    }
    if not any(repeats.values()):
        return 0
    for field in ("chosen", "rejected"):
        if not repeats[field]:
            other = "rejected" if field == "chosen" else "chosen"
            raise RowError(
                f"{other} begins with the messages of prompt and {field} does not: as whole "
                f"conversations they do not share the prompt, as responses {other} repeats it",
                field,
            )
        if len(fields[field]) == len(prompt):
            raise RowError(
                f"{field} is the messages of prompt and nothing more: as a whole conversation it "
                "has no response, as a response it repeats the prompt",
                field,
            )
    return len(prompt)


def _decoded(place: str, value: Any) -> Any:
    """Decode a value that may be JSON text; None for blank text."""
    if not isinstance(value, str):
        return value
    if not value.strip():
        return None
    try:
        return json.loads(value)
    except (ValueError, RecursionError) as error:
        raise RowError(f"{place} is text but not JSON: {error}", "tools") from None
