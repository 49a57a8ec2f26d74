"""Portable `token_logps` in plain torch, one tile of logits at a time, on any device."""

import torch
from torch import Tensor

from fastpref_kernels.head import (
    Gradients,
    Head,
    NeedsGrad,
    Targets,
    head_gradients,
    logit_gradients,
    put_target,
    take_target,
)
from fastpref_kernels.row_sums import RowSums, TokenStats, log_softmax_
from fastpref_kernels.workspace import slices, tile_shape


def choose_mode(head: Head, needs_grad: NeedsGrad) -> str:
    """Always "lean": the backward recomputes the logits."""
    return "lean"


def empty_stats(head: Head, mode: str) -> TokenStats:
    """Uninitialised results of the forward."""
    N, empty = head.input.shape[0], head.input.new_empty
    kept, kept_sums = (empty(0, dtype=torch.float32) for _ in range(2))
    return TokenStats(empty(N, dtype=torch.float32), empty(N, dtype=torch.float64), kept, kept_sums)


def token_logps_fwd(head: Head, targets: Targets, mode: str) -> TokenStats:
    """Log-probability of each row's target, and the log-sum-exp that the backward needs."""
    N, (V, D) = len(targets.ids), head.weight.shape
    tile_rows, tile_cols = tile_shape(V, D, head.weight.device)
    stats = empty_stats(head, mode)
    for rows in slices(N, tile_rows):
        hidden_RD = head.input_tile(rows, targets.ignored)
        sums = RowSums.empty(rows.stop - rows.start, head.input.device)
        for cols in slices(V, tile_cols):
            sums = _add_columns(sums, head, hidden_RD, targets.ids[rows], cols)
        stats.logps[rows], stats.lse[rows] = sums.logps, sums.lse
    stats.logps.masked_fill_(targets.ignored, 0)
    return stats


def token_logps_bwd(
    grad: Tensor,
    head: Head,
    targets: Targets,
    stats: TokenStats,
    mode: str,
    needs_grad: NeedsGrad,
) -> Gradients:
    """Gradients of input, weight and bias, from recomputed logits: dz = g · (e_y - p).

    Args:
        grad: (N,) upstream gradient of the log-probabilities, any strides.
        head, targets: As in the forward.
        stats, mode: Result and mode of the forward.
        needs_grad: Which of input, weight and bias require a gradient; the others get None.
    """
    (scaled_grad_N,), unit = logit_gradients(head, targets, grad)
    # 1 - p_y as -expm1(log p_y): accurate for a confident token
    target_grad_N = -scaled_grad_N * stats.logps.expm1()

    def dlogits(rows: slice, cols: slice, hidden_RD: Tensor, head_CD: Tensor) -> Tensor:
        R = rows.stop - rows.start
        logits_RC = head.logits(hidden_RD, head_CD, cols)[:R]
        slope_RC = head.softcap_slope(logits_RC)
        p_RC = log_softmax_(logits_RC, stats.lse[rows]).exp_()
        dlogits_RC = p_RC.mul_(-scaled_grad_N[rows, None])
        put_target(dlogits_RC, targets.ids[rows], cols, target_grad_N[rows])
        return dlogits_RC if slope_RC is None else dlogits_RC.mul_(slope_RC)

    V, D = head.weight.shape
    tile = tile_shape(V, D, head.weight.device)
    return head_gradients(
        head,
        needs_grad,
        tile,
        lambda rows: head.input_tile(rows, targets.ignored),
        dlogits,
        unit=unit,
    )


def _add_columns(
    sums: RowSums, head: Head, hidden_RD: Tensor, target_R: Tensor, cols: slice
) -> RowSums:
    logits_RC = head.logits(hidden_RD, head.weight_tile(cols), cols)[: len(target_R)]
    return sums.add(logits_RC, take_target(logits_RC, target_R, cols))
