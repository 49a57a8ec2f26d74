"""What stands in every result: the machine it was measured on, and the folder it belongs in."""

import datetime
from pathlib import Path
from typing import Any


def describe_machine() -> dict[str, Any]:
    """Device, torch, threads and date."""
    import torch

    return {
        "device": device_name(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
    }


def results_folder(results: Path) -> Path:
    """`results/cpu`, or that of the GPU; made if need be."""
    import torch
    from bench_head import device_folder

    folder = results / (device_folder(device_name()) if torch.cuda.is_available() else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def device_name() -> str:
    """Of the GPU if there is one, else of the processor."""
    import torch
    from bench_head_memory import cpu_name

    return torch.cuda.get_device_name() if torch.cuda.is_available() else cpu_name()
