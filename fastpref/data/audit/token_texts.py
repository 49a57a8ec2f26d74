"""The text of each token, to be looked at."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from fastpref.data.row_tokens import TOKENIZE
from fastpref.data.speakers import num_equal

MOST_DECODED = 1000
"""Tokens whose texts are found by decoding ever longer starts of them."""


class TokenSpans(NamedTuple):
    """A text, and where in it each token stands."""

    text: str
    spans: list[tuple[int, int]]
    """[start, end) characters of each token, ascending; a character spread over tokens is the
    last one's."""


def token_spans(text: str, ids: Sequence[int], tokenizer: Any) -> TokenSpans:
    """Where the tokens that a text begins with stand in it.

    Args:
        text: That was tokenized.
        ids: Of its first tokens.
        tokenizer: Of transformers. Where it tells no offsets they are found by decoding, and where
            what comes out is another text, by more than its blanks, they are those in that.
    """
    if tokenizer.is_fast:
        encoded = tokenizer(text, return_offsets_mapping=True, **TOKENIZE)
        if encoded["input_ids"][: len(ids)] == list(ids):
            return TokenSpans(text, _side_by_side(encoded["offset_mapping"][: len(ids)]))
    decoded = _decoded_spans(ids[:MOST_DECODED], tokenizer)
    found = _spans_in(text, decoded) or decoded
    text, spans = found.text, list(found.spans)
    if len(ids) > MOST_DECODED:
        text = text[: spans[-1][1]]
        for piece in tokenizer.convert_ids_to_tokens(list(ids[MOST_DECODED:])):
            spans.append((len(text), len(text) + len(piece)))
            text += piece
    return TokenSpans(text, spans)


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text; a character spread over tokens belongs to the last."""
    text, spans = _decoded_spans(ids, tokenizer)
    return [text[start:end] for start, end in spans]


def _decoded_spans(ids: Sequence[int], tokenizer: Any) -> TokenSpans:
    """What tokens are decoded to, and where in it each of them stands.

    A start of them may be decoded to what the whole does not begin with, half a character or the
    sign that a word goes on: its end is where they part.
    """
    text = tokenizer.decode(ids)
    starts = (tokenizer.decode(ids[:end]) for end in range(1, len(ids)))
    ends = [*accumulate((num_equal(start, text) for start in starts), max), len(text)]
    return TokenSpans(text, list(zip([0, *ends], ends[: len(ids)], strict=False)))


def _spans_in(text: str, decoded: TokenSpans) -> TokenSpans | None:
    """The spans in the text that was tokenized; None where it does not begin with what the tokens
    are decoded to, blanks aside."""
    if text.startswith(decoded.text):
        return TokenSpans(text, decoded.spans)
    places = [i for i, character in enumerate(text, start=1) if not character.isspace()]
    if not "".join(text.split()).startswith("".join(decoded.text.split())):
        return None
    num_said = [0, *accumulate(not character.isspace() for character in decoded.text)]
    ends = [places[num_said[end] - 1] if num_said[end] else 0 for _, end in decoded.spans]
    return TokenSpans(text, list(zip([0, *ends], ends, strict=False)))


def _side_by_side(offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """The spans without overlaps, where the bytes of one character are tokens of their own, and
    without gaps, where a tokenizer leaves white space out of its offsets."""
    starts = [start for start, _ in offsets]
    spans, reached = [], 0
    for i, (_, end) in enumerate(offsets):
        border = starts[i + 1] if i + 1 < len(starts) else end
        end = max(reached, min(end, border))
        spans.append((reached, end))
        reached = end
    return spans
