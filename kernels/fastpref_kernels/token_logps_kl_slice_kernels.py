"""Triton kernels of `token_logps_and_kl`: the reference over a slice of columns, then the policy.

Two accumulators halve the tile that fits in the registers, and a smaller tile reads more for each
product. Here the reference's products of a slice are written down in float32, by a GEMM with the
tile of one model, and the policy's GEMM over the same slice reads them where its own tile is ready.
Nothing is rounded in between, and both models' logits go through the same instructions: equal
models differ by exactly nothing.
"""

import triton
import triton.language as tl

from fastpref_kernels.tiles import column_parts, locate_tile, product_tile
from fastpref_kernels.token_logps_kernels import LOWEST
from fastpref_kernels.token_logps_kl_kernels import _add_part, _store_joint_sums


@triton.jit
def _products_tile(
    i_tile, input_desc, weight_desc, products_desc, N, start_v, stop_v,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr, PROMOTE_D: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """input @ weightᵀ of the i-th tile."""
    i_n, i_v = locate_tile(i_tile, N, stop_v - start_v, BLOCK_N, BLOCK_V, GROUP_N)
    start_n = i_n * BLOCK_N
    product = product_tile(
        input_desc, weight_desc, start_n, start_v + i_v * BLOCK_V,
        D, BLOCK_N, BLOCK_V, BLOCK_D, PROMOTE_D,
    )  # fmt: skip
    parts = column_parts(product, BLOCK_N, BLOCK_V, PARTS)
    for i_part in tl.static_range(PARTS):
        products_desc.store([start_n, i_v * BLOCK_V + i_part * (BLOCK_V // PARTS)], parts[i_part])


@triton.jit(do_not_specialize=["N", "start_v", "stop_v"])
def _products_kernel(
    input_desc, weight_desc, products_desc,  # (N, D), (V, D) 16-bit float; whole tiles, float32
    N, start_v, stop_v,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr, PROMOTE_D: tl.constexpr, PROGRAMS: tl.constexpr, PARTS: tl.constexpr,
):  # fmt: skip
    """`_products_tile` of all tiles, by the programs of a sweep."""
    if PROGRAMS == 0:
        _products_tile(
            tl.program_id(0), input_desc, weight_desc, products_desc, N, start_v, stop_v,
            D, BLOCK_N, BLOCK_V, BLOCK_D, GROUP_N, PROMOTE_D, PARTS,
        )  # fmt: skip
    else:
        num_tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(stop_v - start_v, BLOCK_V)
        for i_tile in tl.range(tl.program_id(0), num_tiles, PROGRAMS, flatten=True):
            _products_tile(
                i_tile, input_desc, weight_desc, products_desc, N, start_v, stop_v,
                D, BLOCK_N, BLOCK_V, BLOCK_D, GROUP_N, PROMOTE_D, PARTS,
            )  # fmt: skip


@triton.jit
def _joint_slice_tile(
    i_tile, i_summed, input_desc, weight_desc, larger_desc, log_ratio_desc,
    products_desc, products_ptr, bias_ptr, reference_bias_ptr,
    target_ptr, anchor_ptr, reference_anchor_ptr,
    max_ptr, sum_ptr, reference_max_ptr, reference_sum_ptr, gap_ptr,
    stride_products, N, start_v, stop_v, scale, softcap,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr, PROMOTE_D: tl.constexpr, PARTS: tl.constexpr, AHEAD: tl.constexpr,
    EXP: tl.constexpr, RATIO: tl.constexpr, UNDER_REFERENCE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_REFERENCE_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Row sums of both models over the i-th tile; `i_summed` is i once more.

    AHEAD: the reference's products of a part are fetched while the part before it is summed up.
    """
    i_n, i_v = locate_tile(i_tile, N, stop_v - start_v, BLOCK_N, BLOCK_V, GROUP_N)
    product = product_tile(
        input_desc, weight_desc, i_n * BLOCK_N, start_v + i_v * BLOCK_V,
        D, BLOCK_N, BLOCK_V, BLOCK_D, PROMOTE_D,
    )  # fmt: skip
    # located anew: in a loop both numbers would take registers through the GEMM
    i_n, i_v = locate_tile(i_summed, N, stop_v - start_v, BLOCK_N, BLOCK_V, GROUP_N)
    first_v = start_v + i_v * BLOCK_V
    offs_n = i_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask_n = offs_n < N
    target = tl.load(target_ptr + offs_n, mask=mask_n, other=-1)
    anchor = tl.load(anchor_ptr + offs_n, mask=mask_n, other=0.0)
    reference_anchor = tl.load(reference_anchor_ptr + offs_n, mask=mask_n, other=0.0)
    row_max = tl.full((BLOCK_N,), LOWEST, dtype=tl.float32)
    row_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    reference_max = row_max
    reference_sum = row_sum
    gap = row_sum
    parts = column_parts(product, BLOCK_N, BLOCK_V, PARTS)
    PART_V: tl.constexpr = BLOCK_V // PARTS
    if AHEAD:
        # no mask: there are products of whole tiles
        offs_products = offs_n.to(tl.int64)[:, None] * stride_products + i_v * BLOCK_V
        part_ptrs = products_ptr + offs_products + tl.arange(0, PART_V)[None, :]
        following = tl.load(part_ptrs)
    for i_part in tl.static_range(PARTS):
        if AHEAD:
            reference_product = following
            if i_part < PARTS - 1:
                # on its way while this part is summed up
                following = tl.load(part_ptrs + (i_part + 1) * PART_V)
        else:
            reference_product = products_desc.load([i_n * BLOCK_N, i_v * BLOCK_V + i_part * PART_V])
        row_max, row_sum, reference_max, reference_sum, gap = _add_part(
            row_max, row_sum, reference_max, reference_sum, gap,
            parts[i_part], reference_product, larger_desc, log_ratio_desc,
            bias_ptr, reference_bias_ptr, target, anchor, reference_anchor,
            i_n * BLOCK_N, first_v + i_part * PART_V, start_v, stop_v, scale, softcap,
            PART_V, EXP, RATIO, UNDER_REFERENCE, True, HAS_BIAS, HAS_REFERENCE_BIAS, HAS_SOFTCAP,
        )  # fmt: skip
    _store_joint_sums(
        max_ptr, sum_ptr, reference_max_ptr, reference_sum_ptr, gap_ptr,
        row_max, row_sum, reference_max, reference_sum, gap, first_v // BLOCK_V, offs_n, mask_n, N,
    )  # fmt: skip


@triton.jit(do_not_specialize=["N", "start_v", "stop_v"])
def _joint_slice_kernel(
    input_desc, weight_desc,                        # (N, D), (V, D) 16-bit float
    larger_desc, log_ratio_desc,                    # (N, stop_v - start_v) EXP and RATIO, or None
    products_desc, products_ptr,                           # the reference's, whole tiles, float32
    bias_ptr, reference_bias_ptr, target_ptr,       # (V,) float, twice; (N,) int64, -1 ignored
    anchor_ptr, reference_anchor_ptr,               # (N,) float32
    max_ptr, sum_ptr, reference_max_ptr, reference_sum_ptr, gap_ptr,  # (blocks of V, N) float32
    stride_products, N, start_v, stop_v, scale, softcap,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr, PROMOTE_D: tl.constexpr, PROGRAMS: tl.constexpr,
    PARTS: tl.constexpr, AHEAD: tl.constexpr,
    EXP: tl.constexpr, RATIO: tl.constexpr, UNDER_REFERENCE: tl.constexpr,
    HAS_BIAS: tl.constexpr, HAS_REFERENCE_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """`_joint_slice_tile` of all tiles, by the programs of a sweep."""
    i_program = tl.program_id(0)
    if PROGRAMS == 0:
        _joint_slice_tile(
            i_program, i_program, input_desc, weight_desc, larger_desc, log_ratio_desc,
            products_desc, products_ptr, bias_ptr, reference_bias_ptr, target_ptr, anchor_ptr,
            reference_anchor_ptr, max_ptr, sum_ptr, reference_max_ptr, reference_sum_ptr, gap_ptr,
            stride_products, N, start_v, stop_v, scale, softcap,
            D, BLOCK_N, BLOCK_V, BLOCK_D, GROUP_N, PROMOTE_D, PARTS, AHEAD,
            EXP, RATIO, UNDER_REFERENCE, HAS_BIAS, HAS_REFERENCE_BIAS, HAS_SOFTCAP,
        )  # fmt: skip
    else:
        num_tiles = tl.cdiv(N, BLOCK_N) * tl.cdiv(stop_v - start_v, BLOCK_V)
        i_summed = i_program - PROGRAMS
        for i_tile in tl.range(i_program, num_tiles, PROGRAMS, flatten=True):
            i_summed += PROGRAMS
            _joint_slice_tile(
                i_tile, i_summed, input_desc, weight_desc, larger_desc, log_ratio_desc,
                products_desc, products_ptr, bias_ptr, reference_bias_ptr, target_ptr, anchor_ptr,
                reference_anchor_ptr, max_ptr, sum_ptr, reference_max_ptr, reference_sum_ptr,
                gap_ptr, stride_products, N, start_v, stop_v, scale, softcap,
                D, BLOCK_N, BLOCK_V, BLOCK_D, GROUP_N, PROMOTE_D, PARTS, AHEAD,
                EXP, RATIO, UNDER_REFERENCE, HAS_BIAS, HAS_REFERENCE_BIAS, HAS_SOFTCAP,
            )  # fmt: skip
