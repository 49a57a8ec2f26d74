"""The memory of the device that is here."""

from dataclasses import replace

import psutil
import torch
from fastpref_kernels import set_workspace_mib
from fastpref_kernels.workspace import auto_workspace_mib

from fastpref.config import HeadConfig
from fastpref.host import available_to_rank
from fastpref.memory.plan import Device, MemoryPlan


def available_bytes(device: torch.device) -> int:
    """What this process can have of a device, with what it has already."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    return available_to_rank() + resident_bytes()


def device_here(device: torch.device, num_ranks: int, *, replicated: bool) -> Device:
    """The devices of a run, and what the program takes of a CPU with what it has loaded."""
    process = resident_bytes() if device.type == "cpu" else 0
    return Device(device.type, num_ranks, available_bytes(device), process, replicated)


def with_loaded_models(plan: MemoryPlan) -> MemoryPlan:
    """A plan made on a CPU after the models were loaded: they are no part of the program."""
    models = plan.masters + plan.weights + plan.reference
    return replace(plan, process=max(0, plan.process - models))


def resident_bytes() -> int:
    """What this process has in memory now."""
    return int(psutil.Process().memory_info().rss)


def device_memory(device: torch.device) -> int | None:
    """Bytes of a GPU; None of a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory


def bound_workspace(head: HeadConfig, memory: int | None) -> None:
    """Set how much memory the fused head may take.

    Args:
        head: Its options.
        memory: Bytes of the GPU; None on a CPU.
    """
    set_workspace_mib(head.workspace_limit or auto_workspace_mib(memory))
