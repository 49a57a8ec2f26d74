"""Records of encoded rows for display: each token's text, weight, and role in training."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fastpref.data.audit.token_texts import TokenSpans, token_spans
from fastpref.data.encode_row import (
    EncodedPair,
    EncodeOptions,
    encode_row,
    keeps_end,
    named_responses,
)
from fastpref.data.layouts.row_values import RowError, string_leaves
from fastpref.data.places import place_of
from fastpref.data.remarks import REMARK_TEXTS
from fastpref.data.rendered_parts import text_leaves
from fastpref.data.row_tokens import RowTexts, RowTokens, row_texts, tokenize_rows

PROMPT, LOSS, MASKED, CUT = "prompt", "loss", "masked", "cut"
"""A token's fate: context only, in the loss, in the loss with weight 0, cut by truncation."""


class ShownToken(NamedTuple):
    """A token as the page shows it."""

    id: int
    text: str
    fate: str
    """One of `PROMPT`, `LOSS`, `MASKED`, `CUT`."""
    is_template: bool
    """Added by the chat template, or the appended EOS."""
    weight: float | None = None
    """Token weight; None if the loss is not weighted or the token is not in it."""


class ShownPart(NamedTuple):
    """The prompt or a response."""

    name: str
    tokens: Sequence[ShownToken]
    text: str = ""
    """Text of a row that was not tokenized."""

    @property
    def num_kept(self) -> int:
        """Number of tokens that are not cut."""
        return sum(token.fate != CUT for token in self.tokens)


class ShownRow(NamedTuple):
    """A row as the page shows it."""

    labels: tuple[str, ...]
    """Why it is shown: "first row", "longest", ….."""
    place: str
    """Its file and line."""
    drop: str
    """Why the row is left out; "" if it is kept."""
    remarks: Sequence[str]
    parts: Sequence[ShownPart]


class RowView(NamedTuple):
    """Converts rows of one source to `ShownRow`."""

    tokenizer: Any
    options: EncodeOptions
    """Options of the source, see `options_of_source`."""
    files: Sequence[str]
    """Files of the source, as in `Location.files`."""

    def show(self, row: dict[str, Any], labels: tuple[str, ...], *, drop: str = "") -> ShownRow:
        """Encode a checked row as training does.

        Args:
            row: With the columns `FEATURES`.
            labels: Why it is shown.
            drop: Why it was dropped before encoding, "" if it was not.
        """
        place = place_of(self.files, row["row"])
        drop = drop or row["drop"]
        if drop:
            notes = [row["note"]] if row["note"] else []
            return ShownRow(labels, place, drop, notes, _texts_as_they_came(row))
        options = self.options
        responses = named_responses(row, options)
        chat = options.chat(self.tokenizer)
        texts = row_texts(row, responses, chat, strict=options.strict)
        [tokens] = tokenize_rows([texts], self.tokenizer)
        try:
            if isinstance(tokens, RowError):
                raise tokens
            encoded = encode_row(row, tokens, self.tokenizer, options)
        except RowError as error:
            return ShownRow(labels, place, str(error), (), _texts_as_they_came(row))
        parts = list(self._parts(row, list(responses), texts, tokens, encoded))
        remarks = [text for remark, text in REMARK_TEXTS.items() if remark & encoded.remarks]
        return ShownRow(labels, place, encoded.drop, remarks, parts)

    def _parts(
        self,
        row: dict[str, Any],
        names: list[str],
        texts: RowTexts,
        tokens: RowTokens,
        encoded: EncodedPair,
    ) -> Iterator[ShownPart]:
        """Prompt and responses, named as in training: `reverse_dataset` swaps the file's two."""
        spans = self._spans(texts, tokens)
        prompt_pieces, *response_pieces = map(_texts, spans)
        prompt_mask, *response_masks = _template_masks(row, names, texts, spans)
        prompt_fates = _prompt_fates(
            len(encoded.prompt_ids),
            len(tokens.prompt),
            keep_end=keeps_end(row["form"], self.options),
        )
        yield ShownPart(
            "prompt", _shown_tokens(tokens.prompt, prompt_pieces, prompt_mask, prompt_fates)
        )
        in_order = list(zip(tokens.responses, response_pieces, response_masks, strict=True))
        if self.options.reverse_dataset:
            in_order.reverse()
        eos_id, eos = self.tokenizer.eos_token_id, self.tokenizer.eos_token
        for place, (name, (response, pieces, mask)) in enumerate(zip(names, in_order, strict=True)):
            ids = [*response, eos_id]
            fates = _response_fates(encoded, place, len(ids))
            yield ShownPart(name, _shown_tokens(ids, [*pieces, eos], [*mask, True], fates))

    def _spans(self, texts: RowTexts, tokens: RowTokens) -> list[TokenSpans]:
        """Spans of the tokens of the prompt and of each response."""
        if not texts.is_chat:
            every_text = (texts.prompt, *texts.responses)
            every_ids = (tokens.prompt, *tokens.responses)
            return [
                token_spans(text, ids, self.tokenizer)
                for text, ids in zip(every_text, every_ids, strict=True)
            ]
        # a conversation was tokenized whole
        num_prompt = len(tokens.prompt)
        wholes = [
            token_spans(texts.prompt + text, [*tokens.prompt, *ids], self.tokenizer)
            for text, ids in zip(texts.responses, tokens.responses, strict=True)
        ]
        prompt = TokenSpans(wholes[0].text, wholes[0].spans[:num_prompt])
        return [prompt, *(TokenSpans(whole.text, whole.spans[num_prompt:]) for whole in wholes)]


Fate = tuple[str, float | None]
"""One of `PROMPT`, `LOSS`, `MASKED`, `CUT`, and the token's weight."""


def _prompt_fates(num_kept: int, num_tokens: int, *, keep_end: bool) -> list[Fate]:
    """Fates of a prompt's tokens, of which the last or the first `num_kept` are kept."""
    kept, cut = [(PROMPT, None)] * num_kept, [(CUT, None)] * (num_tokens - num_kept)
    return [*cut, *kept] if keep_end else [*kept, *cut]


def _response_fates(encoded: EncodedPair, place: int, num_tokens: int) -> list[Fate]:
    """Fates of a response's tokens, including its EOS.

    Args:
        encoded: The encoded row, which has no responses if it is dropped.
        place: Index of the response in it.
        num_tokens: Tokens of the response before truncation.
    """
    num_kept = len(encoded.response_ids[place]) if encoded.response_ids else 0
    weights: Sequence[float | None] = [None] * num_kept
    if encoded.response_weights:
        weights = encoded.response_weights[place]
    learned = encoded.scored[place] if encoded.scored else None
    kept = [
        ((MASKED if weight == 0 else LOSS), weight) if is_learned else (PROMPT, None)
        for weight, is_learned in zip(weights, learned or [True] * num_kept, strict=True)
    ]
    return [*kept, *[(CUT, None)] * (num_tokens - num_kept)]


def _shown_tokens(
    ids: Sequence[int], texts: Sequence[str], is_template: Sequence[bool], fates: Sequence[Fate]
) -> list[ShownToken]:
    return [
        ShownToken(id, text, fate, of_template, weight)
        for id, text, of_template, (fate, weight) in zip(
            ids, texts, is_template, fates, strict=True
        )
    ]


def _texts(spans: TokenSpans) -> list[str]:
    return [spans.text[start:end] for start, end in spans.spans]


def _template_masks(
    row: dict[str, Any], names: Sequence[str], texts: RowTexts, parts: Sequence[TokenSpans]
) -> list[list[bool]]:
    """For prompt and responses, which tokens come from the chat template: those that contain no
    character of the messages' texts."""
    if not texts.is_chat:
        return [[False] * len(part.spans) for part in parts]
    tools = json.loads(row["tools"]) if row["tools"] else []
    said = [[text for _, text in string_leaves(tools)] + _said(row["prompt"])]
    said += [_said(row[name]) for name in names]
    # a response begins at its first token in the whole conversation; an empty one has none
    starts = [0, *(part.spans[0][0] if part.spans else 0 for part in parts[1:])]
    masks = []
    for part, leaves, start in zip(parts, said, starts, strict=True):
        is_said = said_characters(part.text, leaves, start)
        # of several byte tokens of one character, all but the last have an empty span
        masks.append([a < b and not any(is_said[a:b]) for a, b in part.spans])
    return masks


def _said(messages: str) -> list[str]:
    return [text for message in json.loads(messages) for _, text in text_leaves(message)]


def said_characters(text: str, leaves: Sequence[str], start: int) -> list[bool]:
    """Which characters of a rendered conversation belong to the texts of its messages.

    Args:
        text: The conversation.
        leaves: Texts of the messages in their expected order; missing ones are skipped.
        start: Character at which the search begins.
    """
    is_said = [False] * len(text)
    reached = start
    for leaf in leaves:
        wanted = leaf.strip()
        if not wanted:
            continue
        place = _find_whole(text, wanted, reached)
        if place < 0:
            # rendered out of order
            place = _find_whole(text, wanted, start)
        else:
            reached = place + len(wanted)
        if place >= 0:
            is_said[place : place + len(wanted)] = [True] * len(wanted)
    return is_said


def _find_whole(text: str, wanted: str, start: int) -> int:
    """Find a text at word boundaries ("a" is not found in "assistant"); -1 if it is missing."""
    place = text.find(wanted, start)
    while place >= 0:
        end = place + len(wanted)
        # at a border of the text a pair has one character
        neighbours = (text[max(0, place - 1) : place + 1], text[end - 1 : end + 1])
        if not any(len(pair) == 2 and pair.isalnum() for pair in neighbours):
            return place
        place = text.find(wanted, place + 1)
    return -1


def _texts_as_they_came(row: dict[str, Any]) -> list[ShownPart]:
    """Untokenized texts of a row; empty for a malformed one."""
    names = ("prompt", "chosen", "rejected")
    return [ShownPart(name, (), row[name]) for name in names if any(row[field] for field in names)]
