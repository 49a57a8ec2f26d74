"""Conversations rendered by the tokenizer's chat template into prompt and response texts."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property, partial
from itertools import takewhile
from pathlib import Path
from typing import Any, NamedTuple

from jinja2 import TemplateError, TemplateSyntaxError

from fastpref.checks import hint
from fastpref.data.chat_date import DATE_MACRO, DATE_VARIABLE, date_texts
from fastpref.data.layouts.messages import Messages
from fastpref.data.layouts.row_values import RowError
from fastpref.data.rendered_parts import field_left_out, prompt_is_left_out, spells_eos
from fastpref.data.speakers import Spans, others_are_learned, written_spans
from fastpref.errors import ConfigError, first_line

PLAIN_EXCHANGE = [
    {"role": "user", "content": "What is 2 + 2?"},
    {"role": "assistant", "content": "4."},
]

WORD = re.compile(r"[A-Za-z_]\w*")


@dataclass(frozen=True, kw_only=True)
class ChatFormat:
    """How conversations become text."""

    tokenizer: Any
    """Of transformers."""
    template: str | None
    """Jinja text; None for the tokenizer's own."""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    """What the template is told beside the messages, `data.template_kwargs`."""
    date: str | None = None
    """The day that a template which prints it is told, "2026-11-30"; None where none does."""

    @property
    def name(self) -> str:
        """Where the template comes from, for messages."""
        return "the tokenizer's chat template" if self.template is None else "data.chat_template"

    @cached_property
    def closing(self) -> str:
        """What the template puts behind the EOS of an answer, white space at its ends aside; "" for
        nothing. There a model has stopped: a generation prompt, which some put last always."""
        try:
            text = self.render(PLAIN_EXCHANGE)
        except RowError:
            return ""
        _, _, end = text.rpartition(PLAIN_EXCHANGE[-1]["content"])
        return end.partition(self.tokenizer.eos_token)[2].strip()

    def render(
        self, messages: Messages, tools: Messages | None = None, *, generation_prompt: bool = False
    ) -> str:
        """The text of a conversation.

        Raises:
            RowError: the template refuses the messages or fails on them.
            ConfigError: it is no Jinja.
        """
        template, variables, added_lines = self.template, {}, 0
        if self.date is not None:
            template = DATE_MACRO + self.tokenizer.get_chat_template(self.template, tools)
            variables, added_lines = {DATE_VARIABLE: date_texts(self.date)}, 1
        try:
            [text] = self.tokenizer.apply_chat_template(
                # a list of one: an empty conversation by itself is taken for no conversation
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
        # a template is a program, and whatever Python raises may come out of it
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
            ConfigError: with what the template says.
        """
        try:
            self.render(PLAIN_EXCHANGE[:1], generation_prompt=True)
            self.render(PLAIN_EXCHANGE)
        except RowError as error:
            hint = "" if self.template is not None else "; data.chat_template=FILE replaces it"
            raise ConfigError(
                f"{self.name} cannot render one user and one assistant message: {error}{hint}"
            ) from None


class RenderedChat(NamedTuple):
    """The texts of a row of messages."""

    prompt: str
    responses: list[str]
    is_prefix: bool
    """The prompt as rendered starts every prompt + response; else they are divided where they
    part."""
    arguments_decoded: bool = False
    """The template fails on the arguments of tool calls as they came, JSON text."""
    left_out: str = ""
    """The first field of a response that its text does not hold, "chosen.reasoning_content"."""
    prompt_left_out: bool = False
    """A tool or a system message is not in the prompt's text."""
    eos_added: bool = False
    """The template does not end a response with EOS."""
    eos_spelled: bool = False
    """A message spells EOS out, before its end."""
    written: Sequence[Spans | None] = (None, None)
    """What of prompt + response the assistant writes; None: all of the response."""
    others_in_loss: bool = False
    """Others speak in a response, and where is not known."""


def read_chat_template(path: str | None) -> str | None:
    """The Jinja text of `data.chat_template`, None where there is none.

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
    """Refuse a tokenizer that cannot render conversations.

    Args:
        tokenizer: Of transformers.
        template: Jinja text of `data.chat_template`; None for the tokenizer's own.
        arguments: `data.template_kwargs`; None for none.

    Raises:
        ConfigError: it has no chat template and no file was given, or the template does not know an
            argument.
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
    """Whether the chat template asks for the date: what it renders then changes by the day."""
    return any("strftime_now" in text for text in _template_texts(tokenizer, template))


def current_date(tokenizer: Any) -> str:
    """The day that a chat template prints now, "2026-11-30"."""
    # as transformers has it, whose clock the template would read
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

    A response is what the template adds to the prompt with its generation prompt. The EOS that the
    template puts last is taken off, and what it puts behind it: the encoder appends EOS.

    Args:
        prompt, responses: JSON lists of messages.
        chat: The template, and what it is told.
        tools: JSON list of the schemas of tools, None where there are none.
        fields: Names of the responses in the row, for messages.

    Raises:
        RowError: the template refuses the messages or fails on them.
        ConfigError: the template is no Jinja.
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
    shared = _shared_start(prompt_text, full_texts)
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
    """`text` without an EOS at its end, white space and `closing` after it; unchanged without."""
    stripped = text.rstrip().removesuffix(closing).rstrip()
    return stripped.removesuffix(eos_token) if stripped.endswith(eos_token) else text


def _template_texts(tokenizer: Any, template: str | None) -> list[str]:
    templates = tokenizer.chat_template if template is None else template
    # a tokenizer may have several, by name
    texts = templates.values() if isinstance(templates, dict) else [templates]
    return [text for text in texts if text]


def _render_row(
    messages: Messages,
    answers: list[Messages],
    tools: Messages | None,
    chat: ChatFormat,
    fields: tuple[str, ...],
) -> tuple[str, list[str]]:
    """Texts of the prompt and of each whole conversation; an error names the field."""

    def render(field: str, conversation: Messages) -> str:
        try:
            return chat.render(conversation, tools, generation_prompt=field == "prompt")
        except RowError as error:
            raise RowError(str(error), field) from None

    prompt_text = render("prompt", messages)
    whole = zip(fields, answers, strict=False)
    return prompt_text, [render(field, messages + answer) for field, answer in whole]


def _decode_arguments(messages: Messages) -> Messages:
    """The messages with the arguments of their tool calls as objects where they are JSON text."""

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
    if not isinstance(arguments, str):
        return arguments
    try:
        decoded = json.loads(arguments)
    except ValueError:
        return arguments
    return decoded if isinstance(decoded, dict) else arguments


def _shared_start(prompt: str, texts: list[str]) -> str:
    """The longest start of `prompt` that every text has too."""
    if all(text.startswith(prompt) for text in texts):
        return prompt
    columns = zip(prompt, *texts, strict=False)
    return "".join(column[0] for column in takewhile(lambda column: len(set(column)) == 1, columns))
