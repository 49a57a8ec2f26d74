"""Conversations rendered by the tokenizer's chat template into prompt and response texts."""

import json
from itertools import takewhile
from pathlib import Path
from typing import Any

from jinja2 import TemplateError, TemplateSyntaxError

from fastpref.errors import ConfigError
from fastpref.rows import RowError


def read_chat_template(path: str | None) -> str | None:
    """The Jinja text of `data.chat_template`, None where there is none.

    Raises:
        ConfigError: the file cannot be read.
    """
    if path is None:
        return None
    try:
        return Path(path).expanduser().read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.chat_template: {path} cannot be read: {error}") from None


def check_chat_template(tokenizer: Any, template: str | None) -> None:
    """Refuse a tokenizer that cannot render conversations.

    Raises:
        ConfigError: it has no chat template and no file was given.
    """
    if template is None and not tokenizer.chat_template:
        raise ConfigError(
            "datasets: the rows are lists of messages and the tokenizer has no chat template; "
            "give a Jinja file by data.chat_template=FILE, or name a tokenizer with a template by "
            "model.tokenizer_name_or_path"
        )


def render_chat(
    prompt: str, responses: list[str], tokenizer: Any, template: str | None
) -> tuple[str, list[str], bool]:
    """Render one prompt and its responses; each text is then tokenized without special tokens.

    A response is what the template adds to the prompt with its generation prompt. The EOS that the
    template puts last, white space after it included, is taken off: the encoder appends it.

    Args:
        prompt, responses: JSON lists of messages.
        tokenizer: Of transformers.
        template: Jinja text, None for the tokenizer's own.

    Returns:
        The prompt text, the response texts, and whether the prompt as rendered starts every
        prompt + response; where it does not, they are divided where they part.

    Raises:
        RowError: the template refuses the messages.
        ConfigError: the template is no Jinja.
    """
    messages = json.loads(prompt)
    conversations = [messages + json.loads(response) for response in responses]
    try:
        [prompt_text] = tokenizer.apply_chat_template(
            [messages], chat_template=template, tokenize=False, add_generation_prompt=True
        )
        full_texts = tokenizer.apply_chat_template(
            conversations, chat_template=template, tokenize=False
        )
    except TemplateSyntaxError as error:
        raise ConfigError(f"data.chat_template: line {error.lineno}: {error}") from None
    except TemplateError as error:
        raise RowError(f"the chat template refuses the messages: {error}") from None
    shared = _shared_start(prompt_text, full_texts)
    parts = [strip_final_eos(text[len(shared) :], tokenizer.eos_token) for text in full_texts]
    return shared, parts, shared == prompt_text


def strip_final_eos(text: str, eos_token: str) -> str:
    """`text` without an EOS at its end and the white space after it; unchanged without EOS."""
    stripped = text.rstrip()
    return stripped.removesuffix(eos_token) if stripped.endswith(eos_token) else text


def _shared_start(prompt: str, texts: list[str]) -> str:
    """The longest start of `prompt` that every text has too."""
    if all(text.startswith(prompt) for text in texts):
        return prompt
    columns = zip(prompt, *texts, strict=False)
    return "".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))
