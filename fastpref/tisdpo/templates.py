"""Contrastive prompting, TIS-DPO(P): what a model reads beside the prompt."""

from typing import Any

from fastpref.data.layouts.messages import content_text

ROLE_SENTENCES = {
    "normal": "",
    "harmless": "You are a considerate assistant whose answers are helpful and harmless.",
    "harmful": "You are a careless assistant whose answers are unhelpful and harmful.",
}
"""The templates that have a name."""

PLACEHOLDER = "{prompt}"


def template_text(template: str) -> str:
    """The text of a template given by name or as it is."""
    return ROLE_SENTENCES.get(template, template)


def apply_to_text(text: str, prompt: str) -> str:
    """The prompt under a template's text: in the place of {prompt}, else after a blank line."""
    if PLACEHOLDER in text:
        return text.replace(PLACEHOLDER, prompt)
    return f"{text}\n\n{prompt}" if text else prompt


def apply_to_messages(text: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """A conversation under a template's text.

    With {prompt} the text goes around the last message of the user; without, it is the system
    message, or stands before the one that is there: many chat templates take no second one.
    """
    if not text:
        return messages
    if PLACEHOLDER not in text:
        if messages and messages[0]["role"] == "system":
            content = "\n\n".join(filter(None, (text, _content(messages[0]))))
            return [messages[0] | {"content": content}, *messages[1:]]
        return [{"role": "system", "content": text}, *messages]
    users = [i for i, message in enumerate(messages) if message["role"] == "user"]
    changed = list(messages)
    for i in users[-1:]:
        changed[i] = messages[i] | {"content": apply_to_text(text, _content(messages[i]))}
    return changed


def _content(message: dict[str, Any]) -> str:
    # beside tool calls there may be none
    content = message.get("content")
    return "" if content is None else content_text(content)
