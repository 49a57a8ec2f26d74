"""Triton kernels of `token_logps_and_kl`: policy and reference over the same columns together.

The forward sums, for each row and block of columns, both models' max and Σ exp(z - max) and the
first model's Σ exp(z - max) · (z - z' - (z_y - z'_y)); "first" is the model that the KL's
expectation is under. Terms are relative to the targets' logits, to keep them of the KL's order.

For its backward a forward may store, for each column, the larger of exp(z - z_y) and
exp(z' - z'_y), times the softcap's slope, and the log-ratio of the two. The smaller one is the
larger times exp(-|log-ratio|). In bfloat16 and float16 the error of p and q is at most 2^-9 of the
larger, and p - q stays accurate where they are close, unlike with two rounded probabilities.
"""

import triton
import triton.language as tl

from fastpref_kernels.tiles import (
    eighths,
    product_columns,
    product_tile,
    softcap_slope,
    tile_index,
    transform_both,
    transform_logits,
)
from fastpref_kernels.token_logps_kernels import LOWEST, MAX_DRIFT


@triton.jit
def _sum_columns(
    logits, reference_logits, anchor, reference_anchor, keep, UNDER_REFERENCE: tl.constexpr
):
    """Row sums of a tile: max and sum of both models, and the first model's gap."""
    others = tl.where(keep, logits, float("-inf"))
    reference_others = tl.where(keep, reference_logits, float("-inf"))
    row_max = tl.maximum(tl.max(others, 1), LOWEST)
    reference_max = tl.maximum(tl.max(reference_others, 1), LOWEST)
    exp_logits = tl.exp(others - row_max[:, None])
    reference_exp = tl.exp(reference_others - reference_max[:, None])
    # as in `row_sums.base_gap`
    base_gap = anchor - reference_anchor
    base_gap = tl.where(tl.abs(base_gap) < float("inf"), base_gap, 0.0)[:, None]
    if UNDER_REFERENCE:
        weights = reference_exp
        gaps = reference_logits - logits + base_gap
    else:
        weights = exp_logits
        gaps = logits - reference_logits - base_gap
    # a column of -inf has weight 0 and a gap that may be NaN
    gap = tl.sum(tl.where(weights > 0, weights * gaps, 0.0), 1)
    return row_max, tl.sum(exp_logits, 1), reference_max, tl.sum(reference_exp, 1), gap


@triton.jit
def _add_sums(
    max_a, sum_a, gap_a, max_b, sum_b, gap_b,
):  # fmt: skip
    """Merge the online sums of two sets of columns, a and b."""
    new_max = tl.maximum(max_a, max_b)
    scale_a = tl.exp(max_a - new_max)
    scale_b = tl.exp(max_b - new_max)
    return new_max, sum_a * scale_a + sum_b * scale_b, gap_a * scale_a + gap_b * scale_b


@triton.jit
def _add_columns(
    row_max, row_sum, reference_max, reference_sum, gap,
    logits, reference_logits, anchor, reference_anchor, keep, UNDER_REFERENCE: tl.constexpr,
):  # fmt: skip
    """Merge a tile's row sums into the running ones; the gap is rescaled with the first model."""
    part_max, part_sum, reference_part_max, reference_part_sum, part_gap = _sum_columns(
        logits, reference_logits, anchor, reference_anchor, keep, UNDER_REFERENCE
    )
    if UNDER_REFERENCE:
        row_max, row_sum, _ = _add_sums(row_max, row_sum, gap, part_max, part_sum, part_gap)
        reference_max, reference_sum, gap = _add_sums(
            reference_max, reference_sum, gap, reference_part_max, reference_part_sum, part_gap
        )
    else:
        reference_max, reference_sum, _ = _add_sums(
            reference_max, reference_sum, gap, reference_part_max, reference_part_sum, part_gap
        )
        row_max, row_sum, gap = _add_sums(row_max, row_sum, gap, part_max, part_sum, part_gap)
    return row_max, row_sum, reference_max, reference_sum, gap


@triton.jit
def _store_joint_sums(
    max_ptr, sum_ptr, reference_max_ptr, reference_sum_ptr, gap_ptr,  # (blocks, N) float32
    row_max, row_sum, reference_max, reference_sum, gap, i_block, offs_n, mask_n, N,
):  # fmt: skip
    offs = i_block.to(tl.int64) * N + offs_n
    tl.store(max_ptr + offs, row_max, mask=mask_n)
    tl.store(sum_ptr + offs, row_sum, mask=mask_n)
    tl.store(reference_max_ptr + offs, reference_max, mask=mask_n)
    tl.store(reference_sum_ptr + offs, reference_sum, mask=mask_n)
    tl.store(gap_ptr + offs, gap, mask=mask_n)


@triton.jit
def _larger_and_log_ratio(
    logits, reference_logits, anchor, reference_anchor, keep, softcap, HAS_SOFTCAP: tl.constexpr
):
    """max(exp(z - anchor), exp(z' - anchor')) times the softcap's slope, and the log-ratio of the
    two exponentials; both 0 where `keep` is false."""
    over = logits - anchor[:, None]
    reference_over = reference_logits - reference_anchor[:, None]
    larger = tl.exp(tl.minimum(tl.maximum(over, reference_over), MAX_DRIFT))
    if HAS_SOFTCAP:
        larger *= softcap_slope(logits, softcap)
    # also equal: -inf and -inf, whose difference is NaN
    log_ratio = tl.where(over == reference_over, 0.0, over - reference_over)
    return tl.where(keep, larger, 0.0), tl.where(keep, log_ratio, 0.0)


@triton.jit(do_not_specialize=["N", "start_v", "stop_v"])
def _joint_sweep_kernel(
    input_desc, weight_desc,                        # (N, D), (V, D) 16-bit float
    reference_input_desc, reference_weight_desc,    # (N, D_REFERENCE), (V, D_REFERENCE)
    larger_desc, log_ratio_desc,                    # (N, stop_v - start_v) EXP and RATIO, or None
    bias_ptr, reference_bias_ptr, target_ptr,       # (V,) float, twice; (N,) int64, < 0 ignored
    anchor_ptr, reference_anchor_ptr,               # (N,) float32
    max_ptr, sum_ptr, reference_max_ptr, reference_sum_ptr, gap_ptr,  # (blocks of V, N) float32
    N, start_v, stop_v, scale, softcap,
    D: tl.constexpr, D_REFERENCE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
    PROMOTE_D: tl.constexpr, EXP: tl.constexpr, RATIO: tl.constexpr, UNDER_REFERENCE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_REFERENCE_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Both models' logits of a tile, and row sums of it; grid (row blocks * column blocks,)."""
    i_n, i_v = tile_index(N, stop_v - start_v, BLOCK_N, BLOCK_V, GROUP_N)
    start_n = i_n * BLOCK_N
    first_v = start_v + i_v * BLOCK_V
    product = product_tile(
        input_desc, weight_desc, start_n, first_v, D, BLOCK_N, BLOCK_V, BLOCK_D, PROMOTE_D
    )
    reference_product = product_tile(
        reference_input_desc, reference_weight_desc,
        start_n, first_v, D_REFERENCE, BLOCK_N, BLOCK_V, BLOCK_D, PROMOTE_D,
    )  # fmt: skip
    offs_n = start_n + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    target = tl.load(target_ptr + offs_n, mask=mask_n, other=-1)
    anchor = tl.load(anchor_ptr + offs_n, mask=mask_n, other=0.0)
    reference_anchor = tl.load(reference_anchor_ptr + offs_n, mask=mask_n, other=0.0)
    parts = eighths(product, BLOCK_N, BLOCK_V)
    reference_parts = eighths(reference_product, BLOCK_N, BLOCK_V)
    row_max = tl.full((BLOCK_N,), LOWEST, dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    reference_max, reference_sum = row_max, row_sum
    gap = row_sum
    PART_V: tl.constexpr = BLOCK_V // 8
    for i_part in tl.static_range(8):
        part_v = first_v + i_part * PART_V
        offs_v = part_v + tl.arange(0, PART_V)
        mask_v = offs_v < stop_v
        logits, reference_logits = transform_both(
            parts[i_part], reference_parts[i_part],
            bias_ptr, reference_bias_ptr, offs_v, mask_v, scale, softcap,
            HAS_BIAS, HAS_REFERENCE_BIAS, HAS_SOFTCAP,
        )  # fmt: skip
        keep = mask_v[None, :] & (offs_v[None, :] != target[:, None]) & (target >= 0)[:, None]
        if EXP is not None:
            larger, log_ratio = _larger_and_log_ratio(
                logits, reference_logits, anchor, reference_anchor, keep, softcap, HAS_SOFTCAP
            )
            larger_desc.store([start_n, part_v - start_v], larger.to(EXP))
            log_ratio_desc.store([start_n, part_v - start_v], log_ratio.to(RATIO))
        row_max, row_sum, reference_max, reference_sum, gap = _add_columns(
            row_max, row_sum, reference_max, reference_sum, gap,
            logits, reference_logits, anchor, reference_anchor, keep, UNDER_REFERENCE,
        )  # fmt: skip
    _store_joint_sums(
        max_ptr, sum_ptr, reference_max_ptr, reference_sum_ptr, gap_ptr,
        row_max, row_sum, reference_max, reference_sum, gap, first_v // BLOCK_V, offs_n, mask_n, N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "start_v", "stop_v", "first_n", "R"])
def _joint_sweep_tile_kernel(
    logits_ptr, reference_logits_ptr,          # (R, stop_v - start_v) float32 without bias
    larger_ptr, log_ratio_ptr,                 # (R, stop_v - start_v) EXP and RATIO, or None
    bias_ptr, reference_bias_ptr, target_ptr,  # (V,) float, twice; (N,) int64, < 0 where ignored
    anchor_ptr, reference_anchor_ptr,          # (N,) float32
    max_ptr, sum_ptr, reference_max_ptr, reference_sum_ptr, gap_ptr,  # (blocks of V, N) float32
    stride_logits, stride_stored, N, first_n, R, start_v, stop_v, scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    EXP: tl.constexpr, RATIO: tl.constexpr, UNDER_REFERENCE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_REFERENCE_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Row sums of both models' GEMM results, rows first_n on; grid (row * column blocks,)."""
    i_n, i_v = tile_index(R, stop_v - start_v, BLOCK_N, BLOCK_V, 1)
    rows = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = product_columns(i_v, BLOCK_V)
    offs_n = first_n + rows
    offs_v = start_v + cols
    mask_n = rows < R
    mask_v = offs_v < stop_v
    mask = mask_n[:, None] & mask_v[None, :]
    # int64: a tile may hold more than 2^31 elements
    offs_logits = rows.to(tl.int64)[:, None] * stride_logits + cols[None, :]
    target = tl.load(target_ptr + offs_n, mask=mask_n, other=-1)
    anchor = tl.load(anchor_ptr + offs_n, mask=mask_n, other=0.0)
    reference_anchor = tl.load(reference_anchor_ptr + offs_n, mask=mask_n, other=0.0)
    logits = transform_logits(
        tl.load(logits_ptr + offs_logits, mask=mask, other=0.0),
        bias_ptr, offs_v, mask_v, scale, softcap, HAS_BIAS, HAS_SOFTCAP,
    )  # fmt: skip
    reference_logits = transform_logits(
        tl.load(reference_logits_ptr + offs_logits, mask=mask, other=0.0),
        reference_bias_ptr, offs_v, mask_v, scale, softcap, HAS_REFERENCE_BIAS, HAS_SOFTCAP,
    )  # fmt: skip
    keep = mask_v[None, :] & (offs_v[None, :] != target[:, None]) & (target >= 0)[:, None]
    if EXP is not None:
        larger, log_ratio = _larger_and_log_ratio(
            logits, reference_logits, anchor, reference_anchor, keep, softcap, HAS_SOFTCAP
        )
        offs_stored = rows.to(tl.int64)[:, None] * stride_stored + cols[None, :]
        tl.store(larger_ptr + offs_stored, larger.to(EXP), mask=mask)
        tl.store(log_ratio_ptr + offs_stored, log_ratio.to(RATIO), mask=mask)
    row_max, row_sum, reference_max, reference_sum, gap = _sum_columns(
        logits, reference_logits, anchor, reference_anchor, keep, UNDER_REFERENCE
    )
    _store_joint_sums(
        max_ptr, sum_ptr, reference_max_ptr, reference_sum_ptr, gap_ptr,
        row_max, row_sum, reference_max, reference_sum, gap,
        start_v // BLOCK_V + i_v, offs_n, mask_n, N,
    )  # fmt: skip
