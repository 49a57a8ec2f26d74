"""Matrix products with float32 accumulation, on GPUs and on a CPU's matrix units."""

import functools
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor


class _MatrixUnits:
    """Process-wide torch setting for the precision of float32 GEMMs on a CPU, with a user count:
    the first user sets bfloat16, the last one to leave restores the old value."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._users = 0
        self._before = ""

    def enter(self) -> None:
        mkldnn: Any = torch.backends.mkldnn
        with self._lock:
            if self._users == 0:
                self._before = mkldnn.matmul.fp32_precision
                # no redundant write: once written, the setting no longer follows torch's global
                # precision
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
    """Run float32 GEMMs on the CPU's bfloat16 units: operands are rounded, sums are not.

    The setting is process-wide, so float32 GEMMs of other threads are affected meanwhile.
    """
    if not enabled:
        yield
        return
    _units.enter()
    try:
        yield
    finally:
        _units.leave()


def gpu_multiplies_bfloat16(device: torch.device) -> bool:
    """Whether a GPU, current or not, has bfloat16 matrix units: NVIDIA's from Ampere on, and AMD's;
    older ones emulate it."""
    return torch.version.hip is not None or torch.cuda.get_device_capability(device) >= (8, 0)


@functools.cache
def cpu_multiplies_bfloat16() -> bool:
    """Whether this CPU has bfloat16 instructions: AMX or AVX-512."""
    has = torch.cpu.get_capabilities()
    return any(has.get(name, False) for name in ("amx_bf16", "avx512_bf16"))


def matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in float32, for operands of one dtype."""
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
