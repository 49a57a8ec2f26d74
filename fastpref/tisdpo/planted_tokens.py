"""Which tokens of the set `planted` are wrong, and how well numbers single them out."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastpref.data.sources.planted import generate_rows


def planted_masks(
    split: str, rows: Sequence[tuple[str, str]], tokenizer: Any
) -> list[NDArray[np.bool_]]:
    """Of each row, the tokens of the rejected response that overlap a planted character.

    Args:
        split: train or test of the built-in set.
        rows: Prompt and rejected response of each row, all of that split.
        tokenizer: A fast one, for its offsets.

    Returns:
        One mask per row, as long as its response without EOS.
    """
    spans = _spans_by_row(split)
    encoded = tokenizer(
        [rejected for _, rejected in rows], add_special_tokens=False, return_offsets_mapping=True
    )
    return [
        np.array(
            [any(start < b and a < end for a, b in spans[row]) for start, end in offsets], np.bool_
        )
        for row, offsets in zip(rows, encoded["offset_mapping"], strict=True)
    ]


@cache
def _spans_by_row(split: str) -> dict[tuple[str, str], list[list[int]]]:
    return {(row["prompt"], row["rejected"]): row["planted_spans"] for row in generate_rows(split)}


def roc_auc(scores: NDArray[np.floating], is_positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: how likely a positive scores above a negative, ties half.

    Args:
        scores, is_positive: Shape (n,); both kinds must occur.

    Returns:
        A number in [0, 1].
    """
    _, group, count = np.unique(scores, return_inverse=True, return_counts=True)
    mean_rank = (np.cumsum(count) - (count - 1) / 2)[group]
    num_positive = int(is_positive.sum())
    num_negative = len(scores) - num_positive
    assert num_positive and num_negative
    surplus = mean_rank[is_positive].sum() - num_positive * (num_positive + 1) / 2
    return float(surplus / (num_positive * num_negative))
