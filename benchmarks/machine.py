"""What stands in every result: the machine it was measured on; and the folder it belongs in.

torch is imported where it is asked for: the step benchmark's processes count what they import.
"""

import datetime
import platform
from pathlib import Path
from typing import Any


def describe_machine(device: str | None = None) -> dict[str, Any]:
    """Device, torch, threads and date.

    Args:
        device: What was measured on, "cuda" or "cpu"; None: the GPU if there is one.
    """
    import torch

    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
    }


def results_folder(results: Path, device: str | None = None) -> Path:
    """`results/cpu`, or that of the GPU, `results/h200`; made if need be."""
    name = device_name(device).lower().removeprefix("nvidia ").replace(" ", "-")
    folder = results / (name if is_gpu(device) else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def device_name(device: str | None) -> str:
    """Of the GPU, or of the processor."""
    import torch

    return torch.cuda.get_device_name() if is_gpu(device) else cpu_name()


def is_gpu(device: str | None) -> bool:
    import torch

    return torch.cuda.is_available() if device is None else device == "cuda"


def cpu_name() -> str:
    """As the system calls the processor."""
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()
