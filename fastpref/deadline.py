"""The time by which a command has to end."""

import datetime
import os
import sys
import time
from functools import cache

JOB_END = "SLURM_JOB_END_TIME"
"""Environment variable in which Slurm tells a job when its time is over, in seconds since 1970."""
JOB_MARGIN = 30
"""Seconds of a job that are left unused: clocks differ, and processes take time to end."""
_IMPORTED = time.monotonic()
"""Soon after this process was started."""


class Deadline:
    """When all that was computed has to be saved at the latest.

    Args:
        seconds: Since the start of the command; None: never.
    """

    def __init__(self, seconds: int | None) -> None:
        self._seconds = seconds
        self._save_seconds = 0.0
        self._longest_wait = 0.0
        self._last = time.monotonic()

    def expect(self, save_seconds: float) -> None:
        """What a save will take, by its size or by one that was seen."""
        self._save_seconds = save_seconds

    def is_near(self) -> bool:
        """Whether it may be over, and what was computed not saved, before this is asked again."""
        now = time.monotonic()
        self._longest_wait = max(self._longest_wait, now - self._last)
        self._last = now
        if self._seconds is None:
            return False
        return seconds_since_start() + self._longest_wait + self._save_seconds > self._seconds


def seconds_since_start() -> float:
    """Since the command was started; elsewhere than on Linux, since this process was."""
    if sys.platform != "linux":
        return time.monotonic() - _IMPORTED
    return time.clock_gettime(time.CLOCK_BOOTTIME) - _start()


@cache
def _start() -> float:
    """When this process was started, or the torchrun that started it: seconds since the boot."""
    command = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    with open(f"/proc/{command}/stat", encoding="ascii", errors="replace") as file:
        # after the name in brackets, which may hold spaces
        fields = file.read().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def seconds_of_job() -> int | None:
    """From the start of the command to the end of the Slurm job that it is part of; None where it
    is part of none, or of one that was given more time than it was told."""
    end = os.environ.get(JOB_END, "")
    left = int(end) - time.time() if end.isdecimal() else 0.0
    return int(left + seconds_since_start()) - JOB_MARGIN if left > 0 else None


def clock_time(seconds: int) -> str:
    """The date and time so many seconds after the start of the command."""
    left = datetime.timedelta(seconds=seconds - seconds_since_start())
    return f"{datetime.datetime.now() + left:%Y-%m-%d %H:%M}"
