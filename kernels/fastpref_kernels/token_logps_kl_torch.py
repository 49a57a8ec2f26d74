"""Portable path of `token_logps_and_kl`: both models' logits of one tile at a time."""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref_kernels.head_torch import (
    Head,
    RowSums,
    head_gradients,
    put_target,
    take_target,
)
from fastpref_kernels.workspace import slices, tile_shape


class JointStats(NamedTuple):
    """What the forward finds out about each row, each (N,) float32."""

    logps: Tensor
    lse: Tensor
    reference_logps: Tensor
    reference_lse: Tensor
    kl: Tensor


def token_logps_kl_fwd(
    policy: Head, reference: Head, target: Tensor, ignored: Tensor, direction: str
) -> JointStats:
    """Both models' target log-probabilities and their KL, from one sweep over the vocabulary.

    Args:
        policy, reference: Hidden states (N, D), (N, D') and heads (V, D), (V, D').
        target: (N,) int64.
        ignored: (N,) bool, rows that score 0.
        direction: "reference_policy" for KL(reference ‖ policy) or "policy_reference".
    """
    N, device = len(target), target.device
    tile_rows, tile_cols = _tile_shape(policy, reference)
    stats = JointStats(*(torch.empty(N, dtype=torch.float32, device=device) for _ in range(5)))
    for rows in slices(N, tile_rows):
        sweep = _sweep(policy, reference, target, ignored, rows, tile_cols, direction)
        for total_N, part_R in zip(stats, sweep, strict=True):
            total_N[rows] = part_R
    for scores_N in (stats.logps, stats.reference_logps, stats.kl):
        scores_N.masked_fill_(ignored, 0)
    return stats


def token_logps_kl_bwd(
    grad_logps: Tensor,
    grad_kl: Tensor,
    policy: Head,
    reference: Head,
    target: Tensor,
    ignored: Tensor,
    stats: JointStats,
    direction: str,
    needs_grad: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the policy's input, weight and bias, from recomputed logits.

        reference_policy: dz = g_l · (e_y - p) + g_k · (p - q)
        policy_reference: dz = g_l · (e_y - p) + g_k · p · (log p - log q - KL)

    Args:
        grad_logps, grad_kl: (N,) upstream gradients, any strides.
        policy, reference, target, ignored, direction: As in the forward.
        stats: What the forward returned.
        needs_grad: Which of input, weight and bias want a gradient; the others get None.
    """
    grad_logps_N, grad_kl_N = (
        grad.float().masked_fill(ignored, 0) * policy.scale for grad in (grad_logps, grad_kl)
    )
    under_reference = direction == "reference_policy"
    target_grad_N = -grad_logps_N * stats.logps.expm1()
    target_grad_N += grad_kl_N * (
        _probability_gap(stats.logps, stats.reference_logps)
        if under_reference
        else stats.logps.exp() * (stats.logps - stats.reference_logps - stats.kl)
    )

    def dlogits(rows: slice, cols: slice, hidden_RD: Tensor, head_CD: Tensor) -> Tensor:
        R = rows.stop - rows.start
        logps_RC = policy.logits(hidden_RD, head_CD, cols)[:R]
        slope_RC = policy.softcap_slope(logps_RC)
        reference_RC = reference.logits(
            reference.input_tile(rows, ignored), reference.weight_tile(cols), cols
        )[:R]
        logps_RC -= stats.lse[rows, None]
        reference_RC -= stats.reference_lse[rows, None]
        gradient = _kl_gradient_under_reference if under_reference else _kl_gradient_under_policy
        dlogits_RC = gradient(
            logps_RC, reference_RC, grad_logps_N[rows], grad_kl_N[rows], stats.kl[rows]
        )
        put_target(dlogits_RC, target[rows], cols, target_grad_N[rows])
        return dlogits_RC if slope_RC is None else dlogits_RC.mul_(slope_RC)

    return head_gradients(policy, ignored, needs_grad, _tile_shape(policy, reference), dlogits)


def _sweep(
    policy: Head,
    reference: Head,
    target: Tensor,
    ignored: Tensor,
    rows: slice,
    tile_cols: int,
    direction: str,
) -> JointStats:
    """Statistics of R rows from one sweep over the vocabulary, each (R,)."""
    R, heads = rows.stop - rows.start, (policy, reference)
    under = 1 if direction == "reference_policy" else 0
    hidden = [head.input_tile(rows, ignored) for head in heads]
    sums = [RowSums.empty(R, target.device) for _ in heads]
    gap_R = torch.zeros(R, dtype=torch.float32, device=target.device)
    for cols in slices(policy.weight.shape[0], tile_cols):
        sums, gap_R = _add_columns(sums, gap_R, heads, hidden, target[rows], cols, under)
    kl_R = _kl(sums[under], sums[1 - under], gap_R)
    return JointStats(sums[0].logps, sums[0].lse, sums[1].logps, sums[1].lse, kl_R)


def _add_columns(
    sums: list[RowSums],
    gap_R: Tensor,
    heads: tuple[Head, Head],
    hidden: list[Tensor],
    target_R: Tensor,
    cols: slice,
    under: int,
) -> tuple[list[RowSums], Tensor]:
    """Add columns to both models' sums and to gap = Σ exp(z - max) · (z - z'), z of `under`."""
    logits = [
        head.logits(hidden_RD, head.weight_tile(cols), cols)[: len(target_R)]
        for head, hidden_RD in zip(heads, hidden, strict=True)
    ]
    taken = [take_target(logits_RC, target_R, cols) for logits_RC in logits]
    gap_RC = logits[under] - logits[1 - under]
    new = [s.add(logits_RC, t) for s, logits_RC, t in zip(sums, logits, taken, strict=True)]
    weights_RC = logits[under]
    # -inf columns have no weight and no gap that is a number
    gap_RC.masked_fill_(weights_RC == 0, 0)
    rescale_R = (sums[under].max - new[under].max).exp()
    return new, gap_R * rescale_R + gap_RC.mul_(weights_RC).sum(1)


def _kl(first: RowSums, second: RowSums, gap_R: Tensor) -> Tensor:
    """KL(first ‖ second), (R,), from both models' sums and Σ exp(z - max) · (z - z') over others.

        KL = Σ p_j · [(z_j - a) - (z'_j - a')] - (lse - a) + (lse' - a')

    holds for any a and a'. With both at the likeliest column of `first` no term is larger than the
    result has to be: a logit of 200 has an error of 8e-6, which the plain difference would keep.
    """
    target_likeliest_R = first.target_logit >= first.max
    target_gap_R = first.target_logit - second.target_logit
    pivot_gap_R = torch.where(target_likeliest_R, target_gap_R, first.max - second.max)
    lse_R, other_lse_R = (
        torch.where(target_likeliest_R, -sums.logps, sums.lse_over_max) for sums in (first, second)
    )
    gap_R = (gap_R - first.sum_exp * pivot_gap_R) * (first.max - first.lse).exp()
    gap_R += first.logps.exp() * (target_gap_R - pivot_gap_R)
    return gap_R - lse_R + other_lse_R


def _tile_shape(policy: Head, reference: Head) -> tuple[int, int]:
    hidden = max(policy.weight.shape[1], reference.weight.shape[1])
    return tile_shape(policy.weight.shape[0], hidden, policy.weight.device)


def _kl_gradient_under_reference(
    logps_RC: Tensor, reference_RC: Tensor, grad_logps_R: Tensor, grad_kl_R: Tensor, _: Tensor
) -> Tensor:
    """g_k · (p - q) - g_l · p, in place; p - q is formed first so that equal models give 0."""
    p_RC, q_RC = logps_RC.exp_(), reference_RC.exp_()
    dlogits_RC = torch.sub(p_RC, q_RC, out=q_RC).mul_(grad_kl_R[:, None])
    return dlogits_RC.sub_(p_RC.mul_(grad_logps_R[:, None]))


def _kl_gradient_under_policy(
    logps_RC: Tensor, reference_RC: Tensor, grad_logps_R: Tensor, grad_kl_R: Tensor, kl_R: Tensor
) -> Tensor:
    """p · (g_k · (log p - log q - KL) - g_l), in place."""
    dlogits_RC = torch.sub(logps_RC, reference_RC, out=reference_RC)
    dlogits_RC.sub_(kl_R[:, None]).mul_(grad_kl_R[:, None]).sub_(grad_logps_R[:, None])
    p_RC = logps_RC.exp_()
    # where p is 0 log p - log q may be infinite or no number at all
    return dlogits_RC.masked_fill_(p_RC == 0, 0).mul_(p_RC)


def _probability_gap(logps: Tensor, other_logps: Tensor) -> Tensor:
    """exp(logps) - exp(other_logps), accurate where both are close to each other or to 1."""
    difference = logps - other_logps
    larger = torch.maximum(logps, other_logps)
    return -difference.sign() * larger.exp() * difference.abs().neg_().expm1()
