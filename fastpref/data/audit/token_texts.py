"""The text of each token, to be looked at."""

from collections.abc import Sequence
from typing import Any, NamedTuple

from fastpref.data.row_tokens import TOKENIZE

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
        tokenizer: Of transformers. Where it tells no offsets the text is put together from what
            the tokens are decoded to.
    """
    if tokenizer.is_fast:
        encoded = tokenizer(text, return_offsets_mapping=True, **TOKENIZE)
        if encoded["input_ids"][: len(ids)] == list(ids):
            return TokenSpans(text, _side_by_side(encoded["offset_mapping"][: len(ids)]))
    texts = token_texts(ids[:MOST_DECODED], tokenizer)
    texts += tokenizer.convert_ids_to_tokens(list(ids[MOST_DECODED:]))
    spans, end = [], 0
    for piece in texts:
        spans.append((end, end + len(piece)))
        end += len(piece)
    return TokenSpans("".join(texts), spans)


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


def token_texts(ids: Sequence[int], tokenizer: Any) -> list[str]:
    """What each token adds to the text; a character spread over tokens belongs to the last."""
    texts, shown = [], ""
    for end in range(1, len(ids) + 1):
        text = tokenizer.decode(ids[:end])
        is_whole = not text.endswith("\N{REPLACEMENT CHARACTER}") or end == len(ids)
        texts.append(text[len(shown) :] if is_whole else "")
        shown = text if is_whole else shown
    return texts
