"""Benchmark results: where they are written, and the description of the machine in them.

torch is imported lazily: imports count towards the memory that the step benchmark measures.
"""

import datetime
import json
import platform
import resource
import sys
from pathlib import Path
from typing import Any

RESULTS = Path(__file__).parent / "results"


def describe_machine(device: str | None = None) -> dict[str, Any]:
    """Device, torch, threads and date.

    Args:
        device: Device of the measurement, "cuda" or "cpu"; None for the GPU if there is one.
    """
    import torch

    return {
        "device": device_name(device),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "date": datetime.date.today().isoformat(),
    }


def write_results(
    name: str, found: dict[str, Any], *, results: Path = RESULTS, device: str | None = None
) -> None:
    """Write `<results>/<device>/<name>.json`: a description of the machine, and what was found."""
    path = results_folder(results, device) / f"{name}.json"
    path.write_text(json.dumps({**describe_machine(device), **found}, indent=1) + "\n")
    print(f"written to {path}", flush=True)


def results_folder(results: Path, device: str | None = None) -> Path:
    """Results folder of a device, such as `results/cpu` or `results/h200`; created if missing."""
    name = device_name(device).lower().removeprefix("nvidia ").replace(" ", "-")
    folder = results / (name if is_gpu(device) else "cpu")
    folder.mkdir(parents=True, exist_ok=True)
    return folder


def device_name(device: str | None) -> str:
    """Name of the GPU or of the CPU."""
    import torch

    return torch.cuda.get_device_name() if is_gpu(device) else cpu_name()


def is_gpu(device: str | None) -> bool:
    import torch

    return torch.cuda.is_available() if device is None else device == "cuda"


def cpu_name() -> str:
    """Model name of the CPU from /proc/cpuinfo, else its architecture."""
    listed = Path("/proc/cpuinfo")
    for line in listed.read_text().splitlines() if listed.exists() else ():
        if line.startswith("model name"):
            return line.partition(":")[2].strip()
    return platform.machine()


def peak_resident_gib() -> float:
    """Peak resident memory of this process in GiB."""
    # getrusage counts bytes on macOS, KiB elsewhere
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30
