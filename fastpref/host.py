"""Memory and CPU cores available to this process on a shared machine.

A batch system or a container limits a job to part of the machine: a process that exceeds its memory
limit is killed, one that exceeds its CPU quota is throttled.
"""

import math
import os
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

import psutil

MEMBERSHIP = Path("/proc/self/cgroup")
"""Lists the cgroups of this process."""
GROUPS = Path("/sys/fs/cgroup")
"""Where the cgroup hierarchies are mounted."""
MEMORY_FILES = (
    ("memory.max", "memory.current", "inactive_file"),
    ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"),
)
"""Per cgroup version (2, 1): the files with its limit and its usage, and the entry of `memory.stat`
with the page cache that can be dropped at any time."""


def available_memory() -> int:
    """Available host memory in bytes, >= 0, within the limits of this process's cgroups."""
    room = int(psutil.virtual_memory().available)
    for group in _groups("memory"):
        for limit, used, droppable in MEMORY_FILES:
            # a cgroup without a limit has "max" here
            with suppress(OSError, ValueError):
                left = int((group / limit).read_text()) - int((group / used).read_text())
                room = min(room, left + _numbers(group / "memory.stat").get(droppable, 0))
    return max(0, room)


def available_to_rank() -> int:
    """Host memory available to each of the ranks on this machine, in bytes."""
    return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def available_cores() -> int:
    """CPU cores available to this process, >= 1: by affinity and cgroup quotas, rounded up."""
    has_affinity = hasattr(os, "sched_getaffinity")
    cores = len(os.sched_getaffinity(0)) if has_affinity else os.cpu_count() or 1
    for group in _groups("cpu"):
        # microseconds of CPU time per period; without a limit "max" or -1
        with suppress(OSError, ValueError):
            quota, period = map(int, (group / "cpu.max").read_text().split())
            cores = min(cores, math.ceil(quota / period))
        with suppress(OSError, ValueError):
            files = (group / "cpu.cfs_quota_us", group / "cpu.cfs_period_us")
            quota, period = (int(file.read_text()) for file in files)
            cores = min(cores, math.ceil(quota / period)) if quota > 0 else cores
    return max(1, cores)


def _groups(controller: str) -> Iterator[Path]:
    """The cgroups that may limit this process: its own and their ancestors."""
    with suppress(OSError):
        for line in MEMBERSHIP.read_text().splitlines():
            _, controllers, path = line.split(":", 2)
            if controller in controllers.split(","):
                hierarchy = GROUPS / controller
            elif not controllers:
                hierarchy = GROUPS
            else:
                continue
            # in a container the root is its own cgroup, and the listed path may not exist
            own = hierarchy / path.lstrip("/")
            yield from (own, *(group for group in own.parents if group.is_relative_to(hierarchy)))


def _numbers(path: Path) -> dict[str, int]:
    """The values of a file of `name number` lines, by name."""
    parts = [line.split() for line in path.read_text().splitlines()]
    return {name: int(number) for name, number, *_ in parts if number.isdigit()}
