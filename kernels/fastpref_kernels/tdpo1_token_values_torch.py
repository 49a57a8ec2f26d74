"""Portable `tdpo1_token_values` in plain torch, one tile of the reference's logits at a time."""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpref_kernels.gemm import matmul
from fastpref_kernels.head import (
    Gradients,
    Head,
    Heads,
    NeedsGrad,
    Targets,
    head_gradients,
    logit_gradients,
    put_target,
    take_target,
)
from fastpref_kernels.row_sums import RowSums, ValueStats, empty_slopes, log_softmax_
from fastpref_kernels.workspace import LEAST_COLUMNS, ROW_MULTIPLE, slices, tile_shape


class Means(NamedTuple):
    """Sums over the columns seen so far, excluding the target's, weighted by exp(z' - max)."""

    reference: RowSums
    weights: Tensor
    """(R, D) weighted sum of the policy's head rows W_j."""
    logits: Tensor
    """(R,) float64, weighted sum of z'_j - z'_y - scale · (b_j - b_y), with the reference's logits
    z' and the policy's bias b: the terms of the value besides scale · h · W_j."""


def choose_mode(heads: Heads, needs_grad: NeedsGrad) -> str:
    """Mode: "lean", whose backward recomputes the reference's logits, if the head is trained."""
    if not any(needs_grad):
        return "scores"
    return "frozen" if needs_grad == (True, False, False) else "lean"


def empty_stats(heads: Heads, mode: str) -> ValueStats:
    """Uninitialised results of the forward."""
    input = heads[0].input
    return ValueStats.empty(
        input, empty_slopes(input, mode), kept=input.new_empty(0), kept_sums=input.new_empty(0)
    )


def tdpo1_token_values_fwd(heads: Heads, targets: Targets, mode: str) -> ValueStats:
    """Values, and their derivatives with respect to the hidden states.

    Args:
        heads: Policy and reference: hidden states (N, D), (N, D') and weights (V, D), (V, D').
        targets: Target ids of the N rows.
        mode: "scores", "frozen" or "lean".
    """
    policy, _ = heads
    V = policy.weight.shape[0]
    hidden = max(head.weight.shape[1] for head in heads)
    tile_rows, tile_cols = tile_shape(V, hidden, policy.weight.device)
    stats = empty_stats(heads, mode)
    for rows in slices(len(targets.ids), tile_rows):
        target_R = targets.ids[rows]
        means = _sweep(heads, targets, rows, tile_cols)
        sums = means.reference
        others_R = -sums.logps.expm1()
        share_R = torch.where(sums.sum_exp > 0, others_R / sums.sum_exp, 0)
        target_RD = policy.weight[target_R].to(policy.gemm_dtype).float()
        # float64: a value is a small difference of large terms
        slopes_RD = target_RD * others_R[:, None].double() - means.weights * share_R[:, None]
        slopes_RD *= policy.scale
        values_R = values_of(heads, rows, slopes_RD, share_R * means.logits).float()
        # ranges are not checked on a GPU, and a negative index would take another token's row
        stats.values[rows] = values_R.masked_fill_(target_R < 0, torch.nan)
        stats.reference_logps[rows], stats.reference_lse[rows] = sums.logps, sums.lse
        if mode != "scores":
            stats.slopes[rows] = slopes_RD.masked_fill_(targets.ignored[rows, None], 0)
    for scores_N in (stats.values, stats.reference_logps):
        scores_N.masked_fill_(targets.ignored, 0)
    return stats


def tdpo1_token_values_bwd(
    grad: Tensor,
    heads: Heads,
    targets: Targets,
    stats: ValueStats,
    *,
    mode: str,
    needs_grad: NeedsGrad,
) -> Gradients:
    """Gradients of the policy's input, weight and bias: dz = g · (e_y - q).

    Args:
        grad: (N,) upstream gradient of the values, any strides.
        heads, targets: As in the forward.
        stats, mode: Result and mode of the forward.
        needs_grad: Which of input, weight and bias require a gradient; the others get None.
    """
    policy, reference = heads
    input_ND = scaled_slopes(grad, policy, targets, stats) if needs_grad[0] else None
    if not any(needs_grad[1:]):
        return input_ND, None, None
    (scaled_grad_N,), unit = logit_gradients(policy, targets, grad)
    # 1 - q_y as -expm1(log q_y): accurate for a confident token
    target_grad_N = -scaled_grad_N * stats.reference_logps.expm1()

    def dlogits(rows: slice, cols: slice, hidden_RD: Tensor, head_CD: Tensor) -> Tensor:
        R = rows.stop - rows.start
        reference_RD = reference.input_tile(rows, targets.ignored)
        logits_RC = reference.logits(reference_RD, reference.weight_tile(cols), cols)[:R]
        q_RC = log_softmax_(logits_RC, stats.reference_lse[rows]).exp_()
        dlogits_RC = q_RC.mul_(-scaled_grad_N[rows, None])
        put_target(dlogits_RC, targets.ids[rows], cols, target_grad_N[rows])
        return dlogits_RC

    V = policy.weight.shape[0]
    tile = tile_shape(V, max(head.weight.shape[1] for head in heads), policy.weight.device)
    _, weight_VD, bias_V = head_gradients(
        policy,
        (False, *needs_grad[1:]),
        tile,
        partial(policy.input_tile, ignored_N=targets.ignored),
        dlogits,
        unit=unit,
    )
    return input_ND, weight_VD, bias_V


def values_of(heads: Heads, rows: slice, slopes_RD: Tensor, constants_R: Tensor) -> Tensor:
    """Values (R,) from their derivatives with respect to the hidden states.

    Args:
        heads: Policy and reference.
        rows: Slice of the heads' rows.
        slopes_RD: Derivatives, (R, D) float32 or float64.
        constants_R: (R,) terms independent of h, added where the models do not share a head.
    """
    hidden_RD = heads[0].input[rows].to(slopes_RD.dtype)
    if share_head(heads):
        return (slopes_RD * (hidden_RD - heads[1].input[rows].to(slopes_RD.dtype))).sum(1)
    return (slopes_RD * hidden_RD).sum(1) + constants_R


def share_head(heads: Heads) -> bool:
    """Whether policy and reference share one head: weight and bias in the same memory."""
    policy, reference = heads
    return _same(policy.weight, reference.weight) and (
        policy.bias is reference.bias is None or _same(policy.bias, reference.bias)
    )


def scaled_slopes(grad: Tensor, policy: Head, targets: Targets, stats: ValueStats) -> Tensor:
    """Gradient of the hidden states, (N, D)."""
    grad_N1 = grad.float().masked_fill(targets.ignored, 0)[:, None]
    return torch.mul(stats.slopes, grad_N1).to(policy.input.dtype)


def _sweep(heads: Heads, targets: Targets, rows: slice, tile_cols: int) -> Means:
    policy, reference = heads
    R, (V, D) = rows.stop - rows.start, policy.weight.shape
    hidden_RD = reference.input_tile(rows, targets.ignored)
    target_R = targets.ids[rows]
    base_R = reference.target_logits(hidden_RD[:R], target_R)
    means = Means(
        RowSums.empty(R, policy.input.device),
        policy.input.new_zeros(R, D, dtype=torch.float32),
        torch.zeros_like(base_R, dtype=torch.float64),
    )
    for cols in slices(V, tile_cols):
        logits_RC = reference.logits(hidden_RD, reference.weight_tile(cols), cols)[:R]
        means = _add_columns(means, policy, logits_RC, target_R, base_R, cols)
    return means


def _add_columns(
    means: Means, policy: Head, logits_RC: Tensor, target_R: Tensor, base_R: Tensor, cols: slice
) -> Means:
    over_RC = logits_RC - base_R[:, None]
    if policy.bias is not None:
        bias_over_RC = policy.bias[cols].float() - policy.bias[target_R].float()[:, None]
        over_RC -= bias_over_RC * policy.scale
    sums = means.reference.add(logits_RC, take_target(logits_RC, target_R, cols))
    # a column of -inf has weight 0, and 0 · (-inf) is NaN
    over_RC.masked_fill_(logits_RC == 0, 0)
    rescale_R = (means.reference.max - sums.max).exp()
    weights_RD = means.weights.mul_(rescale_R[:, None])
    # not addmm in place: for a single row MKL would then sum all columns sequentially
    weights_RD += _whole_matmul(logits_RC.to(policy.gemm_dtype), policy.weight_tile(cols))
    return Means(sums, weights_RD, means.logits * rescale_R + over_RC.mul_(logits_RC).sum(1))


def _whole_matmul(exp_RC: Tensor, weight_CD: Tensor) -> Tensor:
    """exp @ weight, (R, D) float32, padded to `ROW_MULTIPLE` rows and `LEAST_COLUMNS` columns."""
    R, D = len(exp_RC), weight_CD.shape[1]
    whole_RC = F.pad(exp_RC, (0, 0, 0, -R % ROW_MULTIPLE))
    if D < LEAST_COLUMNS:
        weight_CD = F.pad(weight_CD, (0, LEAST_COLUMNS - D))
    return matmul(whole_RC, weight_CD)[:R, :D]


def _same(a: Tensor | None, b: Tensor | None) -> bool:
    if a is None or b is None:
        return False
    layout = (a.data_ptr(), a.shape, a.stride(), a.dtype)
    return layout == (b.data_ptr(), b.shape, b.stride(), b.dtype)
