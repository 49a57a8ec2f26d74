"""Find the text of each token, for display."""

from collections.abc import Sequence
from itertools import accumulate
from typing import Any, NamedTuple

from fastpref.data.row_tokens import TOKENIZE
from fastpref.data.speakers import num_equal

MOST_DECODED = 1000
"""Maximum number of tokens whose texts are found by decoding all prefixes, in quadratic time."""


class TokenSpans(NamedTuple):
    """A text, and the span of each token in it."""

    text: str
    spans: list[tuple[int, int]]
    """[start, end) characters of each token, ascending; a character spread over several tokens
    belongs to the last."""


def token_spans(text: str, ids: Sequence[int], tokenizer: Any) -> TokenSpans:
    """Spans of the first tokens of a text.

    Args:
        text: The tokenized text.
        ids: Ids of its first tokens.
        tokenizer: A transformers tokenizer. If it gives no offsets, or other ids, the spans are
            found by decoding; if the decoded text differs in more than white space, they are spans
            of the decoded text, which is returned instead.
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
    """The text that each token adds; a character spread over several tokens belongs to the last."""
    text, spans = _decoded_spans(ids, tokenizer)
    return [text[start:end] for start, end in spans]


def _decoded_spans(ids: Sequence[int], tokenizer: Any) -> TokenSpans:
    """The decoded text of tokens, and the span of each token in it.

    A prefix of the tokens may decode to a text that is no prefix of the whole, ending in half a
    character or a word-continuation mark: its end is then where the two texts differ.
    """
    text = tokenizer.decode(ids)
    starts = (tokenizer.decode(ids[:end]) for end in range(1, len(ids)))
    ends = [*accumulate((num_equal(start, text) for start in starts), max), len(text)]
    return TokenSpans(text, list(zip([0, *ends], ends[: len(ids)], strict=False)))


def _spans_in(text: str, decoded: TokenSpans) -> TokenSpans | None:
    """Map spans of the decoded text to the tokenized text; None if this does not begin with the
    decoded text, ignoring white space."""
    if text.startswith(decoded.text):
        return TokenSpans(text, decoded.spans)
    places = [i for i, character in enumerate(text, start=1) if not character.isspace()]
    if not "".join(text.split()).startswith("".join(decoded.text.split())):
        return None
    num_said = [0, *accumulate(not character.isspace() for character in decoded.text)]
    ends = [places[num_said[end] - 1] if num_said[end] else 0 for _, end in decoded.spans]
    return TokenSpans(text, list(zip([0, *ends], ends, strict=False)))


def _side_by_side(offsets: Sequence[tuple[int, int]]) -> list[tuple[int, int]]:
    """Offsets as contiguous spans: without overlaps of tokens that share a character, and without
    gaps where a tokenizer leaves white space out of its offsets."""
    starts = [start for start, _ in offsets]
    spans, reached = [], 0
    for i, (_, end) in enumerate(offsets):
        border = starts[i + 1] if i + 1 < len(starts) else end
        end = max(reached, min(end, border))
        spans.append((reached, end))
        reached = end
    return spans
