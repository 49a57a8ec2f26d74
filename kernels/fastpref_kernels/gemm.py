"""Matrix products that sum in float32, on GPUs and on a CPU's matrix units."""

import functools
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


@contextmanager
def matrix_units(enabled: bool) -> Iterator[None]:
    """Float32 GEMMs of a CPU on its bfloat16 units: operands are rounded, sums are not."""
    mkldnn: Any = torch.backends.mkldnn
    settings = mkldnn.matmul
    before = settings.fp32_precision
    settings.fp32_precision = "bf16" if enabled else before
    try:
        yield
    finally:
        settings.fp32_precision = before


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has units for bfloat16: AMX, or the instructions of AVX-512."""
    return torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported()


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, float32, for operands of one dtype."""
    if a.is_cuda and a.dtype != torch.float32:
        return torch.mm(a, b, out_dtype=torch.float32)
    return a.float() @ b.float()


def add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in float32, for operands of one dtype."""
    if a.is_cuda and a.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())


def matmul_into(out: Tensor, a: Tensor, b: Tensor) -> None:
    """out = a @ b, summed in float32 and rounded once to out's dtype."""
    if a.is_cuda and a.dtype != torch.float32 and out.dtype == a.dtype:
        torch.mm(a, b, out=out)
    elif a.is_cuda and a.dtype != torch.float32 and out.dtype == torch.float32:
        torch.mm(a, b, out_dtype=torch.float32, out=out)
    elif out.dtype == torch.float32:
        torch.mm(a.float(), b.float(), out=out)
    else:
        out.copy_(matmul(a, b))
