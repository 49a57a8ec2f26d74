"""What a process can have of its machine, whose memory and cores others use too.

A batch system or a container leaves a job less than there is: it kills what takes more memory and
slows down what takes more cores.
"""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

MEMBERSHIP = Path("/proc/self/cgroup")
"""Names the control groups of this process."""
GROUPS = Path("/sys/fs/cgroup")
"""All control groups."""
MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Of a group, by version: its limit; what it uses; in `memory.stat`, what of that was read from
files once and can be dropped at any time."""


def available_memory() -> int:
    """Bytes of the machine that can be had, >= 0: as many as this process's groups leave."""
    room = int(psutil.virtual_memory().available)
    for group in _groups("memory"):
        for limit, used, droppable in MEMORY_FILES:
            # a group without a limit says "max"
            with suppress(OSError, ValueError):
                left = int((group / limit).read_text()) - int((group / used).read_text())
                room = min(room, left + _numbers(group / "memory.stat").get(droppable, 0))
    return max(0, room)


def available_to_rank() -> int:
    """Bytes of the host's memory that each of the ranks on it can have."""
    return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def available_cores() -> int:
    """Cores of the machine that can be had, >= 1; a part of one counts as one."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    for group in _groups("cpu"):
        # microseconds of computation in each period of so many; without a limit "max" or -1
        with suppress(OSError, ValueError):
            quota, period = map(int, (group / "cpu.max").read_text().split())
            cores = min(cores, math.ceil(quota / period))
        with suppress(OSError, ValueError):
            files = (group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us")
            quota, period = (int(file.read_text()) for file in files)
            cores = min(cores, math.ceil(quota / period)) if quota > 0 else cores
    return max(1, cores)


def _groups(controller: str) -> Iterator[Path]:
    """Control groups that may limit this process: its own, and those that these are in."""
    with suppress(OSError):
        for line in MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                hierarchy = GROUPS / controller
            elif not controllers:
                hierarchy = GROUPS
            else:
                continue
            # a container sees its own group as the root, and may be told a path that is not there
            own = hierarchy / path.lstrip("/")
            yield from (own, *(group for group in own.parents if group.is_relative_to(hierarchy)))


def _numbers(path: Path) -> dict[str, int]:
    """The lines of a file that are a name and a number."""
    parts = [line.split() for line in path.read_text().splitlines()]
    return {name: int(number) for name, number, *_ in parts if number.isdigit()}
