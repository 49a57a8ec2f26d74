"""Triton kernels of `token_logps`: gradients of recomputed logits."""

import triton
import triton.language as tl

from fastpref_kernels.tiles import (
    halves,
    locate_tile,
    log_softmax,
    product_tile,
    softcap_slope,
    tile_index,
    transform_logits,
)


@triton.jit
def _dlogits(
    logits, lse, grad, target_grad, target, offs_v, mask_v, softcap, HAS_SOFTCAP: tl.constexpr
):
    """g · (e_y - p) times the softcap's slope; `target_grad` is g · (1 - p_y), kept accurate."""
    dlogits = -grad[:, None] * tl.exp(log_softmax(logits, lse))
    is_target = offs_v[None, :] == target[:, None]
    dlogits = tl.where(is_target, target_grad[:, None], dlogits)
    if HAS_SOFTCAP:
        dlogits *= softcap_slope(logits, softcap)
    return tl.where(mask_v[None, :] & (target >= 0)[:, None], dlogits, 0.0)


@triton.jit
def _dlogits_tile(
    i_tile, input_desc, weight_desc, dlogits_desc, bias_ptr, target_ptr,
    lse_ptr, grad_ptr, target_grad_ptr, N, start_v, stop_v, scale, softcap,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr, PROMOTE_D: tl.constexpr, OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Recompute the i-th tile of logits and store its gradient."""
    i_n, i_v = locate_tile(i_tile, N, stop_v - start_v, BLOCK_N, BLOCK_V, GROUP_N)
    first_v = start_v + i_v * BLOCK_V
    product = product_tile(
        input_desc, weight_desc, i_n * BLOCK_N, first_v, D, BLOCK_N, BLOCK_V, BLOCK_D, PROMOTE_D
    )
    offs_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    target = tl.load(target_ptr + offs_n, mask=mask_n, other=-1)
    lse = tl.load(lse_ptr + offs_n, mask=mask_n, other=0.0)
    grad = tl.load(grad_ptr + offs_n, mask=mask_n, other=0.0)
    target_grad = tl.load(target_grad_ptr + offs_n, mask=mask_n, other=0.0)
    left, right = halves(product, BLOCK_N, BLOCK_V)
    HALF_V: tl.constexpr = BLOCK_V // 2
    for i_half in tl.static_range(2):
        half_v = first_v + i_half * HALF_V
        offs_v = half_v + tl.arange(0, HALF_V)
        mask_v = offs_v < stop_v
        logits = transform_logits(
            left if i_half == 0 else right,
            bias_ptr, offs_v, mask_v, scale, softcap, HAS_BIAS, HAS_SOFTCAP,
        )  # fmt: skip
        dlogits = _dlogits(
            logits, lse, grad, target_grad, target, offs_v, mask_v, softcap, HAS_SOFTCAP
        )
        dlogits_desc.store([i_n * BLOCK_N, half_v - start_v], dlogits.to(OUT))


@triton.jit(do_not_specialize=["N", "start_v", "stop_v"])
def _dlogits_kernel(
    input_desc, weight_desc, dlogits_desc,      # (N, D), (V, D), (N, stop_v - start_v) 16-bit float
    bias_ptr, target_ptr,                       # (V,) float; (N,) int64, < 0 where ignored
    lse_ptr, grad_ptr, target_grad_ptr,         # (N,) float64, float32, float32
    N, start_v, stop_v, scale, softcap,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr, PROMOTE_D: tl.constexpr, PROGRAMS: tl.constexpr, OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """`_dlogits_tile` of all tiles; grid as in `_sweep_kernel`."""
    if PROGRAMS == 0:
        _dlogits_tile(
            tl.program_id(0), input_desc, weight_desc, dlogits_desc, bias_ptr, target_ptr,
            lse_ptr, grad_ptr, target_grad_ptr, N, start_v, stop_v, scale, softcap,
            D, BLOCK_N, BLOCK_V, BLOCK_D, GROUP_N, PROMOTE_D, OUT, HAS_BIAS, HAS_SOFTCAP,
        )  # fmt: skip
    else:
        num_tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(stop_v - start_v, BLOCK_V)
        for i_tile in tl.range(tl.program_id(0), num_tiles, PROGRAMS, flatten=True):
            _dlogits_tile(
                i_tile, input_desc, weight_desc, dlogits_desc, bias_ptr, target_ptr,
                lse_ptr, grad_ptr, target_grad_ptr, N, start_v, stop_v, scale, softcap,
                D, BLOCK_N, BLOCK_V, BLOCK_D, GROUP_N, PROMOTE_D, OUT, HAS_BIAS, HAS_SOFTCAP,
            )  # fmt: skip


@triton.jit(do_not_specialize=["first_n", "R", "start_v", "stop_v"])
def _dlogits_tile_kernel(
    logits_ptr, dlogits_ptr,             # (R, stop_v - start_v) float32 without bias, float
    bias_ptr, target_ptr,                # (V,) float; (N,) int64, < 0 where ignored
    lse_ptr, grad_ptr, target_grad_ptr,  # (N,) float64, float32, float32
    stride_logits, stride_dlogits, first_n, R, start_v, stop_v, scale, softcap,
    BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Logit gradients from GEMM results, from row first_n; grid (row blocks * column blocks,)."""
    i_n, i_v = tile_index(R, stop_v - start_v, BLOCK_N, BLOCK_V, 1)
    rows = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    cols = i_v * BLOCK_V + tl.arange(0, BLOCK_V)
    offs_n = first_n + rows
    offs_v = start_v + cols
    mask_n = rows < R
    mask_v = offs_v < stop_v
    mask = mask_n[:, None] & mask_v[None, :]
    rows_long = rows.to(tl.int64)[:, None]
    target = tl.load(target_ptr + offs_n, mask=mask_n, other=-1)
    lse = tl.load(lse_ptr + offs_n, mask=mask_n, other=0.0)
    grad = tl.load(grad_ptr + offs_n, mask=mask_n, other=0.0)
    target_grad = tl.load(target_grad_ptr + offs_n, mask=mask_n, other=0.0)
    logits = tl.load(logits_ptr + rows_long * stride_logits + cols[None, :], mask=mask, other=0.0)
    logits = transform_logits(
        logits, bias_ptr, offs_v, mask_v, scale, softcap, HAS_BIAS, HAS_SOFTCAP
    )
    dlogits = _dlogits(logits, lse, grad, target_grad, target, offs_v, mask_v, softcap, HAS_SOFTCAP)
    dlogits = dlogits.to(dlogits_ptr.dtype.element_ty)
    tl.store(dlogits_ptr + rows_long * stride_dlogits + cols[None, :], dlogits, mask=mask)
