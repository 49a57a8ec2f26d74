"""What a row becomes, token by token, to be looked at: template, prompt, loss, what is cut."""

import json
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

from fastpref.data.audit.token_texts import TokenSpans, token_spans
from fastpref.data.counts import REMARK_TEXTS
from fastpref.data.encode_row import (
    EncodedPair,
    EncodeOptions,
    encode_row,
    keeps_end,
    named_responses,
)
from fastpref.data.layouts.row_values import RowError, string_leaves
from fastpref.data.places import place_of
from fastpref.data.rendered_parts import text_leaves
from fastpref.data.row_tokens import RowTexts, RowTokens, row_texts, tokenize_rows

PROMPT, LOSS, MASKED, CUT = "prompt", "loss", "masked", "cut"
"""What becomes of a token: it is read alone, it is learned, its weight is 0, it is left out."""


class ShownToken(NamedTuple):
    """A token as the page shows it."""

    id: int
    text: str
    fate: str
    """One of `PROMPT`, `LOSS`, `MASKED`, `CUT`."""
    is_template: bool
    """Put there by the chat template, or the EOS that ends a response."""
    weight: float | None = None
    """None where the loss has no token weights, or the token is not in it."""


class ShownPart(NamedTuple):
    """The prompt or a response."""

    name: str
    tokens: Sequence[ShownToken]
    text: str = ""
    """Of a row that has no tokens."""

    @property
    def num_kept(self) -> int:
        """Tokens that are not cut."""
        return sum(token.fate != CUT for token in self.tokens)


class ShownRow(NamedTuple):
    """A row as the page shows it."""

    labels: tuple[str, ...]
    """Why it is shown: "first row", "longest", ….."""
    place: str
    """Its file and line."""
    drop: str
    """Why it is left out, "" for one to train on."""
    remarks: Sequence[str]
    parts: Sequence[ShownPart]


class RowView(NamedTuple):
    """What rows of one source are looked at with."""

    tokenizer: Any
    options: EncodeOptions
    """Those of the source, see `options_of_source`."""
    files: Sequence[str]
    """Of the source, as messages call them."""

    def show(self, row: dict[str, Any], labels: tuple[str, ...], *, drop: str = "") -> ShownRow:
        """A checked row, encoded as training does it.

        Args:
            row: With the columns `FEATURES`.
            labels: Why it is shown.
            drop: Why it was left out before it was encoded.
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
            encoded = encode_row(row, tokens, self.tokenizer.eos_token_id, options)
        except RowError as error:
            return ShownRow(labels, place, str(error), (), _texts_as_they_came(row))
        parts = list(self._parts(row, list(responses), texts, tokens, encoded))
        if options.reverse_dataset and not options.sft:
            # the sides have changed their names
            parts[1:] = [
                ShownPart(name, part.tokens)
                for name, part in zip(responses, parts[:0:-1], strict=True)
            ]
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
        """Prompt and responses, in the order of the file."""
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
        # where chosen and rejected were exchanged the file's first response is encoded as second
        order = [1, 0] if self.options.reverse_dataset and not self.options.sft else [0, 1]
        eos_id, eos = self.tokenizer.eos_token_id, self.tokenizer.eos_token
        for name, place, response, pieces, mask in zip(
            names, order, tokens.responses, response_pieces, response_masks, strict=False
        ):
            ids = [*response, eos_id]
            fates = _response_fates(encoded, place, len(ids))
            yield ShownPart(name, _shown_tokens(ids, [*pieces, eos], [*mask, True], fates))

    def _spans(self, texts: RowTexts, tokens: RowTokens) -> list[TokenSpans]:
        """Where the tokens of prompt and responses stand in their texts."""
        if not texts.is_chat:
            every_text = (texts.prompt, *texts.responses)
            every_ids = (tokens.prompt, *tokens.responses)
            return [
                token_spans(text, ids, self.tokenizer)
                for text, ids in zip(every_text, every_ids, strict=True)
            ]
        # a conversation is tokenized whole
        num_prompt = len(tokens.prompt)
        wholes = [
            token_spans(texts.prompt + text, [*tokens.prompt, *ids], self.tokenizer)
            for text, ids in zip(texts.responses, tokens.responses, strict=True)
        ]
        prompt = TokenSpans(wholes[0].text, wholes[0].spans[:num_prompt])
        return [prompt, *(TokenSpans(whole.text, whole.spans[num_prompt:]) for whole in wholes)]


Fate = tuple[str, float | None]
"""What becomes of a token, and its weight."""


def _prompt_fates(num_kept: int, num_tokens: int, *, keep_end: bool) -> list[Fate]:
    """Of a prompt's tokens, of which so many are kept at its end or its start."""
    kept, cut = [(PROMPT, None)] * num_kept, [(CUT, None)] * (num_tokens - num_kept)
    return [*cut, *kept] if keep_end else [*kept, *cut]


def _response_fates(encoded: EncodedPair, place: int, num_tokens: int) -> list[Fate]:
    """Of a response's tokens, its EOS among them.

    Args:
        encoded: The row as it is trained on; it has no responses where it is left out.
        place: Of the response among its own.
        num_tokens: Of the response before anything is cut.
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
    """Of prompt and responses, which tokens a chat template has put there: those that hold nothing
    of what the messages say."""
    if not texts.is_chat:
        return [[False] * len(part.spans) for part in parts]
    tools = json.loads(row["tools"]) if row["tools"] else []
    said = [[text for _, text in string_leaves(tools)] + _said(row["prompt"])]
    said += [_said(row[name]) for name in names]
    # each part's own place in its text, which may be another than the template's
    starts = [0, *(part.spans[0][0] for part in parts[1:])]
    masks = []
    for part, leaves, start in zip(parts, said, starts, strict=True):
        is_said = said_characters(part.text, leaves, start)
        # of the bytes of one character all but the last have no text
        masks.append([a < b and not any(is_said[a:b]) for a, b in part.spans])
    return masks


def _said(messages: str) -> list[str]:
    return [text for message in json.loads(messages) for _, text in text_leaves(message)]


def said_characters(text: str, leaves: Sequence[str], start: int) -> list[bool]:
    """Which characters of a rendered conversation are those of some texts.

    Args:
        text: The conversation.
        leaves: In the order in which they are expected; one that is not there is passed over.
        start: Where to begin to look.
    """
    is_said = [False] * len(text)
    reached = start
    for leaf in leaves:
        wanted = leaf.strip()
        if not wanted:
            continue
        place = _find_whole(text, wanted, reached)
        if place < 0:
            # written before what was expected to come first
            place = _find_whole(text, wanted, start)
        else:
            reached = place + len(wanted)
        if place >= 0:
            is_said[place : place + len(wanted)] = [True] * len(wanted)
    return is_said


def _find_whole(text: str, wanted: str, start: int) -> int:
    """Where a text stands, not within a word: "a" is not found in "assistant"."""
    place = text.find(wanted, start)
    while place >= 0:
        end = place + len(wanted)
        # without a neighbour two characters are one
        neighbours = (text[max(0, place - 1) : place + 1], text[end - 1 : end + 1])
        if not any(len(pair) == 2 and pair.isalnum() for pair in neighbours):
            return place
        place = text.find(wanted, place + 1)
    return -1


def _texts_as_they_came(row: dict[str, Any]) -> list[ShownPart]:
    """The texts of a row without tokens; of a malformed one there are none."""
    names = ("prompt", "chosen", "rejected")
    return [ShownPart(name, (), row[name]) for name in names if any(row[field] for field in names)]
