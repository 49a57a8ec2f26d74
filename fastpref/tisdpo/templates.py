"""Contrastive prompting, TIS-DPO(P): texts that are added to a prompt."""

from typing import Any

from fastpref.data.layouts.messages import content_text

ROLE_SENTENCES = {
    "normal": "",
    "harmless": "You are a considerate assistant whose answers are helpful and harmless.",
    "harmful": "You are a careless assistant whose answers are unhelpful and harmful.",
}
"""Templates by name."""

PLACEHOLDER = "{prompt}"


def template_text(template: str) -> str:
    """The text of a template, which is given by name or as text."""
    return ROLE_SENTENCES.get(template, template)


def apply_to_text(text: str, prompt: str) -> str:
    """Apply a template: the prompt replaces {prompt}, or follows the text after a blank line."""
    if PLACEHOLDER in text:
        return text.replace(PLACEHOLDER, prompt)
    return f"{text}\n\n{prompt}" if text else prompt


def apply_to_messages(text: str, messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Apply a template to a conversation.

    A text with {prompt} is put around the user's last message. Any other text becomes the system
    message, or is prepended to it if there is one: many chat templates do not take a second one.
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
    # a message with tool calls may have no content
    content = message.get("content")
    return "" if content is None else content_text(content)
