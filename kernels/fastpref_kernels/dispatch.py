"""Selects the implementation of each op, Triton or plain torch, for a device."""

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch

from fastpref_kernels.gemm import gpu_multiplies_bfloat16

logger = logging.getLogger(__name__)


@functools.cache
def implementation(op: str, device: torch.device) -> ModuleType:
    """Return the module with `<op>_fwd` and `<op>_bwd` for tensors on `device`.

    Triton on GPUs that it supports, and for CPU tensors under TRITON_INTERPRET=1; plain torch
    otherwise. Plain torch on a CUDA device is logged as a warning, once per op and device.
    """
    path = "triton" if _runs_triton(op, device) else "torch"
    return importlib.import_module(f"fastpref_kernels.{op}_{path}")


def _runs_triton(op: str, device: torch.device) -> bool:
    if device.type == "cpu":
        return _interpreted()
    if device.type != "cuda":
        return False
    obstacle = _obstacle(device)
    if obstacle:
        logger.warning("%s runs in plain torch on %s: %s", op, device, obstacle)
    return not obstacle


def _interpreted() -> bool:
    # same parsing as Triton's own, without importing Triton
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def _obstacle(device: torch.device) -> str | None:
    """Reason why the Triton kernels cannot run on this GPU; None if they can."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if not gpu_multiplies_bfloat16(device):
        return f"{torch.cuda.get_device_name(device)} is older than Ampere"
    return None
