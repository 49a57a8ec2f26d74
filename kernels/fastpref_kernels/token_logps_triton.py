"""Triton launchers of `token_logps`, in five modes with different numbers of GEMM passes.

    store    3 passes: the exponentials of all logits fit in the workspace and are kept; both
             gradients are GEMMs with them
    partial  3 to 4 passes: exponentials of as many leading rows as fit in the workspace are kept
    lean     4 passes: the backward recomputes the logits, one vocabulary slice at a time
    frozen   2 passes: only the hidden states require a gradient, which the forward computes for
             an upstream gradient of 1
    scores   1 pass: no gradient is required

A pass is 2·N·D·V floating-point operations. The mode depends on shapes, dtypes and workspace only:
float16, whose exponentials would overflow, takes lean wherever a gradient is required.
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
"""Rows per pass over the vocabulary: bounds the memory of per-block sums. Reading the head once
per group of rows, 2·D·V bytes at 3 TB/s, takes 1/31 of the time of the GEMM with it, 2·8192·D·V
operations at 790 TFLOP/s."""
_FROZEN_TILE = (4096, 32768)
"""Rows, columns of exponentials per GEMM with the head: on an H100 as fast as larger tiles at
D = 4,096, and 4 to 12 % faster than half the rows."""


def choose_mode(head: Head, needs_grad: NeedsGrad) -> str:
    """Mode of a call; see the module's docstring.

    Args:
        head: Hidden states and LM head.
        needs_grad: Which of input, weight and bias require a gradient.
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
    """Uninitialised results of the forward, with the tensors the mode keeps for its backward."""
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
    """Log-probability of each row's target, and the tensors that the mode's backward needs."""
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
    """Gradients of input, weight and bias from the upstream gradient (N,), in the same mode."""
    if mode == "frozen":
        grad_N1 = grad.float().masked_fill(targets.ignored, 0)[:, None]
        return torch.mul(stats.kept, grad_N1).to(head.input.dtype), None, None
    call = Call(grad, head, Operands.of(head, targets), targets, stats)
    return BACKWARD[mode](call, needs_grad)


def _sweep_fwd(operands: Operands, stats: TokenStats) -> None:
    """Forward of every mode except frozen: one pass over the vocabulary."""
    head = operands.head
    K, N, V = len(stats.kept), len(operands.ids), head.weight.shape[0]
    if K:
        # alignment columns: an op must not return uninitialised memory
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
    """Forward that also computes the hidden states' gradient for an upstream gradient of 1.

        ∂ log p_y / ∂h = (1 - p_y) · (W_y - Σ_{j≠y} E_j · W_j / Σ_{j≠y} E_j),  E = exp(z - z_y)

    times the logit scale and, on each column's term, the softcap's slope.
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
    """Bytes of a row's exponentials."""
    return aligned_columns(head.weight.shape[0]) * head.exp_dtype.itemsize


def _frozen_tile(operands: Operands) -> tuple[int, int]:
    """Rows, columns of the exponentials, reduced to the workspace; columns in whole GEMM tiles.

    Library GEMMs need whole tiles, as their bits depend on the width, and half of the workspace.
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
