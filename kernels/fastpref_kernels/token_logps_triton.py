"""`token_logps` on a GPU: the launchers of its kernels, and how many GEMMs its modes take.

    store    3 passes: exponentials of all logits are kept for the backward, if the workspace holds
             them, and both gradients are GEMMs with them
    lean     4 passes: the backward makes a slice of the logits again
    frozen   2 passes: only the hidden states want a gradient, which the forward makes for an
             upstream gradient of 1
    scores   1 pass: nothing wants a gradient

A pass is 2·N·D·V floating-point operations. The mode follows from shapes, dtypes and the workspace.
"""

import torch
from torch import Tensor

from fastpref_kernels import token_logps_gradient_kernels as kernels
from fastpref_kernels.gemm import add_matmul, matmul, matmul_into
from fastpref_kernels.gemm_tiles import GemmTile
from fastpref_kernels.head import (
    Gradients,
    Head,
    NeedsGrad,
    Targets,
    head_gradients,
    logit_gradients,
)
from fastpref_kernels.launch import (
    TRITON_DTYPES,
    Operands,
    aligned_columns,
    descriptors,
    fused_grid,
    gradient_tile,
    looping_blocks,
    product_tile,
    product_tiles,
    result_descriptor,
    row_blocks,
    row_grid,
)
from fastpref_kernels.row_sums import TokenStats
from fastpref_kernels.token_logps_sweep import Sweep, shared, weigh_target
from fastpref_kernels.workspace import get_workspace_mib, slices

_SWEEP_ROWS = 8192
"""Rows of a sweep: bounds the sums of its column blocks. Reading the head once for each such group
costs 1/16 of what multiplying with it does."""
_FROZEN_TILE = (4096, 32768)
"""Rows, columns of the exponentials that one product with the head takes in: on an H100 as fast as
larger ones at D = 4,096, and 4 to 12 % faster than half the rows."""
_PRODUCT_ROWS = 4096
"""Rows of a float32 product with the head."""


def choose_mode(head: Head, needs_grad: NeedsGrad) -> str:
    """Mode of a call; see the module's docstring.

    Args:
        head: What is scored.
        needs_grad: Which of input, weight and bias want a gradient.
    """
    N, V = head.input.shape[0], head.weight.shape[0]
    if not any(needs_grad):
        return "scores"
    if head.gemm_dtype == torch.float16:
        return "lean"
    if needs_grad == (True, False, False):
        return "frozen"
    kept_bytes = N * aligned_columns(V) * head.exp_dtype.itemsize
    return "store" if kept_bytes <= get_workspace_mib() * 2**20 else "lean"


def empty_stats(head: Head, mode: str) -> TokenStats:
    """Uninitialised results of the forward, with what the mode keeps for its backward."""
    (N, D), V = head.input.shape, head.weight.shape[0]
    kept, num_sums = head.input.new_empty(0), 0
    if mode == "store":
        kept, num_sums = head.input.new_empty(N, aligned_columns(V), dtype=head.exp_dtype), N
    elif mode == "frozen":
        kept = head.input.new_empty(N, D)
    scalars = (head.input.new_empty(n, dtype=torch.float32) for n in (N, N, num_sums))
    logps, lse, kept_sums = scalars
    return TokenStats(logps, lse, kept, kept_sums)


def token_logps_fwd(head: Head, targets: Targets, mode: str) -> TokenStats:
    """Log-probability of each row's target, and what the mode's backward starts from."""
    stats = empty_stats(head, mode)
    operands = Operands.of(head, targets)
    if mode == "store":
        # columns that only round a row up: an op's results hold nothing by chance
        stats.kept[:, head.weight.shape[0] :] = 0
    if mode == "frozen":
        _frozen_fwd(operands, stats)
    else:
        _sweep_fwd(operands, stats, stored=mode == "store")
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
    operands = Operands.of(head, targets)
    backward = store_bwd if mode == "store" else lean_bwd
    return backward(grad, head, operands, targets, stats, needs_grad)


def _sweep_fwd(operands: Operands, stats: TokenStats, *, stored: bool) -> None:
    """Forward of every mode but frozen: one sweep over the vocabulary."""
    head = operands.head
    N, V = len(operands.ids), head.weight.shape[0]
    for rows in slices(N, _SWEEP_ROWS):
        sweep = Sweep(operands, rows, stored=stored)
        stored_RV = stats.kept[rows, :V] if stored else None
        sweep.add(slice(0, V), stored_RV)
        sums, stored_sum_R = sweep.finish()
        stats.logps[rows], stats.lse[rows] = sums.logps, sums.lse
        if stored_RV is None:
            continue
        sweep.rescue(sums, stored_sum_R, stored_RV=stored_RV)
        stats.kept_sums[rows] = stored_sum_R
        weigh_target(
            stored_RV, operands.ids[rows], stored_sum_R * _softcap_slope(head, sums.target_logit)
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
        target_R = others_R * _softcap_slope(head, sums.target_logit)
        total_RD += target_R[:, None] * head.weight[ids_R.clamp_min(0)]
        stats.logps[rows], stats.lse[rows], stats.kept[rows] = sums.logps, sums.lse, total_RD


def store_bwd(
    grad: Tensor,
    head: Head,
    operands: Operands,
    targets: Targets,
    stats: TokenStats,
    needs_grad: NeedsGrad,
) -> Gradients:
    """Gradients from the stored exponentials: dz = v · E, with one number v a row."""
    (scaled_N,), _ = logit_gradients(head, targets, grad)
    others_N = -stats.logps.expm1() * scaled_N
    v_N = -shared(others_N, stats.kept_sums)
    exp_NV = stats.kept[:, : head.weight.shape[0]]
    input_ND = weight_VD = bias_V = None
    if needs_grad[0]:
        # what rounding the target's column to 16 bits took away
        target_N = others_N * _softcap_slope(head, stats.lse + stats.logps)
        rest_N = target_N - v_N * exp_NV.gather(1, targets.ids[:, None])[:, 0]
        input_ND = torch.empty_like(head.input, memory_format=torch.contiguous_format)
        for rows in slices(len(grad), _PRODUCT_ROWS):
            product_RD = matmul(exp_NV[rows], operands.head.weight).mul_(v_N[rows, None])
            product_RD += rest_N[rows, None] * operands.head.weight[targets.ids[rows]]
            input_ND[rows] = product_RD
    if needs_grad[1]:
        scaled_ND = torch.empty_like(operands.head.input, dtype=exp_NV.dtype)
        torch.mul(operands.head.input, v_N[:, None], out=scaled_ND)
        scaled_ND.masked_fill_(targets.ignored[:, None], 0)
        weight_VD = head.weight.new_empty(head.weight.shape)
        matmul_into(weight_VD, exp_NV.t(), scaled_ND)
    if needs_grad[2] and head.bias is not None:
        high_N = v_N.to(exp_NV.dtype)
        low_N = (v_N - high_N).to(exp_NV.dtype)
        bias_V = matmul(torch.stack([high_N, low_N]), exp_NV).sum(0).to(head.bias.dtype)
    return input_ND, weight_VD, bias_V


def lean_bwd(
    grad: Tensor,
    head: Head,
    operands: Operands,
    targets: Targets,
    stats: TokenStats,
    needs_grad: NeedsGrad,
    *,
    scored: Operands | None = None,
) -> Gradients:
    """Gradients from logits made again, a slice of the vocabulary at a time.

    Args:
        scored: Whose logits they are; None for `operands` themselves.
    """
    scored = scored or operands
    (scaled_N,), unit = logit_gradients(head, targets, grad)
    row_arguments = {
        "lse_ptr": stats.lse,
        "grad_ptr": scaled_N,
        # 1 - p_y without subtracting from 1: exact for a confident token
        "target_grad_ptr": -scaled_N * stats.logps.expm1(),
    }
    # padding may hold anything, and 0 · NaN would reach the head's gradient
    clean_ND = operands.head.input
    if needs_grad[1]:
        clean_ND = clean_ND.masked_fill(targets.ignored[:, None], 0)

    def dlogits(rows: slice, cols: slice, hidden_RD: Tensor, weight_CD: Tensor) -> Tensor:
        R, C = len(hidden_RD), len(weight_CD)
        dlogits_RC = hidden_RD.new_empty(R, aligned_columns(C))[:, :C]
        arguments = {name: vector[rows] for name, vector in row_arguments.items()}
        arguments["target_ptr"] = scored.ids[rows]
        if scored.tile is None:
            _dlogits_of_products(scored, rows, cols, dlogits_RC, arguments)
        else:
            _dlogits_fused(scored, scored.tile, rows, cols, dlogits_RC, arguments)
        return dlogits_RC

    tile = gradient_tile(scored)
    return head_gradients(head, needs_grad, tile, lambda rows: clean_ND[rows], dlogits, unit=unit)


def _dlogits_fused(
    operands: Operands,
    tile: GemmTile,
    rows: slice,
    cols: slice,
    dlogits_RC: Tensor,
    arguments: dict[str, Tensor],
) -> None:
    head = operands.head
    R, C = dlogits_RC.shape
    kernels._dlogits_kernel[fused_grid(tile, R, C, dlogits_RC.device)](
        *descriptors(tile, head.input[rows], head.weight),
        result_descriptor(tile, dlogits_RC),
        N=len(dlogits_RC),
        start_v=cols.start,
        stop_v=cols.stop,
        D=head.input.shape[1],
        OUT=TRITON_DTYPES[dlogits_RC.dtype],
        **arguments,
        **operands.transform,
        **looping_blocks(tile, dlogits_RC.device),
    )


def _dlogits_of_products(
    operands: Operands,
    rows: slice,
    cols: slice,
    dlogits_RC: Tensor,
    arguments: dict[str, Tensor],
) -> None:
    hidden_RD, weight_CD = operands.head.input[rows], operands.head.weight[cols]
    for part_rows, part_cols in product_tiles(*dlogits_RC.shape):
        products_RC = matmul(hidden_RD[part_rows], weight_CD[part_cols].t())
        part_RC = dlogits_RC[part_rows, part_cols]
        kernels._dlogits_tile_kernel[row_grid(*products_RC.shape)](
            products_RC,
            part_RC,
            stride_logits=products_RC.stride(0),
            stride_dlogits=part_RC.stride(0),
            first_n=part_rows.start,
            R=len(products_RC),
            start_v=cols.start + part_cols.start,
            stop_v=cols.start + part_cols.stop,
            **arguments,
            **operands.transform,
            **row_blocks(),
        )


def _softcap_slope(head: Head, logits: Tensor) -> Tensor:
    slope = head.softcap_slope(logits)
    return torch.ones_like(logits) if slope is None else slope


def _frozen_tile(operands: Operands) -> tuple[int, int]:
    """Rows, columns of the exponentials; columns in whole tiles of what makes the logits.

    A product of the library has other bits in another width, and half the workspace.
    """
    rows, cols = _FROZEN_TILE
    budget = get_workspace_mib() * 2**20
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
