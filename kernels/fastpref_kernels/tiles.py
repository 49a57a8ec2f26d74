"""What the Triton kernels share: where a tile of logits lies, how it is made, what it becomes."""

import triton
import triton.language as tl

LOWEST = tl.constexpr(-3.4028234663852886e38)
"""Lowest float32. A row's maximum is never below it, so -inf - max is -inf and never a NaN."""

MAX_DRIFT = tl.constexpr(80.0)
"""Largest logit above the anchor, in nats, that `stored` holds: e^80 times 2^18 columns is finite
in float32, and so is e^80 in bfloat16."""


@triton.jit
def tile_index(N, V, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, GROUP_N: tl.constexpr):
    """Row block and column block of this program; grid (row blocks * column blocks,).

    GROUP_N row blocks meet the same columns one after another, so that a slice of the head and a
    group of hidden states stay in the L2 cache together.
    """
    i_tile = tl.program_id(0)
    num_n = tl.cdiv(N, BLOCK_N)
    num_v = tl.cdiv(V, BLOCK_V)
    i_group = i_tile // (GROUP_N * num_v)
    group_size = tl.minimum(num_n - i_group * GROUP_N, GROUP_N)
    i_inside = i_tile % (GROUP_N * num_v)
    return i_group * GROUP_N + i_inside % group_size, i_inside // group_size


@triton.jit
def product_tile(
    input_desc, weight_desc,  # (N, D) and (V, D), blocks of (BLOCK_N, BLOCK_D), (BLOCK_V, BLOCK_D)
    start_n, start_v,
    D: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """input @ weightᵀ from row start_n and column start_v on, (BLOCK_N, BLOCK_V) float32.

    Rows and columns past the end are zeros.
    """
    product = tl.zeros((BLOCK_N, BLOCK_V), dtype=tl.float32)
    for start_d in range(0, D, BLOCK_D):
        hidden = input_desc.load([start_n, start_d])
        weight = weight_desc.load([start_v, start_d])
        # ieee: only the interpreter multiplies float32 here, and there tf32 means nothing
        product = tl.dot(hidden, weight.T, product, input_precision="ieee")
    return product


@triton.jit
def transform_logits(
    logits, bias_ptr, offs_v, mask_v, scale, softcap,  # bias (V,) float
    HAS_BIAS: tl.constexpr, HAS_SOFTCAP: tl.constexpr,
):  # fmt: skip
    """z = cap · tanh(scale · (logits + bias) / cap)."""
    if HAS_BIAS:
        bias = tl.load(bias_ptr + offs_v, mask=mask_v, other=0.0).to(tl.float32)
        logits += bias[None, :]
    logits *= scale
    if HAS_SOFTCAP:
        # tanh(x) = 1 - 2 / (1 + e^2x): exact at both ends, within cap · 1e-7 between
        logits = softcap - 2 * softcap / (1 + tl.exp(logits * (2 / softcap)))
    return logits


@triton.jit
def softcap_slope(logits, softcap):
    """Derivative of the softcap, 1 - (z / cap)²."""
    capped = logits / softcap
    return 1 - capped * capped


@triton.jit
def fold_columns(logits, keep):
    """Largest logit of each row over the columns kept, and exp(logits - it), 0 elsewhere."""
    kept = tl.where(keep, logits, float("-inf"))
    row_max = tl.maximum(tl.max(kept, 1), LOWEST)
    return row_max, tl.exp(kept - row_max[:, None])


@triton.jit
def anchored(exp_logits, row_max, anchor):
    """exp(z - anchor) from exp(z - row_max), held at e^MAX_DRIFT."""
    drift = tl.minimum(row_max - anchor, MAX_DRIFT)
    return exp_logits * tl.exp(drift)[:, None]
