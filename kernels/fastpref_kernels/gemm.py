"""Matrix products that sum in float32, on GPUs and on a CPU's matrix units."""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class _MatrixUnits:
    """torch's setting for float32 GEMMs of a CPU, which is the whole process's: the first of
    several threads turns it on, the last one gives back what it was."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = ""

    def enter(self) -> None:
        mkldnn: Any = torch.backends.mkldnn
        with self._lock:
            if self._users == 0:
                self._before = mkldnn.matmul.fp32_precision
                # written only where it is another one: a setting that follows torch's general one
                # would no longer do so
                if self._before != "bf16":
                    mkldnn.matmul.fp32_precision = "bf16"
            self._users += 1

    def leave(self) -> None:
        mkldnn: Any = torch.backends.mkldnn
        with self._lock:
            self._users -= 1
            if self._users == 0 and self._before != "bf16":
                mkldnn.matmul.fp32_precision = self._before


_units = _MatrixUnits()


@contextmanager
def matrix_units(enabled: bool) -> Iterator[None]:
    """Float32 GEMMs of a CPU on its bfloat16 units: operands are rounded, sums are not.

    Those of other threads are too, for as long as this one multiplies.
    """
    if not enabled:
        yield
        return
    _units.enter()
    try:
        yield
    finally:
        _units.leave()


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has units for bfloat16: AMX, or the instructions of AVX-512."""
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


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
