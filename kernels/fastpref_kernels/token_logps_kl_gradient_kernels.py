"""Triton kernels of `token_logps_and_kl`: logit gradients from stored or recomputed values."""

import triton
import triton.language as tl

from fastpref_kernels.tiles import (
    eighths,
    log_softmax,
    product_tile,
    softcap_slope,
    tile_index,
    transform_both,
    transform_logits,
)


@triton.jit
def _gradient(p, p_minus_q, log_ratio, grad_logps, grad_kl, kl, UNDER_REFERENCE: tl.constexpr):
    """dz of columns other than the target: -g_l · p plus the KL's gradient."""
    if UNDER_REFERENCE:
        return grad_kl[:, None] * p_minus_q - grad_logps[:, None] * p
    over_kl = tl.where(p > 0, log_ratio - kl[:, None], 0.0)
    return p * (grad_kl[:, None] * over_kl - grad_logps[:, None])


@triton.jit(do_not_specialize=["first_n", "R", "start_v", "C"])
def _stored_gradient_kernel(
    larger_ptr, log_ratio_ptr, dlogits_ptr,  # (R, C) float
    target_ptr,                              # (N,) int64, < 0 where ignored
    log_scale_ptr, reference_log_scale_ptr,  # (N,) float32, log p and log q of a stored 1
    grad_logps_ptr, grad_kl_ptr, kl_ptr, target_grad_ptr,  # (N,) float32
    stride_stored, stride_dlogits, first_n, R, start_v, C,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, UNDER_REFERENCE: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of logits from stored values; grid (row blocks * column blocks,)."""
    i_n, i_v = tile_index(R, C, BLOCK_N, BLOCK_V, 1)
    rows = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_n = first_n + rows
    mask_n = rows < R
    mask = mask_n[:, None] & (cols < C)[None, :]
    # int64: the stored tensor may have more than 2^31 elements
    rows_long = rows.to(tl.int64)[:, None]
    offs = rows_long * stride_stored + cols[None, :]
    larger = tl.load(larger_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    log_ratio = tl.load(log_ratio_ptr + offs, mask=mask, other=0.0).to(tl.float32)
    target = tl.load(target_ptr + offs_n, mask=mask_n, other=-1)
    log_scale = tl.load(log_scale_ptr + offs_n, mask=mask_n, other=0.0)
    reference_log_scale = tl.load(reference_log_scale_ptr + offs_n, mask=mask_n, other=0.0)
    grad_logps = tl.load(grad_logps_ptr + offs_n, mask=mask_n, other=0.0)
    grad_kl = tl.load(grad_kl_ptr + offs_n, mask=mask_n, other=0.0)
    kl = tl.load(kl_ptr + offs_n, mask=mask_n, other=0.0)
    target_grad = tl.load(target_grad_ptr + offs_n, mask=mask_n, other=0.0)
    of_p = tl.exp(log_scale[:, None] + tl.minimum(log_ratio, 0.0))
    of_q = tl.exp(reference_log_scale[:, None] - tl.maximum(log_ratio, 0.0))
    # not larger · of_p - larger · of_q: equal models give exactly 0, with or without FMA
    p_minus_q = larger * (of_p - of_q)
    log_ratio += (log_scale - reference_log_scale)[:, None]
    dlogits = _gradient(
        larger * of_p, p_minus_q, log_ratio, grad_logps, grad_kl, kl, UNDER_REFERENCE
    )
    is_target = (start_v + cols)[None, :] == target[:, None]
    dlogits = tl.where(is_target, target_grad[:, None], dlogits)
    dlogits = tl.where((target >= 0)[:, None], dlogits, 0.0)
    offs = rows_long * stride_dlogits + cols[None, :]
    tl.store(dlogits_ptr + offs, dlogits.to(dlogits_ptr.dtype.element_ty), mask=mask)


@triton.jit
def _recomputed_gradient(
    logits, reference_logits, lse, reference_lse, grad_logps, grad_kl, kl, target_grad, target,
    offs_v, softcap, UNDER_REFERENCE: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Gradient of a tile of logits from both models' logits; undefined past the vocabulary."""
    logps = log_softmax(logits, lse)
    reference_logps = log_softmax(reference_logits, reference_lse)
    p = tl.exp(logps)
    dlogits = _gradient(
        p, p - tl.exp(reference_logps), logps - reference_logps,
        grad_logps, grad_kl, kl, UNDER_REFERENCE,
    )  # fmt: skip
    is_target = offs_v[None, :] == target[:, None]
    dlogits = tl.where(is_target, target_grad[:, None], dlogits)
    if HAS_SOFTCAP:
        dlogits *= softcap_slope(logits, softcap)
    return tl.where((target >= 0)[:, None], dlogits, 0.0)


@triton.jit(do_not_specialize=["N", "start_v", "stop_v"])
def _joint_dlogits_kernel(
    input_desc, weight_desc,                      # (N, D), (V, D) 16-bit float
    reference_input_desc, reference_weight_desc,  # (N, D_REFERENCE), (V, D_REFERENCE)
    dlogits_desc,                                 # (N, stop_v - start_v) 16-bit float
    bias_ptr, reference_bias_ptr, target_ptr,     # (V,) float, twice; (N,) int64, < 0 ignored
    lse_ptr, reference_lse_ptr,                   # (N,) float64
    grad_logps_ptr, grad_kl_ptr, kl_ptr, target_grad_ptr,  # (N,) float32
    N, start_v, stop_v, scale, softcap,
    D: tl.constexpr, D_REFERENCE: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr, GROUP_N: tl.constexpr,
    PROMOTE_D: tl.constexpr,
    OUT: tl.constexpr, UNDER_REFERENCE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_REFERENCE_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Recompute both models' logits of a tile for its gradient; grid (row * column blocks,)."""
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
    lse = tl.load(lse_ptr + offs_n, mask=mask_n, other=0.0)
    reference_lse = tl.load(reference_lse_ptr + offs_n, mask=mask_n, other=0.0)
    grad_logps = tl.load(grad_logps_ptr + offs_n, mask=mask_n, other=0.0)
    grad_kl = tl.load(grad_kl_ptr + offs_n, mask=mask_n, other=0.0)
    kl = tl.load(kl_ptr + offs_n, mask=mask_n, other=0.0)
    target_grad = tl.load(target_grad_ptr + offs_n, mask=mask_n, other=0.0)
    parts = eighths(product, BLOCK_N, BLOCK_V)
    reference_parts = eighths(reference_product, BLOCK_N, BLOCK_V)
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
        dlogits = _recomputed_gradient(
            logits, reference_logits, lse, reference_lse, grad_logps, grad_kl, kl, target_grad,
            target, offs_v, softcap, UNDER_REFERENCE, HAS_SOFTCAP,
        )  # fmt: skip
        dlogits = tl.where(mask_v[None, :], dlogits, 0.0)
        dlogits_desc.store([start_n, part_v - start_v], dlogits.to(OUT))


@triton.jit(do_not_specialize=["first_n", "R", "start_v", "stop_v"])
def _joint_dlogits_tile_kernel(
    logits_ptr, reference_logits_ptr, dlogits_ptr,  # (R, stop_v - start_v) float32, twice; float
    bias_ptr, reference_bias_ptr, target_ptr,       # (V,) float, twice; (N,) int64, < 0 ignored
    lse_ptr, reference_lse_ptr,                     # (N,) float64
    grad_logps_ptr, grad_kl_ptr, kl_ptr, target_grad_ptr,  # (N,) float32
    stride_logits, stride_dlogits, first_n, R, start_v, stop_v, scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, UNDER_REFERENCE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_REFERENCE_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Logit gradients from both models' GEMM results; grid (row blocks * column blocks,)."""
    i_n, i_v = tile_index(R, stop_v - start_v, BLOCK_N, BLOCK_V, 1)
    rows = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_n = first_n + rows
    offs_v = start_v + cols
    mask_n = rows < R
    mask_v = offs_v < stop_v
    mask = mask_n[:, None] & mask_v[None, :]
    rows_long = rows.to(tl.int64)[:, None]
    offs = rows_long * stride_logits + cols[None, :]
    target = tl.load(target_ptr + offs_n, mask=mask_n, other=-1)
    lse = tl.load(lse_ptr + offs_n, mask=mask_n, other=0.0)
    reference_lse = tl.load(reference_lse_ptr + offs_n, mask=mask_n, other=0.0)
    grad_logps = tl.load(grad_logps_ptr + offs_n, mask=mask_n, other=0.0)
    grad_kl = tl.load(grad_kl_ptr + offs_n, mask=mask_n, other=0.0)
    kl = tl.load(kl_ptr + offs_n, mask=mask_n, other=0.0)
    target_grad = tl.load(target_grad_ptr + offs_n, mask=mask_n, other=0.0)
    logits = transform_logits(
        tl.load(logits_ptr + offs, mask=mask, other=0.0),
        bias_ptr, offs_v, mask_v, scale, softcap, HAS_BIAS, HAS_SOFTCAP,
    )  # fmt: skip
    reference_logits = transform_logits(
        tl.load(reference_logits_ptr + offs, mask=mask, other=0.0),
        reference_bias_ptr, offs_v, mask_v, scale, softcap, HAS_REFERENCE_BIAS, HAS_SOFTCAP,
    )  # fmt: skip
    dlogits = _recomputed_gradient(
        logits, reference_logits, lse, reference_lse, grad_logps, grad_kl, kl, target_grad,
        target, offs_v, softcap, UNDER_REFERENCE, HAS_SOFTCAP,
    )  # fmt: skip
    dlogits = dlogits.to(dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + rows_long * stride_dlogits + cols[None, :], dlogits, mask=mask)
