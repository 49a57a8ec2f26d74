"""Which implementation of an op runs on a device: the one place that decides."""

import functools
import importlib
import importlib.util
import logging
import os
from types import ModuleType

import torch

logger = logging.getLogger(__name__)


@functools.cache
def implementation(op: str, device: torch.device) -> ModuleType:
    """Module that holds `<op>_fwd` and `<op>_bwd` for tensors on `device`.

    Triton's on GPUs it supports, and for CPU tensors under TRITON_INTERPRET=1; plain torch
    everywhere else, which the log says once where a GPU is concerned.
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
    # read as Triton reads it, without importing Triton
    return os.environ.get("TRITON_INTERPRET", "0").lower() in ("1", "true", "yes", "on", "y")


def _obstacle(device: torch.device) -> str | None:
    """Why Triton's kernels cannot run on a GPU."""
    if importlib.util.find_spec("triton") is None:
        return "Triton is not installed"
    if torch.version.hip is None and torch.cuda.get_device_capability(device) < (8, 0):
        return f"{torch.cuda.get_device_name(device)} is older than Ampere"
    return None
