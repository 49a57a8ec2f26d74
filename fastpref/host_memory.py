"""The memory of a machine that a process can have.

A batch system or a container leaves a job less than the machine has, and kills what takes more.
"""

import contextlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple


class _Files(NamedTuple):
    """What a control group says of its memory, and where."""

    limit: str
    used: str
    """With what was read from files and can be dropped at any time."""
    droppable: str
    """A line of `memory.stat`: of that, what was read once."""


_VERSION_1 = _Files("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file")
_VERSION_2 = _Files("memory.max", "memory.current", "inactive_file")


def available_memory(
    membership: Path = Path("/proc/self/cgroup"), root: Path = Path("/sys/fs/cgroup")
) -> int:
    """Bytes of the machine that can be had, >= 0: as many as this process's control groups leave.

    Args:
        membership: The file that names those groups.
        root: The folder in which they are found.
    """
    room = os.sysconf("SC_AVPHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    with contextlib.suppress(OSError, KeyError):
        room = _numbers(Path("/proc/meminfo"))["MemAvailable:"] * 1024
    for group, files in _groups(membership, root):
        # a group without a limit says "max"
        with contextlib.suppress(OSError, ValueError):
            limit, used = (int((group / name).read_text()) for name in files[:2])
            droppable = _numbers(group / "memory.stat").get(files.droppable, 0)
            room = min(room, limit - used + droppable)
    return max(0, room)


def available_to_rank() -> int:
    """Bytes of the host's memory that each of the ranks on it can have."""
    return available_memory() // int(os.environ.get("LOCAL_WORLD_SIZE", "1"))


def _groups(membership: Path, root: Path) -> Iterator[tuple[Path, _Files]]:
    """The control groups that a process is in, and those that these are in."""
    try:
        lines = membership.read_text().splitlines()
    except OSError:
        return
    for line in lines:
        _, controllers, path = line.split(":", 2)
        if controllers == "":
            hierarchy, files = root, _VERSION_2
        elif "memory" in controllers.split(","):
            hierarchy, files = root / "memory", _VERSION_1
        else:
            continue
        # a container sees its own group as the root, and may be told a path that is not there
        of_process = hierarchy / path.lstrip("/")
        for group in (of_process, *of_process.parents):
            yield group, files
            if group == hierarchy:
                break


def _numbers(path: Path) -> dict[str, int]:
    """The lines of a file that are a name and a number."""
    parts = [line.split() for line in path.read_text().splitlines()]
    return {name: int(number) for name, number, *_ in parts if number.isdigit()}
