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
    slices: "SliceTile | None" = None
    """Of a joint sweep, where it goes over one model after the other; None: both at once."""


class SliceTile(NamedTuple):
    """A part of the logits that is swept by the reference and then by the policy."""

    gemm: GemmTile
    """Blocks of both."""
    rows: int
    columns: int
    """Whole blocks; the reference's products of this many stay in memory, in float32."""
    parts: int = 8
    """Of a tile's columns that are summed up one after another, 4 or 8."""
    ahead: bool = False
    """Whether the reference's products of a part are fetched while the part before is summed up."""


class RowTile(NamedTuple):
    """Blocks of a pass over products that a library's GEMM has written."""

    block_n: int
    block_v: int
    num_warps: int


FUSED_TILES = {
    "sm_90": GemmTile(128, 256, 64, group_n=16, num_warps=8, num_stages=4),
    "sm_100": GemmTile(128, 256, 64, group_n=16, num_warps=8, num_stages=4),
}
"""Where the GEMM is Triton's own: it needs the copy engine that fills shared memory from tensor
descriptors. Elsewhere the library's GEMM writes tiles of products."""

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
