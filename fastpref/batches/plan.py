"""Records of a step's plan: the rows of each micro-batch and rank."""

from typing import NamedTuple

import numpy as np


class MicroBatch(NamedTuple):
    """Plan of one micro-batch of one rank."""

    rows: np.ndarray
    """(P,) int64: indices of its rows within the step."""
    prompts: np.ndarray
    """(P,) int64 prompt numbers, ascending; equal for rows that share a prompt."""
    num_shared: np.ndarray
    """(P,) int64: response tokens computed once for all responses to the row's prompt."""
    num_tokens: int
    """Tokens that the model's body computes."""


StepPlan = list[list[MicroBatch]]
"""[micro-batch][rank]; equally many micro-batches for every rank, some possibly without rows."""
