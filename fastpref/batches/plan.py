"""What a step's plan says: which rows each rank computes at once."""

from typing import NamedTuple

import numpy as np


class MicroBatch(NamedTuple):
    """What one rank computes at once."""

    rows: np.ndarray
    """(P,) int64: which rows of the step."""
    prompts: np.ndarray
    """(P,) int64: equal for rows that share a prompt; ascending."""
    num_shared: np.ndarray
    """(P,) int64: response tokens computed with the row's prompt, for all responses to it."""
    num_tokens: int
    """Tokens that the model's body computes."""


StepPlan = list[list[MicroBatch]]
"""[micro-batch][rank]; every rank has as many, some may be without rows."""
