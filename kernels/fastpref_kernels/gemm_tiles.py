"""Which shapes the kernels run in on which device: one table, chosen by hand, never from data."""

import functools
from typing import NamedTuple

import torch


class GemmTile(NamedTuple):
    """Blocks of a GEMM fused with what follows it."""

    block_n: int
    block_v: int
    block_d: int
    group_n: int
    """Row blocks that go over the same columns together."""
    num_warps: int
    num_stages: int
    programs: int = 0
    """Programs a multiprocessor that go over the tiles one after another; 0: a program a tile."""
    promote_d: int = 0
    """Of D, summed by the matrix units before they are added up with rounding; 0: all of D."""


class RowTile(NamedTuple):
    """Blocks of a pass over products that a library's GEMM has written."""

    block_n: int
    block_v: int
    num_warps: int


FUSED_TILES = {
    "sm_90": GemmTile(128, 256, 64, group_n=16, num_warps=8, num_stages=4, programs=1),
    "sm_100": GemmTile(128, 256, 64, group_n=16, num_warps=8, num_stages=4),
}
"""Where the GEMM is Triton's own: it needs the copy engine that fills shared memory from tensor
descriptors. Elsewhere the library's GEMM writes tiles of products.

On an H100 the looping form is 1 to 2 % faster at D = 4,096 and 10 % at D = 896, to the same bits;
promotion every 1,024 of D takes log p from 7.6e-5 off at worst to 2.0e-5 for 13 % of the time."""

JOINT_TILES = {
    "sm_90": GemmTile(128, 128, 64, group_n=16, num_warps=8, num_stages=4),
    "sm_100": GemmTile(128, 128, 64, group_n=16, num_warps=8, num_stages=4),
}
"""The same where two models' logits of a tile are in the registers together."""

ROW_TILE = RowTile(block_n=8, block_v=1024, num_warps=8)

JOINT_ROW_TILE = RowTile(block_n=4, block_v=1024, num_warps=8)
"""The same over two models' products."""

PRODUCT_TILE = (1024, 8192)
"""Rows, columns of a GEMM of the library: 32 MiB of float32, which stay in the L2 cache until they
are read again (an H100's holds 50 MiB, an A100's 40)."""

_ARCHITECTURES = {(9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}


def fused_tile(device: torch.device, *, joint: bool = False) -> GemmTile | None:
    """Blocks of the fused kernels on a device; None where the library's GEMM is used.

    None on a CPU, where kernels are interpreted: NumPy's GEMM stands in for the GPU's there, and a
    row's bits depend on its place in the block.

    Args:
        device: Where the kernels run.
        joint: Of the kernels that work on two models at once.
    """
    if device.type == "cpu":
        return None
    return (JOINT_TILES if joint else FUSED_TILES).get(_architecture(device))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Of a device; of the interpreter two, so that a program has several tiles to go over."""
    if device.type == "cpu":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _architecture(device: torch.device) -> str:
    if torch.version.hip is not None:
        return "amd"
    return _ARCHITECTURES.get(torch.cuda.get_device_capability(device), "other")
