"""Where reference quantities come from: today the reference model, on the same batch."""

from collections.abc import Callable

import torch
from fastpref_kernels import TokenScores
from torch import Tensor

from fastpref.batch import PackedBatch
from fastpref.model import HeadStates, TokenScorer
from fastpref.objectives import Metrics, Objective

EvaluateFn = Callable[[PackedBatch, bool], tuple[Tensor, Metrics]]
"""A micro-batch, and whether every metric is asked for -> losses (P,) with gradients, metrics."""


def build_evaluate_fn(
    policy: TokenScorer, reference: TokenScorer | None, objective: Objective
) -> EvaluateFn:
    """How an objective's losses are computed: the cheapest way that is valid, chosen once.

    Policy and reference run the same code in the same dtype on the same batch, so two equal models
    give log-ratios and KL of exactly zero.
    """
    score = _build_score_fn(policy, reference, objective)

    def evaluate(batch: PackedBatch, detailed: bool) -> tuple[Tensor, Metrics]:
        return objective.evaluate(score(batch), batch)

    evaluate_values = objective.evaluate_values
    # behind a softcap the mean of the logits is not linear in the hidden states
    if reference is None or evaluate_values is None or policy.path.softcap is not None:
        return evaluate

    def evaluate_or_values(batch: PackedBatch, detailed: bool) -> tuple[Tensor, Metrics]:
        if detailed:
            return evaluate(batch, detailed)
        return evaluate_values(policy.tdpo1_values(batch, _states(reference, batch)), batch)

    return evaluate_or_values


def _build_score_fn(
    policy: TokenScorer, reference: TokenScorer | None, objective: Objective
) -> Callable[[PackedBatch], TokenScores]:
    """Token scores of a micro-batch: policy with gradients, reference without."""
    if reference is None:
        return lambda batch: TokenScores(policy(batch), None, None)
    direction = objective.kl_direction

    def score_log_ratios(batch: PackedBatch) -> TokenScores:
        with torch.no_grad():
            reference_logps_N = reference(batch)
        return TokenScores(policy(batch), reference_logps_N, None)

    def score_with_kl(batch: PackedBatch) -> TokenScores:
        return policy(batch, _states(reference, batch), direction)

    return score_log_ratios if direction is None else score_with_kl


@torch.no_grad()
def _states(reference: TokenScorer, batch: PackedBatch) -> HeadStates:
    return reference.states(batch)
