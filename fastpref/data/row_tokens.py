"""Tokenize rows, for training and for the estimation of token weights alike.

Plain texts: prompt and response are tokenized separately, as in the DPO, TDPO and TIS-DPO
repositories. Conversations: the rendered whole is tokenized and then divided into prompt and
response, so that the tokens are those of inference.
"""

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastpref.data.chat import ChatFormat, RenderedChat, render_chat
from fastpref.data.counts import JOINED_ROWS
from fastpref.data.layouts.row_values import RowError, refusing_depth
from fastpref.data.layouts.rows import EMPTY_PROMPT, EMPTY_RESPONSE, in_source
from fastpref.data.remarks import Remark
from fastpref.data.speakers import Spans, written_tokens

Ids = list[int]
Scored = list[bool] | None
"""Whether each token of a response is in the loss; None: all are."""
Offsets = Sequence[tuple[int, int]]

TOKENIZE = {"add_special_tokens": False, "return_attention_mask": False, "verbose": False}
"""Tokenizer arguments: no special tokens except those spelled out in the text."""


class RowTexts(NamedTuple):
    """Prompt and responses of a row as texts."""

    prompt: str = ""
    responses: Sequence[str] = ()
    is_chat: bool = False
    remarks: Remark = Remark(0)
    note: str = ""
    """Path of the first response field that the chat template does not render."""
    written: Sequence[Spans | None] = (None, None)
    """For each response, spans of prompt + response that the assistant writes; None: all of it."""
    error: RowError | None = None
    """Why the row could not be rendered."""


class RowTokens(NamedTuple):
    """Prompt and responses of a row as token ids, before truncation."""

    prompt: Ids
    responses: Sequence[Ids]
    """Without an EOS at the end of the text, which token weights do not cover."""
    remarks: Remark = Remark(0)
    note: str = ""
    drop: str = ""
    """Reason to drop the row, "" to keep it."""
    scored: Sequence[Scored] = (None, None)
    """For each response, whether each token and the EOS to be appended is in the loss."""


def row_texts(
    row: dict[str, Any], responses: dict[str, str], chat: ChatFormat, *, strict: bool = False
) -> RowTexts:
    """The texts of a checked row, with conversations rendered.

    Args:
        row: A checked row; prompt, form, tools and fields are read.
        responses: Column -> response.
        chat: Renders conversations.
        strict: Refuse a row whose rendered prompt is no prefix of prompt + response.

    Returns:
        The texts, or a record with the template's error.

    Raises:
        ConfigError: the template cannot render any conversation.
    """
    if row["form"] != "chat":
        return RowTexts(row["prompt"], list(responses.values()))
    try:
        with refusing_depth():
            rendered = render_chat(
                row["prompt"],
                list(responses.values()),
                chat,
                tools=row["tools"],
                fields=tuple(responses),
            )
    except RowError as error:
        # raises if the fault is the template's, not the row's
        chat.check()
        return RowTexts(error=RowError(str(error), in_source(error.field, row)))
    if strict and not rendered.is_prefix:
        message = "the rendered prompt does not start prompt + response (data.strict=true)"
        return RowTexts(error=RowError(message))
    note = in_source(rendered.left_out, row)
    return RowTexts(
        rendered.prompt, rendered.responses, True, _chat_remarks(rendered), note, rendered.written
    )


def tokenize_rows(
    rows: Sequence[RowTexts], tokenizer: Any, *, first: int = JOINED_ROWS
) -> list[RowTokens | RowError]:
    """Token ids of rows; a row without valid tokens gives a `RowError` in its place.

    Args:
        rows: Any number; a fast tokenizer processes them in parallel threads.
        tokenizer: A transformers tokenizer.
        first: Index of the first of these rows in its source; text rows with an index below
            `JOINED_ROWS` are checked for `Remark.JOINED_DIFFERS`.
    """
    texts = [row for row in rows if row.error is None and not row.is_chat]
    chats = [row for row in rows if row.error is None and row.is_chat]
    apart = _tokenize_apart(texts, tokenizer)
    among_first = rows[: max(0, JOINED_ROWS - first)]
    num_joined = sum(row.error is None and not row.is_chat for row in among_first)
    joined = iter(_differ_when_joined(texts[:num_joined], apart[:num_joined], tokenizer))
    divided = iter(apart)
    whole = iter(
        _tokenize_by_offsets(chats, tokenizer)
        if tokenizer.is_fast
        else _tokenize_without_offsets(chats, tokenizer)
    )
    outcomes: list[RowTokens | RowError] = []
    for row in rows:
        if row.error is not None:
            outcomes.append(row.error)
            continue
        if row.is_chat:
            outcomes.append(_outcome(row, next(whole), tokenizer))
        else:
            remarks = Remark.JOINED_DIFFERS if next(joined, False) else Remark(0)
            outcomes.append(_outcome(row, RowTokens(*next(divided), remarks), tokenizer))
    return outcomes


def tokenize(tokenizer: Any, texts: list[str]) -> list[Ids]:
    """Ids of each text, without special tokens except those spelled out in the text."""
    return tokenizer(texts, **TOKENIZE)["input_ids"] if texts else []


def without_final_eos(ids: Ids, eos_id: int) -> Ids:
    """A response's ids without an EOS spelled at its end, which token weights do not cover."""
    return ids[:-1] if ids and ids[-1] == eos_id else ids


def divide_by_offsets(border: int, ids: Sequence[Ids], offsets: Sequence[Offsets]) -> int:
    """Number of prompt tokens in tokenized texts that share a prompt.

    Args:
        border: Characters of the prompt, with which all texts begin.
        ids, offsets: For each text, its token ids and their [start, end) characters.

    Returns:
        Length of the longest common token prefix whose tokens end within the prompt: a token
        across the border belongs to the response.
    """
    runs = [
        next((i for i, (_, end) in enumerate(spans) if end > border), len(spans))
        for spans in offsets
    ]
    shortest = min(runs)
    columns = zip(*(part[:shortest] for part in ids), strict=True)
    return next((i for i, column in enumerate(columns) if len(set(column)) > 1), shortest)


def _tokenize_apart(rows: Sequence[RowTexts], tokenizer: Any) -> list[tuple[Ids, list[Ids]]]:
    ids = iter(tokenize(tokenizer, [text for row in rows for text in (row.prompt, *row.responses)]))
    return [(next(ids), [next(ids) for _ in row.responses]) for row in rows]


def _tokenize_joined(rows: Sequence[RowTexts], tokenizer: Any) -> list[list[Ids]]:
    ids = iter(tokenize(tokenizer, [row.prompt + text for row in rows for text in row.responses]))
    return [[next(ids) for _ in row.responses] for row in rows]


def _differ_when_joined(
    rows: Sequence[RowTexts], apart: Sequence[tuple[Ids, list[Ids]]], tokenizer: Any
) -> list[bool]:
    return [
        whole != [prompt + response for response in responses]
        for whole, (prompt, responses) in zip(_tokenize_joined(rows, tokenizer), apart, strict=True)
    ]


def _tokenize_by_offsets(rows: Sequence[RowTexts], tokenizer: Any) -> list[RowTokens]:
    texts = [row.prompt + response for row in rows for response in row.responses]
    if not texts:
        return []
    encoded = tokenizer(texts, return_offsets_mapping=True, **TOKENIZE)
    all_ids, all_offsets = iter(encoded["input_ids"]), iter(encoded["offset_mapping"])
    outcomes = []
    for row in rows:
        ids = [next(all_ids) for _ in row.responses]
        offsets = [next(all_offsets) for _ in row.responses]
        border = len(row.prompt)
        length = divide_by_offsets(border, ids, offsets)
        prompt = ids[0][:length]
        # a prompt not covered to its end is continued by a response token, or ends in white space
        # that no token covers (WordPiece)
        reached = offsets[0][length - 1][1] if length else 0
        crosses = reached < border and tokenize(tokenizer, [row.prompt]) != [prompt]
        remarks = Remark.BORDER_TOKEN if crosses else Remark(0)
        scored = [
            _scored(of_response[length:], spans, border + len(response))
            for of_response, spans, response in zip(
                offsets, row.written, row.responses, strict=False
            )
        ]
        responses = [part[length:] for part in ids]
        outcomes.append(RowTokens(prompt, responses, remarks, scored=scored))
    return outcomes


def _scored(offsets: Offsets, spans: Spans | None, end: int) -> Scored:
    """Whether each token of a response and its EOS is in the loss.

    Args:
        offsets: [start, end) characters of the response's tokens in prompt + response.
        spans: Spans of prompt + response that the assistant writes; None: the whole response.
        end: Characters of prompt + response.
    """
    if spans is None:
        return None
    return [*written_tokens(offsets, spans), bool(spans) and spans[-1][1] == end]


def _tokenize_without_offsets(rows: Sequence[RowTexts], tokenizer: Any) -> list[RowTokens]:
    outcomes = []
    for row, whole, (prompt, responses) in zip(
        rows, _tokenize_joined(rows, tokenizer), _tokenize_apart(rows, tokenizer), strict=True
    ):
        has_spans = any(spans is not None for spans in row.written)
        remarks = Remark.OTHERS_IN_LOSS if has_spans else Remark(0)
        if all(ids[: len(prompt)] == prompt for ids in whole):
            outcomes.append(RowTokens(prompt, [ids[len(prompt) :] for ids in whole], remarks))
        else:
            outcomes.append(RowTokens(prompt, responses, remarks | Remark.TOKENIZED_APART))
    return outcomes


def _outcome(row: RowTexts, tokens: RowTokens, tokenizer: Any) -> RowTokens | RowError:
    prompt, responses, remarks, *_ = tokens
    if not prompt:
        return RowError(EMPTY_PROMPT, "prompt")
    eos_id = tokenizer.eos_token_id
    stripped = [without_final_eos(response, eos_id) for response in responses]
    is_blank = row.is_chat and not all(text.strip() for text in row.responses)
    drop = EMPTY_RESPONSE if is_blank or not all(stripped) else ""
    remarks |= row.remarks
    remarks |= Remark.EOS_AT_END if stripped != responses else 0
    # every turn of a conversation may end in EOS: there the messages' own texts are searched
    has_eos = not row.is_chat and any(eos_id in part for part in (prompt, *stripped))
    remarks |= Remark.EOS_INSIDE if has_eos else 0
    remarks |= Remark.TWO_BOS if prompt[:2] == [tokenizer.bos_token_id] * 2 else 0
    scored = [
        # the last mark is that of the EOS to be appended
        marks and [*marks[: len(ids)], marks[-1]]
        for ids, marks in zip(stripped, tokens.scored, strict=False)
    ]
    return RowTokens(prompt, stripped, remarks, row.note, drop, scored)


def _chat_remarks(rendered: RenderedChat) -> Remark:
    remarks = Remark(0)
    remarks |= Remark.TEMPLATE_SPLIT if not rendered.is_prefix else 0
    remarks |= Remark.ARGUMENTS_DECODED if rendered.arguments_decoded else 0
    remarks |= Remark.RESPONSE_NOT_RENDERED if rendered.left_out else 0
    remarks |= Remark.PROMPT_NOT_RENDERED if rendered.prompt_left_out else 0
    remarks |= Remark.EOS_ADDED if rendered.eos_added else 0
    remarks |= Remark.EOS_INSIDE if rendered.eos_spelled else 0
    remarks |= Remark.OTHERS_IN_LOSS if rendered.others_in_loss else 0
    return remarks
