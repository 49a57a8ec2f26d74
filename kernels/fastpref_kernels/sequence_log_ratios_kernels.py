"""Triton kernels of `sequence_log_ratios`."""

import triton
import triton.language as tl


@triton.jit(do_not_specialize=["N"])
def _sum_kernel(
    logps_ptr, reference_logps_ptr, weights_ptr,  # (N,) float, the last one or None
    ids_ptr, sums_ptr,                            # (N,) int; (S,) float32
    stride_logps, stride_reference, stride_weights, stride_ids, N,
    NUM_BLOCKS: tl.constexpr, BLOCK_N: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Σ w · (log p - log q) of one sequence; one program per sequence, grid (S,).

    Each program reads all tokens, so that tokens may come in any order without a sort: 64
    sequences of 256 tokens read 8 MiB from the cache.
    """
    i_s = tl.program_id(0)
    total = tl.zeros((BLOCK_N,), dtype=tl.float64)
    for i_block in range(NUM_BLOCKS):
        # int64: offsets into a strided view may exceed 2^31 elements
        offs_n = i_block * BLOCK_N + tl.arange(0, BLOCK_N).to(tl.int64)
        mask_n = offs_n < N
        mine = tl.load(ids_ptr + offs_n * stride_ids, mask=mask_n, other=-1) == i_s
        logps = tl.load(logps_ptr + offs_n * stride_logps, mask=mine, other=0.0)
        reference = tl.load(reference_logps_ptr + offs_n * stride_reference, mask=mine, other=0.0)
        log_ratios = logps.to(tl.float64) - reference.to(tl.float64)
        if HAS_WEIGHTS:
            weights = tl.load(weights_ptr + offs_n * stride_weights, mask=mine, other=0.0)
            log_ratios *= weights.to(tl.float64)
        total += log_ratios
    tl.store(sums_ptr + i_s, tl.sum(total, 0).to(tl.float32))


@triton.jit(do_not_specialize=["N", "S"])
def _spread_kernel(
    grad_ptr, weights_ptr, ids_ptr, grad_logps_ptr,  # (S,) float32; (N,) float or None; int; float
    stride_grad, stride_weights, stride_ids, N, S,
    BLOCK_N: tl.constexpr, HAS_WEIGHTS: tl.constexpr,
):  # fmt: skip
    """Gradient of each token: its weight times its sequence's gradient; grid (token blocks,)."""
    offs_n = tl.program_id(0).to(tl.int64) * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    ids = tl.load(ids_ptr + offs_n * stride_ids, mask=mask_n, other=-1).to(tl.int64)
    grad = tl.load(grad_ptr + ids * stride_grad, mask=(ids >= 0) & (ids < S), other=0.0)
    if HAS_WEIGHTS:
        weights = tl.load(weights_ptr + offs_n * stride_weights, mask=mask_n, other=0.0)
        grad *= weights.to(tl.float32)
    tl.store(grad_logps_ptr + offs_n, grad.to(grad_logps_ptr.dtype.element_ty), mask=mask_n)
