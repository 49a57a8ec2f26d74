"""Render conversations by a chat template into prompt and response texts."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError

from fastpref.checks import hint
from fastpref.data.chat_date import DATE_MACRO, DATE_VARIABLE, date_texts
from fastpref.data.layouts.messages import Messages
from fastpref.data.layouts.row_values import RowError
from fastpref.data.layouts.turns import loaded
from fastpref.data.rendered_parts import field_left_out, prompt_is_left_out, spells_eos
from fastpref.data.speakers import Spans, num_equal, others_are_learned, written_spans
from fastpref.errors import ConfigError, first_line

PLAIN_EXCHANGE = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4."},
]

WORD = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """A chat template with the arguments to render it with."""

    tokenizer: Any
    """A transformers tokenizer."""
    template: str | None
    """Jinja text; None for the tokenizer's own."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """Further variables of the template, `data.template_kwargs`."""
    date: str | None = None
    """Date given to a template that prints it, "2026-11-30"; None: not set."""

    @property
    def name(self) -> str:
        """Origin of the template, for error messages."""
        return "the tokenizer's chat template" if self.template is None else "data.chat_template"

    @cached_property
    def closing(self) -> str:
        """Text that the template puts behind the EOS of an answer, stripped; "" for none. Some
        templates always end with a generation prompt, which no model generates."""
        try:
            text = self.render(PLAIN_EXCHANGE)
        except RowError:
            return ""
        _, _, end = text.rpartition(PLAIN_EXCHANGE[-1]["content"])
        return end.partition(self.tokenizer.eos_token)[2].strip()

    def render(
        self, messages: Messages, tools: Messages | None = None, *, generation_prompt: bool = False
    ) -> str:
        """Render a conversation to text.

        Raises:
            RowError: the template refuses the messages or fails on them.
            ConfigError: the template is not valid Jinja.
        """
        template, variables, added_lines = self.template, {}, 0
        if self.date is not None:
            template = DATE_MACRO + self.tokenizer.get_chat_template(self.template, tools)
            variables, added_lines = {DATE_VARIABLE: date_texts(self.date)}, 1
        try:
            [text] = self.tokenizer.apply_chat_template(
                # a batch of one: transformers takes an empty conversation for an empty batch
                [messages],
                tools=tools,
                chat_template=template,
                tokenize=False,
                add_generation_prompt=generation_prompt,
                **variables,
                **self.arguments,
            )
        except TemplateSyntaxError as error:
            line = error.lineno - added_lines
            raise ConfigError(f"{self.name}: line {line}: {error.message}") from None
        except MemoryError:
            raise
        # a template is a program that may raise anything
        except Exception as error:
            reason = first_line(error)
            if type(error) is TemplateError:
                raise RowError(f"the chat template refuses the messages: {reason}") from None
            raise RowError(
                f"the chat template fails on the messages: {type(error).__name__}: {reason}"
            ) from None
        return text

    def check(self) -> None:
        """Refuse a template that cannot render even one question and its answer.

        Raises:
            ConfigError: with the template's own message.
        """
        try:
            self.render(PLAIN_EXCHANGE[:1], generation_prompt=True)
            self.render(PLAIN_EXCHANGE)
        except RowError as error:
            advice = "" if self.template is not None else "; data.chat_template=FILE replaces it"
            raise ConfigError(
                f"{self.name} cannot render one user and one assistant message: {error}{advice}"
            ) from None


class RenderedChat(NamedTuple):
    """A rendered row of messages."""

    prompt: str
    responses: list[str]
    is_prefix: bool
    """The rendered prompt is a prefix of every rendered conversation; else these are divided at
    the end of their common prefix with it."""
    arguments_decoded: bool = False
    """Tool-call arguments were decoded: the template fails on their JSON text."""
    left_out: str = ""
    """First field of a response that is not rendered, "chosen.reasoning_content"; "" for none."""
    prompt_left_out: bool = False
    """A tool or a system message is not rendered."""
    eos_added: bool = False
    """The template does not end some response with EOS."""
    eos_spelled: bool = False
    """A message contains EOS before its end."""
    written: Sequence[Spans | None] = (None, None)
    """For each response, spans of prompt + response that the assistant writes; None: all of it."""
    others_in_loss: bool = False
    """A response contains messages of other roles, whose spans could not be found."""


def read_chat_template(path: str | None) -> str | None:
    """Read the Jinja file of `data.chat_template`; None if the option is null.

    Raises:
        ConfigError: the file cannot be read.
    """
    if path is None:
        return None
    try:
        return Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"data.chat_template: {path} cannot be read: {error}") from None


def check_chat_template(
    tokenizer: Any, template: str | None, arguments: Mapping[str, Any] | None = None
) -> None:
    """Refuse a missing chat template, or arguments that the template does not mention.

    Args:
        tokenizer: A transformers tokenizer.
        template: Jinja text of `data.chat_template`; None for the tokenizer's own.
        arguments: `data.template_kwargs`; None for none.

    Raises:
        ConfigError: there is no chat template, or it does not mention an argument.
    """
    if template is None and not tokenizer.chat_template:
        raise ConfigError(
            "datasets: the rows are lists of messages and the tokenizer has no chat template; "
            "give a Jinja file by data.chat_template=FILE, or name a tokenizer with a template by "
            "model.tokenizer_name_or_path"
        )
    words = {word for text in _template_texts(tokenizer, template) for word in WORD.findall(text)}
    for name in arguments or ():
        if name not in words:
            source = ChatFormat(tokenizer=tokenizer, template=template).name
            raise ConfigError(
                f"data.template_kwargs.{name}: {source} does not mention {name}, so it would "
                f"change nothing{hint(name, words)}"
            )


def prints_date(tokenizer: Any, template: str | None) -> bool:
    """Whether the chat template prints the current date, so that its output changes daily."""
    return any("strftime_now" in text for text in _template_texts(tokenizer, template))


def current_date(tokenizer: Any) -> str:
    """Today's date as a chat template prints it, "2026-11-30"."""
    # rendered, because a template reads the clock of transformers
    template = "{{ strftime_now('%Y-%m-%d') }}"
    return ChatFormat(tokenizer=tokenizer, template=template).render(PLAIN_EXCHANGE)


def render_chat(
    prompt: str,
    responses: list[str],
    chat: ChatFormat,
    *,
    tools: str | None = None,
    fields: tuple[str, ...] = ("chosen", "rejected"),
) -> RenderedChat:
    """Render one prompt and its responses.

    A response is the text that follows the prompt with its generation prompt. A final EOS and
    anything that the template puts behind it are removed: the encoder appends EOS.

    Args:
        prompt, responses: JSON lists of messages.
        chat: The template and its arguments.
        tools: JSON list of tool schemas; None for none.
        fields: Names of the responses, for error messages.

    Raises:
        RowError: the template refuses the messages or fails on them.
        ConfigError: the template is not valid Jinja.
    """
    messages, answers = json.loads(prompt), [json.loads(response) for response in responses]
    schemas = None if tools is None else json.loads(tools)
    arguments_decoded = False
    try:
        prompt_text, full_texts = _render_row(messages, answers, schemas, chat, fields)
    except RowError as error:
        decoded = [_decode_arguments(part) for part in (messages, *answers)]
        if decoded == [messages, *answers]:
            raise
        messages, *answers = decoded
        try:
            prompt_text, full_texts = _render_row(messages, answers, schemas, chat, fields)
        except RowError:
            raise error from None
        arguments_decoded = True
    shared = prompt_text[: min(num_equal(prompt_text, text) for text in full_texts)]
    left_out = (
        field_left_out(field, answer, text, len(shared))
        for field, answer, text in zip(fields, answers, full_texts, strict=False)
    )
    eos_token = chat.tokenizer.eos_token
    rendered = [text[len(shared) :] for text in full_texts]
    stripped = [strip_final_eos(text, eos_token, chat.closing) for text in rendered]
    render = partial(chat.render, tools=schemas)
    written = written_spans(messages, answers, shared, stripped, render)
    return RenderedChat(
        prompt=shared,
        responses=stripped,
        is_prefix=shared == prompt_text,
        arguments_decoded=arguments_decoded,
        left_out=next(filter(None, left_out), ""),
        prompt_left_out=prompt_is_left_out(messages, schemas, prompt_text),
        eos_added=any(one == other for one, other in zip(rendered, stripped, strict=True)),
        eos_spelled=spells_eos([messages, *answers], eos_token),
        written=written,
        others_in_loss=others_are_learned(answers, written),
    )


def strip_final_eos(text: str, eos_token: str, closing: str = "") -> str:
    """Remove a final EOS and the white space and `closing` behind it; unchanged without EOS."""
    stripped = text.rstrip().removesuffix(closing).rstrip()
    return stripped.removesuffix(eos_token) if stripped.endswith(eos_token) else text


def _template_texts(tokenizer: Any, template: str | None) -> list[str]:
    templates = tokenizer.chat_template if template is None else template
    # a tokenizer may have several named templates
    texts = templates.values() if isinstance(templates, dict) else [templates]
    return [text for text in texts if text]


def _render_row(
    messages: Messages,
    answers: list[Messages],
    tools: Messages | None,
    chat: ChatFormat,
    fields: tuple[str, ...],
) -> tuple[str, list[str]]:
    """Render the prompt and each whole conversation; a RowError names the field."""

    def render(field: str, conversation: Messages) -> str:
        try:
            return chat.render(conversation, tools, generation_prompt=field == "prompt")
        except RowError as error:
            raise RowError(str(error), field) from None

    prompt_text = render("prompt", messages)
    whole = zip(fields, answers, strict=False)
    return prompt_text, [render(field, messages + answer) for field, answer in whole]


def _decode_arguments(messages: Messages) -> Messages:
    """Decode tool-call arguments that are JSON text of an object."""

    def decode(value: Any) -> Any:
        if isinstance(value, list):
            return [decode(item) for item in value]
        if not isinstance(value, dict):
            return value
        return {
            key: _object_of(item) if key == "arguments" else decode(item)
            for key, item in value.items()
        }

    keys = ("tool_calls", "function_call")
    return [
        {key: decode(value) if key in keys else value for key, value in message.items()}
        for message in messages
    ]


def _object_of(arguments: Any) -> Any:
    decoded = loaded(json.loads, arguments) if isinstance(arguments, str) else None
    return decoded if isinstance(decoded, dict) else arguments
