"""Shared by the launchers of the LM head's kernels: operands, tiles, grids and descriptors."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from fastpref_kernels import token_logps_kernels as kernels
from fastpref_kernels.gemm import matmul_into
from fastpref_kernels.gemm_tiles import (
    PRODUCT_TILE,
    ROW_TILE,
    GemmTile,
    RowTile,
    fused_tile,
    multiprocessors,
)
from fastpref_kernels.head import Head, Targets
from fastpref_kernels.workspace import ROW_MULTIPLE, limit, slices

TRITON_DTYPES = {
    torch.bfloat16: tl.bfloat16,
    torch.float16: tl.float16,
    torch.float32: tl.float32,
}

COMPILE = {"enable_fp_fusion": False}
"""Options of every launch: no fused multiply-add outside of matrix instructions.

Whether the compiler fuses depends on the surrounding code. With fusion `a·s - b·s` may differ from
0 for a = b, giving identical models a KL and a gradient, and a kernel variant that stores extra
results would sum to other bits.
"""

_GRADIENT_TILE = (16384, 32768)
_GRADIENT_BYTES = 128 * 2**20
"""Maximum size of a slice of logit gradients; reduces its columns to 4,096 at 16k rows."""


class Operands(NamedTuple):
    """Tensors of one model in the form that the kernels take."""

    head: Head
    """Contiguous tensors; input and weight in the GEMM dtype."""
    ids: Tensor
    """(N,) int64 targets, `IGNORED` for ignored rows."""
    exp_dtype: torch.dtype
    """Dtype of stored exponentials."""
    tile: GemmTile | None
    """Blocks of the fused kernels; None where cuBLAS or another library runs the GEMM."""

    @classmethod
    def of(cls, head: Head, targets: Targets, *, joint: bool = False) -> "Operands":
        dtype = head.gemm_dtype
        plain = head._replace(
            input=head.input.to(dtype).contiguous(),
            weight=head.weight.to(dtype).contiguous(),
            bias=None if head.bias is None else head.bias.contiguous(),
        )
        ids_N = targets.ids.masked_fill(targets.ignored, kernels.IGNORED.value)
        return cls(plain, ids_N, head.exp_dtype, _fused_tile(plain, joint=joint))

    def of_rows(self, rows: slice) -> "Operands":
        """The operands of a slice of rows."""
        head = self.head._replace(input=self.head.input[rows])
        return self._replace(head=head, ids=self.ids[rows])

    @property
    def transform(self) -> dict[str, Any]:
        """Kernel arguments for bias, scale and softcap."""
        head = self.head
        return {
            "bias_ptr": head.bias,
            "scale": head.scale,
            "softcap": head.softcap or 1.0,
            "HAS_BIAS": head.bias is not None,
            "HAS_SOFTCAP": head.softcap is not None,
        }

    def target_logits(self, rows: slice, *, out: Tensor | None = None) -> Tensor:
        """Logits of the targets, (R,) float32, 0 for ignored rows."""
        input_RD, weight_VD = self.head.input[rows], self.head.weight
        R, D = input_RD.shape
        logits_R = input_RD.new_empty(R, dtype=torch.float32) if out is None else out
        kernels._target_logits_kernel[(R,)](
            input_RD,
            weight_VD,
            target_ptr=self.ids[rows],
            logits_ptr=logits_R,
            stride_n=input_RD.stride(0),
            stride_v=weight_VD.stride(0),
            V=weight_VD.shape[0],
            D=D,
            BLOCK_D=min(1024, triton.next_power_of_2(D)),
            **self.transform,
            **COMPILE,
        )
        return logits_R


def combine(
    max_BR: Tensor,
    sum_BR: Tensor,
    extra_BR: Tensor | None = None,
    *,
    over_max: bool = False,
    out: Tensor | None = None,
) -> Tensor:
    """Reduce per-block statistics over all column blocks: max, Σ exp(z - max), extra sum; (3, R).

    Args:
        max_BR, sum_BR, extra_BR: Statistics of each column block and row, (B, R) float32. Without
            `extra_BR` the third result is uninitialised.
        over_max: The extra sum is relative to exp(max) as well, and is rescaled with it.
        out: Receives the result, (3, R) with contiguous rows.
    """
    num_blocks, R = max_BR.shape
    sums_3R = max_BR.new_empty(3, aligned_columns(R))[:, :R] if out is None else out
    kernels._combine_kernel[(triton.cdiv(R, 32),)](
        max_BR,
        sum_BR,
        extra_BR,
        *sums_3R,
        N=R,
        NUM_BLOCKS=num_blocks,
        BLOCK_N=32,
        BLOCK_B=64,
        EXTRA=extra_BR is not None,
        OVER_MAX=over_max,
        **COMPILE,
    )
    return sums_3R


def _fused_tile(head: Head, *, joint: bool) -> GemmTile | None:
    """Blocks of the fused kernels; None if device, dtype or memory layout do not allow them.

    TMA requires rows aligned to 16 bytes; float32 GEMMs are left to the library.
    """
    input_ND, weight_VD = head.input, head.weight
    if input_ND.is_cuda and input_ND.dtype == torch.float32:
        return None
    aligned = (
        input_ND.shape[1] * input_ND.itemsize % 16 == 0
        and input_ND.data_ptr() % 16 == 0
        and weight_VD.data_ptr() % 16 == 0
    )
    return fused_tile(input_ND.device, joint=joint) if aligned else None


def aligned_columns(V: int) -> int:
    """V rounded up to a multiple of 64: rows aligned to 128 bytes in 16 bits, 256 in float32."""
    return -(-V // 64) * 64


def gradient_tile(operands: Operands, gradient: torch.dtype) -> tuple[int, int]:
    """Rows and columns of a slice of logit gradients, at most half of the workspace; the other half
    is for the GEMM results that the slice is computed from.

    Args:
        operands: Those that the logits are computed from.
        gradient: Dtype of the gradients.
    """
    rows, cols = _GRADIENT_TILE
    budget = min(_GRADIENT_BYTES, limit() / 2)
    block_v = (operands.tile or ROW_TILE).block_v
    itemsize = gradient.itemsize
    N = max(1, len(operands.ids))
    while rows > 32 and min(rows, N) * block_v * itemsize > budget:
        rows //= 2
    cols = min(cols, int(budget / (min(rows, N) * itemsize)))
    return rows, max(1, cols // block_v) * block_v


def product_tile() -> tuple[int, int]:
    """Rows and columns of one library GEMM, reduced to fit half of the workspace."""
    rows, cols = PRODUCT_TILE
    numbers = limit() / 2 / 4
    while rows > ROW_MULTIPLE and rows * ROW_TILE.block_v > numbers:
        rows //= 2
    return rows, max(1, min(cols, int(numbers / rows)) // ROW_TILE.block_v) * ROW_TILE.block_v


def product_tiles(R: int, C: int) -> Iterator[tuple[slice, slice]]:
    """Row and column slices of the library GEMMs that cover (R, C); columns are the outer loop."""
    tile_rows, tile_cols = product_tile()
    for cols in slices(C, tile_cols):
        for rows in slices(R, tile_rows):
            yield rows, cols


def whole_tile(input_RD: Tensor, rows: slice) -> Tensor:
    """Hidden states of `rows`, zero-padded to the fixed number of rows of every library GEMM.

    The library picks the summation order by the shape of the GEMM, and a row must have the same
    bits in every batch. On a CPU a multiple of 32 rows in freshly allocated memory is enough.
    """
    on_cpu = input_RD.device.type == "cpu"
    R, D = rows.stop - rows.start, input_RD.shape[1]
    height = triton.cdiv(R, ROW_MULTIPLE) * ROW_MULTIPLE if on_cpu else product_tile()[0]
    if height == R and not on_cpu:
        return input_RD[rows]
    whole_RD = input_RD.new_zeros(height, D)
    whole_RD[:R] = input_RD[rows]
    return whole_RD


def products_of(input_RD: Tensor, weight_CD: Tensor, rows: slice) -> Tensor:
    """h·Wᵀ of one of the `product_tiles`, (rows of `whole_tile`, C) float32, for a sweep kernel.

    Rows are aligned to 256 bytes. Unaligned rows (an odd vocabulary) would change how many columns
    a thread takes, differently in kernel variants with and without stored results.
    """
    whole_RD = whole_tile(input_RD, rows)
    C = len(weight_CD)
    products_RC = whole_RD.new_empty(len(whole_RD), aligned_columns(C), dtype=torch.float32)[:, :C]
    matmul_into(products_RC, whole_RD, weight_CD.t())
    return products_RC


def descriptors(
    tile: GemmTile, input_RD: Tensor, weight_VD: Tensor
) -> tuple[TensorDescriptor, TensorDescriptor]:
    """Tensor descriptors of a fused kernel's operands.

    Created on the host: device-side descriptors need an allocator that autograd threads lack.
    """
    # not input_RD.stride(): a single row counts as contiguous with any row stride
    strides = [input_RD.shape[1], 1]
    return (
        TensorDescriptor(input_RD, [*input_RD.shape], strides, [tile.block_n, tile.block_d]),
        TensorDescriptor(weight_VD, [*weight_VD.shape], strides, [tile.block_v, tile.block_d]),
    )


def result_descriptor(
    tile: GemmTile, result_RC: Tensor | None, *, parts: int = 2
) -> TensorDescriptor | None:
    """Tensor descriptor of a fused kernel's result, stored in `parts` column parts per tile."""
    if result_RC is None:
        return None
    return TensorDescriptor.from_tensor(result_RC, [tile.block_n, tile.block_v // parts])


def fused_grid(tile: GemmTile, R: int, C: int, device: torch.device) -> tuple[int]:
    num_tiles = triton.cdiv(R, tile.block_n) * triton.cdiv(C, tile.block_v)
    return (min(num_tiles, _programs(tile, device) or num_tiles),)


def fused_blocks(tile: GemmTile) -> dict[str, int | bool]:
    """Launch arguments of a fused kernel with one program per tile."""
    assert not tile.programs, "this kernel has no persistent form"
    return _blocks(tile)


def looping_blocks(tile: GemmTile, device: torch.device) -> dict[str, int | bool]:
    """Launch arguments of a fused kernel that may be persistent: several tiles per program."""
    return _blocks(tile) | {"PROGRAMS": _programs(tile, device)}


def _blocks(tile: GemmTile) -> dict[str, int | bool]:
    return {
        "BLOCK_N": tile.block_n,
        "BLOCK_V": tile.block_v,
        "BLOCK_D": tile.block_d,
        "GROUP_N": tile.group_n,
        "PROMOTE_D": tile.promote_d,
        "num_warps": tile.num_warps,
        "num_stages": tile.num_stages,
        **COMPILE,
    }


def _programs(tile: GemmTile, device: torch.device) -> int:
    return tile.programs * multiprocessors(device) if tile.programs else 0


def row_grid(R: int, C: int, tile: RowTile = ROW_TILE) -> tuple[int]:
    """Grid of a kernel that reads GEMM results."""
    return (triton.cdiv(R, tile.block_n) * triton.cdiv(C, tile.block_v),)


def row_blocks(tile: RowTile = ROW_TILE) -> dict[str, int | bool]:
    """Launch arguments of a kernel that reads GEMM results."""
    blocks = {"BLOCK_N": tile.block_n, "BLOCK_V": tile.block_v, "num_warps": tile.num_warps}
    return blocks | COMPILE
