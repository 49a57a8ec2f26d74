"""Block shapes of the kernels by GPU architecture: a fixed table, no autotuning."""

import functools
from typing import NamedTuple

import torch


class GemmTile(NamedTuple):
    """Block shape of a GEMM kernel with a fused epilogue."""

    block_n: int
    block_v: int
    block_d: int
    group_n: int
    """Row blocks that share a column block before the next one, for L2 reuse."""
    num_warps: int
    num_stages: int
    programs: int = 0
    """Persistent programs per multiprocessor, each looping over tiles; 0: one program per tile."""
    promote_d: int = 0
    """Elements of D accumulated by the matrix units before a rounded float32 add; 0: all of D."""


class RowTile(NamedTuple):
    """Block shape of a kernel that reads the result of a library GEMM."""

    block_n: int
    block_v: int
    num_warps: int


FUSED_TILES = {
    "sm_90": GemmTile(128, 256, 64, group_n=16, num_warps=8, num_stages=4, programs=1),
    "sm_100": GemmTile(128, 256, 64, group_n=16, num_warps=8, num_stages=4),
}
"""Architectures on which Triton runs the GEMM itself, which needs TMA (tensor descriptors).
Elsewhere a library GEMM writes tiles of h·Wᵀ.

On an H100 the persistent form is 1 to 2 % faster at D = 4,096 and 10 % at D = 896, with the same
bits; promotion every 1,024 of D would reduce the worst error of log p from 7.6e-5 to 2.0e-5 at 13 %
more time."""

JOINT_TILES = {
    "sm_90": GemmTile(128, 128, 64, group_n=16, num_warps=8, num_stages=4),
    "sm_100": GemmTile(128, 128, 64, group_n=16, num_warps=8, num_stages=4),
}
"""The same for kernels that hold the logits of two models in registers."""

ROW_TILE = RowTile(block_n=8, block_v=1024, num_warps=8)

JOINT_ROW_TILE = RowTile(block_n=4, block_v=1024, num_warps=8)
"""The same for kernels that read the GEMM results of two models."""

PRODUCT_TILE = (1024, 8192)
"""Rows, columns of a library GEMM: 32 MiB of float32, which stay in the L2 cache until the next
kernel reads them (50 MiB on an H100, 40 on an A100)."""

_ARCHITECTURES = {(9, 0): "sm_90", (10, 0): "sm_100", (10, 3): "sm_100"}


def fused_tile(device: torch.device, *, joint: bool = False) -> GemmTile | None:
    """Block shape of the fused kernels on a device; None where a library GEMM is used.

    None on a CPU, where kernels are interpreted: NumPy's GEMM replaces the GPU's there, and a row's
    bits would depend on its place in the block.

    Args:
        device: Device that the kernels run on.
        joint: For the kernels that process two models at once.
    """
    if device.type == "cpu":
        return None
    return (JOINT_TILES if joint else FUSED_TILES).get(_architecture(device))


@functools.cache
def multiprocessors(device: torch.device) -> int:
    """Number of multiprocessors; 2 on a CPU, so that interpreted programs loop over tiles."""
    if device.type == "cpu":
        return 2
    return torch.cuda.get_device_properties(device).multi_processor_count


@functools.cache
def _architecture(device: torch.device) -> str:
    if torch.version.hip is not None:
        return "amd"
    return _ARCHITECTURES.get(torch.cuda.get_device_capability(device), "other")
