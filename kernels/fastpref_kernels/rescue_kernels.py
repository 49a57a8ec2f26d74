"""Triton kernels that recompute rows whose target is more than MAX_DRIFT nats below another column,
where exponentials relative to the target's logit would overflow.

Slow, as each such row reads the whole head, but rare: the target's probability is below e^-70.
Each program checks a group of rows.
"""

import triton
import triton.language as tl

from fastpref_kernels.tiles import head_rows, softcap_slope, transform_logits
from fastpref_kernels.token_logps_kernels import MAX_DRIFT
from fastpref_kernels.token_logps_kl_kernels import _larger_and_log_ratio

RESCUE_ROWS = 16
"""Rows per program: with one row each, 16,384 programs would start and mostly have no work."""


@triton.jit
def _rescue_row(
    i_n, target, anchor, row_max, input_ptr, weight_ptr, bias_ptr, row_sum_ptr,
    stored_ptr, total_ptr, stored_sum_ptr, gap_ptr,
    stride_n, stride_v, stride_stored, scale, softcap,
    V: tl.constexpr, D: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    STORE: tl.constexpr, GAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """`_rescue_kernel` for row i_n; reads the whole head."""
    lse = row_max + tl.log(tl.load(row_sum_ptr + i_n))
    offs_d = tl.arange(0, BLOCK_D)
    mask_d = offs_d < D
    hidden = tl.load(input_ptr + i_n * stride_n + offs_d, mask=mask_d, other=0.0)
    hidden = hidden.to(tl.float32)
    total = tl.zeros((BLOCK_D,), dtype=tl.float32)
    stored_sum = tl.zeros((BLOCK_V,), dtype=tl.float32)
    gap = stored_sum
    for start_v in range(0, V, BLOCK_V):
        offs_v = start_v + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        weight = head_rows(weight_ptr, offs_v, mask_v, offs_d, mask_d, stride_v)
        logits = tl.sum(weight * hidden[None, :], 1)[None, :]
        logits = transform_logits(
            logits, bias_ptr, offs_v, mask_v, scale, softcap, HAS_BIAS, HAS_SOFTCAP
        )
        keep = (mask_v & (offs_v != target))[None, :]
        exp_logits = tl.where(keep, tl.exp(logits - lse), 0.0)
        stored_sum += tl.sum(exp_logits, 0)
        if GAP:
            over = tl.where(exp_logits > 0, logits - anchor, 0.0)
            gap += tl.sum(exp_logits * over, 0)
        if HAS_SOFTCAP:
            exp_logits *= softcap_slope(logits, softcap)
        exp_logits = tl.sum(exp_logits, 0)
        if STORE:
            offs = i_n * stride_stored + offs_v
            tl.store(stored_ptr + offs, exp_logits.to(stored_ptr.dtype.element_ty), mask=mask_v)
        else:
            total += tl.sum(weight * exp_logits[:, None], 0)
    tl.store(stored_sum_ptr + i_n, tl.sum(stored_sum, 0))
    if GAP:
        tl.store(gap_ptr + i_n, tl.sum(gap, 0))
    if not STORE:
        tl.store(total_ptr + i_n * D + offs_d, total, mask=mask_d)


@triton.jit(do_not_specialize=["N"])
def _rescue_kernel(
    input_ptr, weight_ptr, bias_ptr,        # (N, D), (V, D), (V,) float
    target_ptr, anchor_ptr,                 # (N,) int64, < 0 where ignored; (N,) float32
    row_max_ptr, row_sum_ptr,               # (N,) float32
    stored_ptr, total_ptr,                  # (N, V) or None, (N, D) float32 or None
    stored_sum_ptr, gap_ptr,                # (N,) float32, the second or None
    stride_n, stride_v, stride_stored, N, scale, softcap,
    V: tl.constexpr, D: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    STORE: tl.constexpr, GAP: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """For rows with max - anchor > MAX_DRIFT, recompute the stored exponentials or their product
    with the head, relative to the log-sum-exp of the other columns; grid (groups of ROWS rows,)."""
    first_n = tl.program_id(0) * ROWS
    offs_n = first_n + tl.arange(0, ROWS)
    targets = tl.load(target_ptr + offs_n, mask=offs_n < N, other=-1)
    scored = targets >= 0
    drifts = tl.load(row_max_ptr + offs_n, mask=scored, other=0.0)
    drifts -= tl.load(anchor_ptr + offs_n, mask=scored, other=0.0)
    if tl.max((drifts > MAX_DRIFT).to(tl.int32), 0) > 0:
        for i_row in range(ROWS):
            # int64: the stored tensor may have more than 2^31 elements
            i_n = (first_n + i_row).to(tl.int64)
            target = tl.load(target_ptr + i_n, mask=i_n < N, other=-1)
            row_max = tl.load(row_max_ptr + i_n, mask=target >= 0, other=0.0)
            anchor = tl.load(anchor_ptr + i_n, mask=target >= 0, other=0.0)
            if row_max - anchor > MAX_DRIFT:
                _rescue_row(
                    i_n, target, anchor, row_max, input_ptr, weight_ptr, bias_ptr, row_sum_ptr,
                    stored_ptr, total_ptr, stored_sum_ptr, gap_ptr,
                    stride_n, stride_v, stride_stored, scale, softcap,
                    V, D, BLOCK_V, BLOCK_D, STORE, GAP, HAS_BIAS, HAS_SOFTCAP,
                )  # fmt: skip


@triton.jit
def _joint_rescue_row(
    i_n, input_ptr, weight_ptr, bias_ptr,
    reference_input_ptr, reference_weight_ptr, reference_bias_ptr,
    target_ptr, others_lse_ptr, reference_others_lse_ptr, larger_ptr, log_ratio_ptr,
    stride_n, stride_v, stride_reference_n, stride_reference_v, stride_stored, scale, softcap,
    V: tl.constexpr, D: tl.constexpr, D_REFERENCE: tl.constexpr,
    BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_REFERENCE_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """`_joint_rescue_kernel` for row i_n; reads both heads."""
    target = tl.load(target_ptr + i_n)
    anchor = tl.load(others_lse_ptr + i_n + tl.arange(0, 1))
    reference_anchor = tl.load(reference_others_lse_ptr + i_n + tl.arange(0, 1))
    offs_d = tl.arange(0, BLOCK_D)
    hidden = tl.load(input_ptr + i_n * stride_n + offs_d, mask=offs_d < D, other=0.0)
    reference_hidden = tl.load(
        reference_input_ptr + i_n * stride_reference_n + offs_d,
        mask=offs_d < D_REFERENCE,
        other=0.0,
    )
    for start_v in range(0, V, BLOCK_V):
        offs_v = start_v + tl.arange(0, BLOCK_V)
        mask_v = offs_v < V
        weight = head_rows(weight_ptr, offs_v, mask_v, offs_d, offs_d < D, stride_v)
        logits = transform_logits(
            tl.sum(weight * hidden.to(tl.float32)[None, :], 1)[None, :],
            bias_ptr, offs_v, mask_v, scale, softcap, HAS_BIAS, HAS_SOFTCAP,
        )  # fmt: skip
        weight = head_rows(
            reference_weight_ptr,
            offs_v,
            mask_v,
            offs_d,
            offs_d < D_REFERENCE,
            stride_reference_v,
        )
        reference_logits = transform_logits(
            tl.sum(weight * reference_hidden.to(tl.float32)[None, :], 1)[None, :],
            reference_bias_ptr, offs_v, mask_v,
            scale, softcap, HAS_REFERENCE_BIAS, HAS_SOFTCAP,
        )  # fmt: skip
        keep = (mask_v & (offs_v != target))[None, :]
        larger, log_ratio = _larger_and_log_ratio(
            logits, reference_logits, anchor, reference_anchor, keep, softcap, HAS_SOFTCAP
        )
        offs = i_n * stride_stored + offs_v[None, :]
        larger = larger.to(larger_ptr.dtype.element_ty)
        log_ratio = log_ratio.to(log_ratio_ptr.dtype.element_ty)
        tl.store(larger_ptr + offs, larger, mask=mask_v[None, :])
        tl.store(log_ratio_ptr + offs, log_ratio, mask=mask_v[None, :])


@triton.jit(do_not_specialize=["N"])
def _joint_rescue_kernel(
    input_ptr, weight_ptr, bias_ptr,                                # (N, D), (V, D), (V,) float
    reference_input_ptr, reference_weight_ptr, reference_bias_ptr,  # of width D_REFERENCE
    target_ptr, rescued_ptr,                     # (N,) int64, < 0 where ignored; (N,) bool
    others_lse_ptr, reference_others_lse_ptr,    # (N,) float32, log-sum-exp without the target
    larger_ptr, log_ratio_ptr,                   # (N, V) float
    stride_n, stride_v, stride_reference_n, stride_reference_v, stride_stored, N, scale, softcap,
    V: tl.constexpr, D: tl.constexpr, D_REFERENCE: tl.constexpr,
    ROWS: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_REFERENCE_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """For rows marked in `rescued_ptr`, recompute the stored values with the log-sum-exps of the
    other columns as anchors; grid (groups of ROWS rows,)."""
    first_n = tl.program_id(0) * ROWS
    offs_n = first_n + tl.arange(0, ROWS)
    rescued = tl.load(rescued_ptr + offs_n, mask=offs_n < N, other=0)
    if tl.max(rescued.to(tl.int32), 0) > 0:
        for i_row in range(ROWS):
            # int64: the stored tensor may have more than 2^31 elements
            i_n = (first_n + i_row).to(tl.int64)
            if tl.load(rescued_ptr + i_n, mask=i_n < N, other=0):
                _joint_rescue_row(
                    i_n, input_ptr, weight_ptr, bias_ptr,
                    reference_input_ptr, reference_weight_ptr, reference_bias_ptr,
                    target_ptr, others_lse_ptr, reference_others_lse_ptr, larger_ptr, log_ratio_ptr,
                    stride_n, stride_v, stride_reference_n, stride_reference_v, stride_stored,
                    scale, softcap, V, D, D_REFERENCE, BLOCK_V, BLOCK_D,
                    HAS_BIAS, HAS_REFERENCE_BIAS, HAS_SOFTCAP,
                )  # fmt: skip
