"""Device functions shared by the Triton kernels: tile indexing, GEMM and logit transforms."""

import triton
import triton.language as tl


@triton.jit
def tile_index(N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, GROUP_N: tl.constexpr):
    """`locate_tile` of this program; grid (row blocks * column blocks,)."""
    return locate_tile(tl.program_id(0), N, V, BLOCK_N, BLOCK_V, GROUP_N)


@triton.jit
def locate_tile(i_tile, N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, GROUP_N: tl.constexpr):
    """Row block and column block of the i-th tile, in grouped order.

    GROUP_N row blocks visit a column block before the next one is started, so that a slice of the
    head and a group of hidden states stay in the L2 cache together.
    """
    num_n = tl.cdiv(N, BLOCK_N)
    num_v = tl.cdiv(V, BLOCK_V)
    i_group = i_tile // (GROUP_N * num_v)
    group_size = tl.minimum(num_n - i_group * GROUP_N, GROUP_N)
    i_inside = i_tile % (GROUP_N * num_v)
    return i_group * GROUP_N + i_inside % group_size, i_inside // group_size


@triton.jit
def product_columns(i_v, BLOCK_V: tl.constexpr):
    """Columns of block i_v of a GEMM result, at most four contiguous ones per thread.

    Without this hint the compiler assigns eight columns to a thread in variants that also store
    16-bit results, which changes the summation order of a row.
    """
    return tl.max_contiguous(i_v * BLOCK_V + tl.arange(0, BLOCK_V), 4)


@triton.jit
def product_tile(
    input_desc, weight_desc,  # (N, D) and (V, D), blocks of (BLOCK_N, BLOCK_D), (BLOCK_V, BLOCK_D)
    start_n, start_v,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
    PROMOTE_D: tl.constexpr,
):  # fmt: skip
    """input @ weightᵀ from row start_n and column start_v on, (BLOCK_N, BLOCK_V) float32.

    Rows and columns past the end are zeros. The matrix units truncate when they accumulate: every
    PROMOTE_D elements of D their sum is added to a float32 total, with rounding; 0: never.
    """
    product = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    total = product
    for start_d in range(0, D, BLOCK_D):
        hidden = input_desc.load([start_n, start_d])
        weight = weight_desc.load([start_v, start_d])
        # float32 operands occur in the interpreter only, which has no tf32
        product = tl.dot(hidden, weight.T, product, input_precision="ieee")
        if PROMOTE_D > 0:
            stop_d = start_d + BLOCK_D
            if stop_d % PROMOTE_D == 0:
                total += product
                product = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    return total + product if PROMOTE_D > 0 else product


@triton.jit
def head_rows(weight_ptr, offs_v, mask_v, offs_d, mask_d, stride_v):
    """Load rows offs_v of a head's weight (V, D): (BLOCK_V, BLOCK_D) float32, 0 where masked."""
    # int64: a head of 256k rows with D = 8,192 has 2^31 elements
    weight = tl.load(
        weight_ptr + offs_v.to(tl.int64)[:, None] * stride_v + offs_d[None, :],
        mask=mask_v[:, None] & mask_d[None, :],
        other=0.0,
    )
    return weight.to(tl.float32)


@triton.jit
def halves(tile, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """Left and right half of a tile's columns.

    Epilogues process a tile part by part: all its logits and their exponentials together do not
    fit in the registers.
    """
    tile = tl.reshape(tile, (BLOCK_N, 2, BLOCK_V // 2))
    return tl.split(tl.permute(tile, (0, 2, 1)))


@triton.jit
def column_parts(tile, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, PARTS: tl.constexpr):
    """Split a tile's columns into PARTS (2 or 4) equal parts, left to right."""
    left, right = halves(tile, BLOCK_N, BLOCK_V)
    if PARTS == 2:
        return left, right
    else:
        a, b = halves(left, BLOCK_N, BLOCK_V // 2)
        c, d = halves(right, BLOCK_N, BLOCK_V // 2)
        return a, b, c, d


@triton.jit
def eighths(tile, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr):
    """Split a tile's columns into eight equal parts, left to right."""
    left, right = halves(tile, BLOCK_N, BLOCK_V)
    ab, cd = halves(left, BLOCK_N, BLOCK_V // 2)
    ef, gh = halves(right, BLOCK_N, BLOCK_V // 2)
    a, b = halves(ab, BLOCK_N, BLOCK_V // 4)
    c, d = halves(cd, BLOCK_N, BLOCK_V // 4)
    e, f = halves(ef, BLOCK_N, BLOCK_V // 4)
    g, h = halves(gh, BLOCK_N, BLOCK_V // 4)
    return a, b, c, d, e, f, g, h


@triton.jit
def cap_logits(logits, scale, softcap, HAS_SOFTCAP: tl.constexpr):
    """z = cap · tanh(scale · logits / cap)."""
    logits *= scale
    if HAS_SOFTCAP:
        # 1 - 2 / (1 + e^2x) has an absolute error of 1e-7, too large near 0: Taylor series there
        over_cap = logits / softcap
        squared = over_cap * over_cap
        series = squared * (squared * (squared * (-17.0 / 315) + 2.0 / 15) - 1.0 / 3)
        near_zero = over_cap + over_cap * series
        tanh = 1 - 2 / (1 + tl.exp(2 * over_cap))
        logits = softcap * tl.where(squared < 0.04, near_zero, tanh)
    return logits


@triton.jit
def transform_logits(
    logits, bias_ptr, offs_v, mask_v, scale, softcap,  # bias (V,) float
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """Add the columns' bias to a tile and apply `cap_logits`."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
        logits += bias[None, :]
    return cap_logits(logits, scale, softcap, HAS_SOFTCAP)


@triton.jit
def transform_both(
    logits, reference_logits, bias_ptr, reference_bias_ptr, offs_v, mask_v, scale, softcap,
    HAS_BIAS: tl.constexpr, HAS_REFERENCE_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """`transform_logits` of policy and reference, for the same rows and columns."""
    return (
        transform_logits(logits, bias_ptr, offs_v, mask_v, scale, softcap, HAS_BIAS, HAS_SOFTCAP),
        transform_logits(
            reference_logits, reference_bias_ptr,
            offs_v, mask_v, scale, softcap, HAS_REFERENCE_BIAS, HAS_SOFTCAP,
        ),
    )  # fmt: skip


@triton.jit
def log_softmax(logits, lse):
    """Logits minus their rows' float64 log-sum-exp, as in `row_sums.log_softmax_`."""
    high = lse.to(tl.float32)
    low = (lse - high.to(tl.float64)).to(tl.float32)
    return logits - high[:, None] - low[:, None]


@triton.jit
def softcap_slope(logits, softcap):
    """Derivative of the softcap, 1 - (z / cap)²."""
    capped = logits / softcap
    return 1 - capped * capped
