"""Memory of the device that this process runs on."""

from dataclasses import replace

import psutil
import torch
from fastpref_kernels import set_workspace_mib
from fastpref_kernels.workspace import auto_workspace_mib

from fastpref.config import HeadConfig
from fastpref.host import available_to_rank
from fastpref.memory.plan import Device, MemoryPlan


def available_bytes(device: torch.device) -> int:
    """Bytes of a device that this process can use, including what it already uses."""
    if device.type == "cuda":
        free, _ = torch.cuda.mem_get_info(device)
        return free + torch.cuda.memory_reserved(device)
    return available_to_rank() + resident_bytes()


def device_here(device: torch.device, num_ranks: int, *, replicated: bool) -> Device:
    """Description of a run's devices; on a CPU with this process's resident set size."""
    process = resident_bytes() if device.type == "cpu" else 0
    return Device(device.type, num_ranks, available_bytes(device), process, replicated)


def with_loaded_models(plan: MemoryPlan) -> MemoryPlan:
    """Subtract the models, if already loaded, from the process's memory in a plan for a CPU."""
    models = plan.masters + plan.weights + plan.reference
    return replace(plan, process=max(0, plan.process - models))


def resident_bytes() -> int:
    """Resident set size of this process, in bytes."""
    return int(psutil.Process().memory_info().rss)


def device_memory(device: torch.device) -> int | None:
    """Total memory of a GPU in bytes; None for a CPU."""
    if device.type != "cuda":
        return None
    return torch.cuda.get_device_properties(device).total_memory


def bound_workspace(head: HeadConfig, memory: int | None) -> None:
    """Set the workspace limit of the LM-head ops.

    Args:
        head: Options of the head.
        memory: Total memory of the GPU in bytes; None on a CPU.
    """
    set_workspace_mib(head.workspace_limit or auto_workspace_mib(memory))
