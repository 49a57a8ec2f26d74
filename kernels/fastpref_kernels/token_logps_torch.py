"""Portable path of `token_logps`: chunks of logits in plain torch, on any device."""

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


def token_logps_fwd(head: Head, target: Tensor, ignored: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probability of each row's target and the log-sum-exp the backward starts from.

    Args:
        head: Hidden states (N, D) and head (V, D).
        target: (N,) int64.
        ignored: (N,) bool, rows that score 0.

    Returns:
        logps, lse: (N,) float32.
    """
    N, (V, D) = len(target), head.weight.shape
    tile_rows, tile_cols = tile_shape(V, D, target.device)
    logps_N = torch.empty(N, dtype=torch.float32, device=target.device)
    lse_N = torch.empty_like(logps_N)
    for rows in slices(N, tile_rows):
        hidden_RD = head.input_tile(rows, ignored)
        sums = RowSums.empty(rows.stop - rows.start, target.device)
        for cols in slices(V, tile_cols):
            sums = _add_columns(sums, head, hidden_RD, target[rows], cols)
        logps_N[rows], lse_N[rows] = sums.logps, sums.lse
    return logps_N.masked_fill_(ignored, 0), lse_N


def token_logps_bwd(
    grad: Tensor,
    head: Head,
    target: Tensor,
    ignored: Tensor,
    logps: Tensor,
    lse: Tensor,
    needs_grad: tuple[bool, bool, bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of input, weight and bias, from recomputed logits: dz = g · (e_y - p).

    Args:
        grad: (N,) upstream gradient of the log-probabilities, any strides.
        head, target, ignored: As in the forward.
        logps, lse: What the forward returned.
        needs_grad: Which of input, weight and bias want a gradient; the others get None.
    """
    scaled_grad_N = grad.float().masked_fill(ignored, 0) * head.scale
    # 1 - p_y without subtracting from 1: exact for a confident token
    target_grad_N = -scaled_grad_N * logps.expm1()

    def dlogits(rows: slice, cols: slice, hidden_RD: Tensor, head_CD: Tensor) -> Tensor:
        R = rows.stop - rows.start
        logits_RC = head.logits(hidden_RD, head_CD, cols)[:R]
        slope_RC = head.softcap_slope(logits_RC)
        dlogits_RC = logits_RC.sub_(lse[rows, None]).exp_().mul_(-scaled_grad_N[rows, None])
        put_target(dlogits_RC, target[rows], cols, target_grad_N[rows])
        return dlogits_RC if slope_RC is None else dlogits_RC.mul_(slope_RC)

    V, D = head.weight.shape
    tile = tile_shape(V, D, target.device)
    return head_gradients(head, ignored, needs_grad, tile, dlogits)


def _add_columns(
    sums: RowSums, head: Head, hidden_RD: Tensor, target_R: Tensor, cols: slice
) -> RowSums:
    logits_RC = head.logits(hidden_RD, head.weight_tile(cols), cols)[: len(target_R)]
    return sums.add(logits_RC, take_target(logits_RC, target_R, cols))
