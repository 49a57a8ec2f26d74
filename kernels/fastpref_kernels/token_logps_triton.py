"""`token_logps` on a GPU: the launchers of its kernels, and how many GEMMs its modes take.

    store    3 passes: exponentials of all logits are kept for the backward, if the workspace holds
             them, and both gradients are GEMMs with them
    partial  between 3 and 4: exponentials of the first rows, as many as the workspace holds
    lean     4 passes: the backward makes a slice of the logits again
    frozen   2 passes: only the hidden states want a gradient, which the forward makes for an
             upstream gradient of 1
    scores   1 pass: nothing wants a gradient

A pass is 2·N·D·V floating-point operations. The mode follows from shapes, dtypes and the workspace.
"""

import torch
from torch import Tensor

from fastpref_kernels.gemm import add_matmul
from fastpref_kernels.head import Gradients, Head, NeedsGrad, Targets
from fastpref_kernels.launch import Operands, aligned_columns, product_tile
from fastpref_kernels.row_sums import TokenStats, empty_slopes
from fastpref_kernels.token_logps_backward import BACKWARD, Call, times_slope
from fastpref_kernels.token_logps_sweep import Sweep, shared, weigh_target
from fastpref_kernels.workspace import keeping_mode, kept_rows, limit, slices

_SWEEP_ROWS = 8192
"""Rows of a sweep: bounds the sums of its column blocks. Reading the head once for each such group
costs 1/16 of what multiplying with it does."""
_FROZEN_TILE = (4096, 32768)
"""Rows, columns of the exponentials that one product with the head takes in: on an H100 as fast as
larger ones at D = 4,096, and 4 to 12 % faster than half the rows."""


def choose_mode(head: Head, needs_grad: NeedsGrad) -> str:
    """Mode of a call; see the module's docstring.

    Args:
        head: What is scored.
        needs_grad: Which of input, weight and bias want a gradient.
    """
    N = head.input.shape[0]
    if not any(needs_grad):
        return "scores"
    if head.gemm_dtype == torch.float16:
        return "lean"
    if needs_grad == (True, False, False):
        return "frozen"
    return keeping_mode(N, _row_bytes(head))


def empty_stats(head: Head, mode: str) -> TokenStats:
    """Uninitialised results of the forward, with what the mode keeps for its backward."""
    N, V = head.input.shape[0], head.weight.shape[0]
    kept, num_sums = head.input.new_empty(0), 0
    if mode in ("store", "partial"):
        num_sums = N if mode == "store" else kept_rows(N, _row_bytes(head))
        kept = head.input.new_empty(num_sums, aligned_columns(V), dtype=head.exp_dtype)
    elif mode == "frozen":
        kept = empty_slopes(head.input, mode)
    logps, kept_sums = (head.input.new_empty(n, dtype=torch.float32) for n in (N, num_sums))
    lse = head.input.new_empty(N, dtype=torch.float64)
    return TokenStats(logps, lse, kept, kept_sums)


def token_logps_fwd(head: Head, targets: Targets, mode: str) -> TokenStats:
    """Log-probability of each row's target, and what the mode's backward starts from."""
    stats = empty_stats(head, mode)
    operands = Operands.of(head, targets)
    if mode == "frozen":
        _frozen_fwd(operands, stats)
    else:
        _sweep_fwd(operands, stats)
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
    """Gradients of input, weight and bias, from the upstream gradient (N,), in the same mode."""
    if mode == "frozen":
        grad_N1 = grad.float().masked_fill(targets.ignored, 0)[:, None]
        return torch.mul(stats.kept, grad_N1).to(head.input.dtype), None, None
    call = Call(grad, head, Operands.of(head, targets), targets, stats)
    return BACKWARD[mode](call, needs_grad)


def _sweep_fwd(operands: Operands, stats: TokenStats) -> None:
    """Forward of every mode but frozen: one sweep over the vocabulary."""
    head = operands.head
    K, N, V = len(stats.kept), len(operands.ids), head.weight.shape[0]
    if K:
        # columns that only round a row up: an op's results hold nothing by chance
        stats.kept[:, V:] = 0
    for rows in [*slices(K, _SWEEP_ROWS), *slices(N, _SWEEP_ROWS, start=K)]:
        stored_RV = stats.kept[rows, :V] if rows.stop <= K else None
        sweep = Sweep(operands, rows, stored=stored_RV is not None)
        sweep.add(slice(0, V), stored_RV)
        sums, stored_sum_R = sweep.finish()
        stats.logps[rows], stats.lse[rows] = sums.logps, sums.lse
        if stored_RV is None:
            continue
        sweep.rescue(sums, stored_sum_R, stored_RV=stored_RV)
        stats.kept_sums[rows] = stored_sum_R
        weigh_target(
            stored_RV, operands.ids[rows], times_slope(stored_sum_R, head, sums.target_logit)
        )


def _frozen_fwd(operands: Operands, stats: TokenStats) -> None:
    """Forward that also makes the hidden states' gradient for an upstream gradient of 1.

        ∂ log p_y / ∂h = (1 - p_y) · (W_y - Σ_{j≠y} E_j · W_j / Σ_{j≠y} E_j),  E = exp(z - z_y)

    times scale and the softcap's slopes.
    """
    head = operands.head
    N, (V, D) = len(operands.ids), head.weight.shape
    tile_rows, tile_cols = _frozen_tile(operands)
    stored = torch.empty(
        min(tile_rows, N),
        aligned_columns(min(tile_cols, V)),
        dtype=operands.exp_dtype,
        device=head.input.device,
    )
    for rows in slices(N, tile_rows):
        sweep = Sweep(operands, rows, stored=True)
        total_RD = head.input.new_zeros(rows.stop - rows.start, D, dtype=torch.float32)
        for cols in slices(V, tile_cols):
            stored_RC = stored[: len(total_RD), : cols.stop - cols.start]
            sweep.add(cols, stored_RC)
            add_matmul(total_RD, stored_RC, head.weight[cols])
        sums, stored_sum_R = sweep.finish()
        sweep.rescue(sums, stored_sum_R, total_RD=total_RD)
        ids_R = operands.ids[rows]
        others_R = -sums.logps.expm1().masked_fill(ids_R < 0, 0) * head.scale
        total_RD.mul_(-shared(others_R, stored_sum_R)[:, None])
        target_R = times_slope(others_R, head, sums.target_logit)
        total_RD += target_R[:, None] * head.weight[ids_R.clamp_min(0)]
        stats.logps[rows], stats.lse[rows], stats.kept[rows] = sums.logps, sums.lse, total_RD


def _row_bytes(head: Head) -> int:
    """Of a row's exponentials."""
    return aligned_columns(head.weight.shape[0]) * head.exp_dtype.itemsize


def _frozen_tile(operands: Operands) -> tuple[int, int]:
    """Rows, columns of the exponentials; columns in whole tiles of what makes the logits.

    A product of the library has other bits in another width, and half the workspace.
    """
    rows, cols = _FROZEN_TILE
    budget = float(limit())
    row_bytes = operands.head.input.shape[1] * 4
    if operands.tile is not None:
        block_v = operands.tile.block_v
    else:
        _, block_v = product_tile()
        budget /= 2
    while rows > 32 and rows * (row_bytes + block_v * operands.exp_dtype.itemsize) > budget:
        rows //= 2
    spare = (budget / rows - row_bytes) / operands.exp_dtype.itemsize
    return rows, max(1, min(cols, int(spare)) // block_v) * block_v
