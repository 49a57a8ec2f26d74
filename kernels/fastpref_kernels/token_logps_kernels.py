"""Triton kernels of `token_logps`: sums over the vocabulary, and what they leave for a backward.

A sweep over the vocabulary leaves, for each row and each block of columns, the largest logit and
Σ exp(z - it); `_combine_kernel` adds the blocks up in their order. The target's column is left out
of the sums: its logit is a dot product of its own, and log p = -softplus(lse of the others - z_y)
keeps all digits of a confident token.

Logits come from a GEMM fused with the sums (`_sweep_kernel`) where Triton's GEMM is at home, else
from the library's GEMM a tile at a time (`_sweep_tile_kernel`); what follows is the same.

A row's sums have the same bits whatever else a sweep stores: a policy with gradients and its
reference without begin at a log-ratio of exactly zero. Every variant of a kernel sums over one
layout of the tile, which a test reads off the compiled code, and no product is fused with the sum
behind it (`launch.COMPILE`); everything else in a sweep works element by element.

A sweep may store exp(z - z_y) for the backward to multiply with. An anchor known beforehand makes
a plain GEMM of it: no block needs a scale of its own. Rows whose likeliest column lies more than
MAX_DRIFT nats above their target are written again by `_rescue_kernel`.
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

MAX_DRIFT = tl.constexpr(70.0)
"""Largest logit above the anchor, in nats, whose exponential is stored: e^70 times 70 times 2^18
columns is finite in float32, and so is e^70 in bfloat16."""


@triton.jit(do_not_specialize=["V"])
def _target_logits_kernel(
    input_ptr, weight_ptr, bias_ptr,  # (N, D), (V, D), (V,) float
    target_ptr, logits_ptr,           # (N,) int64, -1 where ignored; (N,) float32
    stride_n, stride_v, V, scale, softcap,
    D: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """z_y, 0 where ignored, -inf where there is no such column; one program per row, grid (N,)."""
    # int64: 1M hidden states of D = 4,096 are 2^32 elements
    i_n = tl.program_id(0).to(tl.int64)
    target = tl.load(target_ptr + i_n)
    scored = target != -1
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
    """A tile's row sums without the targets: max, Σ exp(z - max), and if EXP, a dtype, is given
    exp(z - anchor) times the softcap's slope in that dtype and its sum. GAP: also the sum of what
    is stored times z - anchor."""
    keep = mask_v[None, :] & (offs_v[None, :] != target[:, None]) & (target >= 0)[:, None]
    others = tl.where(keep, logits, float("-inf"))
    # never below the lowest float32, so that -inf - max is -inf and not a NaN
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
            # an ignored row may hold anything: the larger of 0 and no number is 0
            stored = tl.maximum(stored * softcap_slope(logits, softcap), 0.0).to(EXP)
        else:
            # of the rounded numbers: what the columns share out is then exactly all of it
            stored = stored.to(EXP)
            stored_sum = tl.sum(stored.to(tl.float32), 1)
    gap = stored_sum
    if GAP:
        # a column of -inf has no weight and no logit that is a number
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
    """Logits of the i-th tile, and its rows' sums by its parts; `i_summed` is i once more."""
    i_n, i_v = locate_tile(i_tile, N, stop_v - start_v, BLOCK_N, BLOCK_V, GROUP_N)
    first_v = start_v + i_v * BLOCK_V
    product = product_tile(
        input_desc, weight_desc, i_n * BLOCK_N, first_v, D, BLOCK_N, BLOCK_V, BLOCK_D, PROMOTE_D
    )
    # located anew: in a loop both numbers would take registers through the GEMM
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
        # the last tile's right parts may have no columns
        if LOOPS:
            # no branch: Triton 3.6 could not make one loop of two around it
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
    bias_ptr, target_ptr, anchor_ptr,      # (V,) float; (N,) int64, -1 where ignored; (N,) float32
    max_ptr, sum_ptr, stored_sum_ptr, gap_ptr,  # (blocks of the whole V, N) float32
    N, start_v, stop_v, scale, softcap,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr, PROMOTE_D: tl.constexpr, PROGRAMS: tl.constexpr, PARTS: tl.constexpr,
    EXP: tl.constexpr, GAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """`_sweep_tile` of all tiles; grid (row blocks * column blocks,), (PROGRAMS,) if that is given.

    Each of PROGRAMS programs goes over every PROGRAMS-th tile. Its loop and the GEMM's become one,
    so that a tile's first operands are on their way while the tile before it is summed up.
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
    bias_ptr, target_ptr, anchor_ptr,  # (V,) float; (N,) int64, -1 where ignored; (N,) float32
    max_ptr, sum_ptr, stored_sum_ptr, gap_ptr,  # (blocks of the whole V, N) float32
    stride_logits, stride_stored, N, first_n, R, start_v, stop_v, scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    EXP: tl.constexpr, GAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Row sums of a tile of products, rows first_n on; grid (row blocks * column blocks,)."""
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
    """Sums of all blocks of columns, in the blocks' order; grid (row blocks,).

    EXTRA: there is a third sum; OVER_MAX: it counts in units of e^max, as the second does.
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
