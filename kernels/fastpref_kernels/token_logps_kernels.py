"""Triton kernels of `token_logps`: sums over the vocabulary, and exponentials for the backward.

A sweep over the vocabulary stores, for each row and each block of columns, max z and
Σ exp(z - max); `_combine_kernel` reduces the blocks in a fixed order. The target's column is
excluded: its logit is a separate dot product, and log p = -softplus(lse of the others - z_y) stays
accurate for confident tokens.

16-bit operands on GPUs listed in `FUSED_TILES` use a GEMM fused with the sums (`_sweep_kernel`).
Else logits come tile by tile from a library GEMM (`_sweep_tile_kernel`); later steps are the same.

A row's sums have the same bits whatever else a sweep stores, so a policy with gradients and its
reference without start at a log-ratio of exactly zero. For this every variant of a kernel reduces
the same tile layout (a test reads it off the compiled code) and no product is fused with a
following add (`launch.COMPILE`); all other operations of a sweep are elementwise.

A sweep may store exp(z - anchor) with the anchor z_y for the backward. As the anchor is known
beforehand, no block needs its own scale and the backward is a plain GEMM. Rows whose largest logit
is more than MAX_DRIFT nats above the anchor are recomputed by `_rescue_kernel`.
"""

import triton
import triton.language as tl

from fastpref_kernels.tiles import (
    cap_logits,
    column_parts,
    locate_tile,
    product_columns,
    product_tile,
    softcap_slope,
    tile_index,
    transform_logits,
)

LOWEST = tl.constexpr(-3.4028234663852886e38)

IGNORED = tl.constexpr(-(2**63))
"""Target of an ignored row. Not -1: that may be a caller's mistake, and must not score 0."""

MAX_DRIFT = tl.constexpr(70.0)
"""Largest stored z - anchor, in nats: 70 · e^70 summed over 2^18 columns is finite in float32, and
e^70 is finite in bfloat16."""


@triton.jit(do_not_specialize=["V"])
def _target_logits_kernel(
    input_ptr, weight_ptr, bias_ptr,  # (N, D), (V, D), (V,) float
    target_ptr, logits_ptr,           # (N,) int64, < 0 where ignored; (N,) float32
    stride_n, stride_v, V, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """z_y, 0 for ignored rows, -inf for ids out of range; one program per row, grid (N,)."""
    # int64: 1M hidden states with D = 4,096 have 2^32 elements
    i_n = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + i_n)
    scored = target != IGNORED
    is_column = (target >= 0) & (target < V)
    row = tl.where(is_column, target, 0)
    products = tl.zeros((BLOCK_D,), dtype=tl.float32)
    for start_d in range(0, D, BLOCK_D):
        offs_d = start_d + tl.arange(0, BLOCK_D)
        mask_d = offs_d < D
        hidden = tl.load(input_ptr + i_n * stride_n + offs_d, mask=mask_d, other=0.0)
        weight = tl.load(weight_ptr + row * stride_v + offs_d, mask=mask_d, other=0.0)
        products += hidden.to(tl.float32) * weight.to(tl.float32)
    logit = tl.sum(products, 0)
    if HAS_BIAS:
        logit += tl.load(bias_ptr + row).to(tl.float32)
    logit = cap_logits(logit, scale, softcap, HAS_SOFTCAP)
    logit = tl.where(is_column, logit, float("-inf"))
    tl.store(logits_ptr + i_n, tl.where(scored, logit, 0.0))


@triton.jit
def _fold(
    logits, target, anchor, offs_v, mask_v, softcap,
    EXP: tl.constexpr, GAP: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Row statistics of a tile without the targets: max and Σ exp(z - max). With a dtype EXP also
    exp(z - anchor) times the softcap's slope, and Σ of these before the slope (rounded to EXP if
    there is no softcap). GAP: also Σ of the stored exponentials times (z - anchor)."""
    keep = mask_v[None, :] & (offs_v[None, :] != target[:, None]) & (target >= 0)[:, None]
    others = tl.where(keep, logits, float("-inf"))
    # at least the lowest finite float32, so that -inf - max is -inf and not NaN
    row_max = tl.maximum(tl.max(others, 1), LOWEST)
    exp_logits = tl.exp(others - row_max[:, None])
    row_sum = tl.sum(exp_logits, 1)
    stored = exp_logits
    stored_sum = row_sum
    if EXP is not None:
        drift = tl.exp(tl.minimum(row_max - anchor, MAX_DRIFT))
        stored *= drift[:, None]
        if HAS_SOFTCAP:
            stored_sum = row_sum * drift
            # ignored rows may hold NaN, and max(NaN, 0) is 0
            stored = tl.maximum(stored * softcap_slope(logits, softcap), 0.0).to(EXP)
        else:
            # sum the rounded values, so that the columns' shares add up to exactly 1
            stored = stored.to(EXP)
            stored_sum = tl.sum(stored.to(tl.float32), 1)
    gap = stored_sum
    if GAP:
        # a column of -inf has weight 0, and 0 · (-inf) is NaN
        weights = stored.to(tl.float32)
        gap = tl.sum(tl.where(weights > 0, weights * (logits - anchor[:, None]), 0.0), 1)
    return row_max, row_sum, stored, stored_sum, gap


@triton.jit
def _store_sums(
    max_ptr, sum_ptr, stored_sum_ptr, gap_ptr,  # (blocks, N) float32
    row_max, row_sum, stored_sum, gap, i_block, offs_n, mask_n, N,
    EXP: tl.constexpr, GAP: tl.constexpr,
):  # fmt: skip
    offs = i_block.to(tl.int64) * N + offs_n
    tl.store(max_ptr + offs, row_max, mask=mask_n)
    tl.store(sum_ptr + offs, row_sum, mask=mask_n)
    if EXP is not None:
        tl.store(stored_sum_ptr + offs, stored_sum, mask=mask_n)
    if GAP:
        tl.store(gap_ptr + offs, gap, mask=mask_n)


@triton.jit
def _sweep_tile(
    i_tile, i_summed, input_desc, weight_desc, stored_desc, bias_ptr, target_ptr, anchor_ptr,
    max_ptr, sum_ptr, stored_sum_ptr, gap_ptr, N, start_v, stop_v, scale, softcap,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr, PROMOTE_D: tl.constexpr, PARTS: tl.constexpr, LOOPS: tl.constexpr,
    EXP: tl.constexpr, GAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Logits of the i-th tile, and row sums of each of its parts; `i_summed` equals `i_tile`."""
    i_n, i_v = locate_tile(i_tile, N, stop_v - start_v, BLOCK_N, BLOCK_V, GROUP_N)
    first_v = start_v + i_v * BLOCK_V
    product = product_tile(
        input_desc, weight_desc, i_n * BLOCK_N, first_v, D, BLOCK_N, BLOCK_V, BLOCK_D, PROMOTE_D
    )
    # recomputed: in the persistent loop both indices would occupy registers during the GEMM
    i_n, i_v = locate_tile(i_summed, N, stop_v - start_v, BLOCK_N, BLOCK_V, GROUP_N)
    first_v = start_v + i_v * BLOCK_V
    offs_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    target = tl.load(target_ptr + offs_n, mask=mask_n, other=-1)
    anchor = tl.load(anchor_ptr + offs_n, mask=mask_n, other=0.0)
    parts = column_parts(product, BLOCK_N, BLOCK_V, PARTS)
    PART_V: tl.constexpr = BLOCK_V // PARTS
    for i_part in tl.static_range(PARTS):
        part_v = first_v + i_part * PART_V
        offs_v = part_v + tl.arange(0, PART_V)
        mask_v = offs_v < stop_v
        logits = transform_logits(
            parts[i_part],
            bias_ptr, offs_v, mask_v, scale, softcap, HAS_BIAS, HAS_SOFTCAP,
        )  # fmt: skip
        row_max, row_sum, stored, stored_sum, gap = _fold(
            logits, target, anchor, offs_v, mask_v, softcap, EXP, GAP, HAS_SOFTCAP
        )
        if EXP is not None:
            stored_desc.store([i_n * BLOCK_N, part_v - start_v], stored)
        # the right parts of the last tile may lie outside of the vocabulary
        if LOOPS:
            # a mask instead of a branch, with which Triton 3.6 fails to flatten the two loops
            has_columns = tl.full((BLOCK_N,), part_v, dtype=tl.int32) < stop_v
            _store_sums(
                max_ptr, sum_ptr, stored_sum_ptr, gap_ptr, row_max, row_sum, stored_sum, gap,
                part_v // PART_V, offs_n, mask_n & has_columns, N, EXP, GAP,
            )  # fmt: skip
        elif part_v < stop_v:
            _store_sums(
                max_ptr, sum_ptr, stored_sum_ptr, gap_ptr, row_max, row_sum, stored_sum, gap,
                part_v // PART_V, offs_n, mask_n, N, EXP, GAP,
            )  # fmt: skip


@triton.jit(do_not_specialize=["N", "start_v", "stop_v"])
def _sweep_kernel(
    input_desc, weight_desc, stored_desc,  # (N, D), (V, D) 16-bit float; (N, stop_v - start_v) EXP
    bias_ptr, target_ptr, anchor_ptr,      # (V,) float; (N,) int64, < 0 where ignored; (N,) float32
    max_ptr, sum_ptr, stored_sum_ptr, gap_ptr,  # (blocks of the whole V, N) float32
    N, start_v, stop_v, scale, softcap,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr, PROMOTE_D: tl.constexpr, PROGRAMS: tl.constexpr, PARTS: tl.constexpr,
    EXP: tl.constexpr, GAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """`_sweep_tile` of all tiles; grid (row blocks * column blocks,), or (PROGRAMS,) if it is > 0.

    With PROGRAMS the kernel is persistent: each program takes every PROGRAMS-th tile. Its tile loop
    is flattened with the GEMM's, so that a tile's operands are loaded during the previous epilogue.
    """
    i_program = tl.program_id(0)
    if PROGRAMS == 0:
        _sweep_tile(
            i_program, i_program, input_desc, weight_desc, stored_desc, bias_ptr, target_ptr,
            anchor_ptr, max_ptr, sum_ptr, stored_sum_ptr, gap_ptr,
            N, start_v, stop_v, scale, softcap, D, BLOCK_N, BLOCK_V, BLOCK_D, GROUP_N, PROMOTE_D,
            PARTS, False, EXP, GAP, HAS_BIAS, HAS_SOFTCAP,
        )  # fmt: skip
    else:
        num_tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(stop_v - start_v, BLOCK_V)
        i_summed = i_program - PROGRAMS
        for i_tile in tl.range(i_program, num_tiles, PROGRAMS, flatten=True):
            i_summed += PROGRAMS
            _sweep_tile(
                i_tile, i_summed, input_desc, weight_desc, stored_desc, bias_ptr, target_ptr,
                anchor_ptr, max_ptr, sum_ptr, stored_sum_ptr, gap_ptr,
                N, start_v, stop_v, scale, softcap, D, BLOCK_N, BLOCK_V, BLOCK_D, GROUP_N,
                PROMOTE_D, PARTS, True, EXP, GAP, HAS_BIAS, HAS_SOFTCAP,
            )  # fmt: skip


@triton.jit(do_not_specialize=["N", "start_v", "stop_v", "first_n", "R"])
def _sweep_tile_kernel(
    logits_ptr, stored_ptr,            # (R, stop_v - start_v) float32 without bias, EXP
    bias_ptr, target_ptr, anchor_ptr,  # (V,) float; (N,) int64, < 0 where ignored; (N,) float32
    max_ptr, sum_ptr, stored_sum_ptr, gap_ptr,  # (blocks of the whole V, N) float32
    stride_logits, stride_stored, N, first_n, R, start_v, stop_v, scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    EXP: tl.constexpr, GAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Row sums of a tile of GEMM results, from row first_n; grid (row blocks * column blocks,)."""
    i_n, i_v = tile_index(R, stop_v - start_v, BLOCK_N, BLOCK_V, 1)
    rows = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = product_columns(i_v, BLOCK_V)
    offs_n = first_n + rows
    offs_v = start_v + cols
    mask_n = rows < R
    mask_v = offs_v < stop_v
    mask = mask_n[:, None] & mask_v[None, :]
    # int64: a tile may hold more than 2^31 elements
    rows_long = rows.to(tl.int64)[:, None]
    target = tl.load(target_ptr + offs_n, mask=mask_n, other=-1)
    anchor = tl.load(anchor_ptr + offs_n, mask=mask_n, other=0.0)
    logits = tl.load(logits_ptr + rows_long * stride_logits + cols[None, :], mask=mask, other=0.0)
    logits = transform_logits(
        logits, bias_ptr, offs_v, mask_v, scale, softcap, HAS_BIAS, HAS_SOFTCAP
    )
    row_max, row_sum, stored, stored_sum, gap = _fold(
        logits, target, anchor, offs_v, mask_v, softcap, EXP, GAP, HAS_SOFTCAP
    )
    if EXP is not None:
        tl.store(stored_ptr + rows_long * stride_stored + cols[None, :], stored, mask=mask)
    _store_sums(
        max_ptr, sum_ptr, stored_sum_ptr, gap_ptr, row_max, row_sum, stored_sum, gap,
        start_v // BLOCK_V + i_v, offs_n, mask_n, N, EXP, GAP,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N"])
def _combine_kernel(
    max_ptr, sum_ptr, extra_ptr,              # (NUM_BLOCKS, N) float32
    row_max_ptr, row_sum_ptr, row_extra_ptr,  # (N,) float32
    N,
    NUM_BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_B: tl.constexpr,
    EXTRA: tl.constexpr, OVER_MAX: tl.constexpr,
):  # fmt: skip
    """Reduce the sums of all column blocks, in the order of the blocks; grid (row blocks,).

    EXTRA: there is a third sum. OVER_MAX: it is relative to exp(max), like the second.
    """
    offs_n = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    row_max = tl.full((BLOCK_N,), LOWEST, dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    row_extra = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start_b in range(0, NUM_BLOCKS, BLOCK_B):
        offs_b = start_b + tl.arange(0, BLOCK_B)
        mask = (offs_b < NUM_BLOCKS)[:, None] & mask_n[None, :]
        offs = offs_b.to(tl.int64)[:, None] * N + offs_n[None, :]
        block_max = tl.load(max_ptr + offs, mask=mask, other=LOWEST)
        block_sum = tl.load(sum_ptr + offs, mask=mask, other=0.0)
        new_max = tl.maximum(row_max, tl.max(block_max, 0))
        rescale = tl.exp(row_max - new_max)
        block_scale = tl.exp(block_max - new_max[None, :])
        row_max = new_max
        row_sum = row_sum * rescale + tl.sum(block_sum * block_scale, 0)
        if EXTRA:
            block_extra = tl.load(extra_ptr + offs, mask=mask, other=0.0)
            if OVER_MAX:
                row_extra *= rescale
                block_extra *= block_scale
            row_extra += tl.sum(block_extra, 0)
    tl.store(row_max_ptr + offs_n, row_max, mask=mask_n)
    tl.store(row_sum_ptr + offs_n, row_sum, mask=mask_n)
    if EXTRA:
        tl.store(row_extra_ptr + offs_n, row_extra, mask=mask_n)
