"""Where reference quantities come from: today the reference model, on the same batch."""

from collections.abc import Callable

import torch
from fastpref_kernels import TokenScores

from fastpref.batch import PackedBatch
from fastpref.model import TokenScorer
from fastpref.objectives import Objective

ScoreFn = Callable[[PackedBatch], TokenScores]
"""Token scores of a micro-batch: policy with gradients, reference without."""


def build_score_fn(
    policy: TokenScorer, reference: TokenScorer | None, objective: Objective
) -> ScoreFn:
    """How an objective's token scores are computed, chosen once before the loop.

    Policy and reference run the same code in the same dtype on the same batch, so two equal models
    give log-ratios and KL of exactly zero.
    """
    if reference is None:
        return lambda batch: TokenScores(policy(batch), None, None)
    direction = objective.kl_direction

    def score_log_ratios(batch: PackedBatch) -> TokenScores:
        with torch.no_grad():
            reference_logps_N = reference(batch)
        return TokenScores(policy(batch), reference_logps_N, None)

    def score_with_kl(batch: PackedBatch) -> TokenScores:
        with torch.no_grad():
            states = reference.states(batch)
        return policy(batch, states, direction)

    return score_log_ratios if direction is None else score_with_kl
