"""The wrong tokens in the dataset `planted`, and how well scores separate them (ROC-AUC)."""

from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastpref.config.data import SPLITS
from fastpref.data.audit.token_texts import token_spans
from fastpref.data.sources.planted import generate_rows


def planted_mask(
    prompt: str, rejected: str, ids: Sequence[int], tokenizer: Any
) -> NDArray[np.bool_]:
    """Which tokens of a rejected response overlap a planted wrong character: bool, (tokens,).

    Args:
        prompt, rejected: Texts of a row of the dataset.
        ids: Token ids of the response, without EOS.
        tokenizer: A fast tokenizer, which gives character offsets.
    """
    planted = _planted_spans()[prompt, rejected]
    spans = token_spans(rejected, ids, tokenizer).spans
    return np.array(
        [any(start < stop and begin < end for begin, stop in planted) for start, end in spans],
        np.bool_,
    )


@cache
def _planted_spans() -> dict[tuple[str, str], list[list[int]]]:
    rows = (row for split in SPLITS for row in generate_rows(split))
    return {(row["prompt"], row["rejected"]): row["planted_spans"] for row in rows}


def roc_auc(scores: NDArray[np.floating], is_positive: NDArray[np.bool_]) -> float:
    """Area under the ROC curve: P(a positive scores above a negative), counting ties half.

    Args:
        scores, is_positive: Shape (n,); both classes must occur.

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
