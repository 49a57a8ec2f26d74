"""The deadline of a command, such as the end of its Slurm job."""

import datetime
import os
import sys
import time
from functools import cache

JOB_END = "SLURM_JOB_END_TIME"
"""Environment variable with the end of the Slurm job, in seconds since 1970."""
JOB_MARGIN = 30
"""Seconds of a job left unused: clocks differ, and processes take time to exit."""
_IMPORTED = time.monotonic()
"""Monotonic clock shortly after this process started, in seconds."""


class Deadline:
    """The latest time by which all results must be saved.

    Args:
        seconds: Seconds after the start of the command; None: no deadline.
    """

    def __init__(self, seconds: int | None) -> None:
        self._seconds = seconds
        self._save_seconds = 0.0
        self._longest_wait = 0.0
        self._last = time.monotonic()

    def expect(self, save_seconds: float) -> None:
        """Set how long a save is expected to take, estimated from its size or measured."""
        self._save_seconds = save_seconds

    def is_near(self) -> bool:
        """Whether a save begun only at the next call could miss the deadline, if the time until
        then is the longest seen between two calls."""
        now = time.monotonic()
        self._longest_wait = max(self._longest_wait, now - self._last)
        self._last = now
        if self._seconds is None:
            return False
        return seconds_since_start() + self._longest_wait + self._save_seconds > self._seconds


def seconds_since_start() -> float:
    """Seconds since the command, or its torchrun, started; outside Linux since this process did."""
    if sys.platform != "linux":
        return time.monotonic() - _IMPORTED
    return time.clock_gettime(time.CLOCK_BOOTTIME) - _start()


@cache
def _start() -> float:
    """Start time of this process, or of the torchrun that started it, in seconds since boot."""
    command = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else os.getpid()
    with open(f"/proc/{command}/stat", encoding="ascii", errors="replace") as file:
        # skip the process name in brackets, which may contain spaces
        fields = file.read().rpartition(")")[2].split()
    return int(fields[19]) / os.sysconf("SC_CLK_TCK")


def seconds_of_job() -> int | None:
    """Seconds from the start of the command to `JOB_MARGIN` before the end of its Slurm job; None
    outside of a job, or if the announced end has passed because the job was extended."""
    end = os.environ.get(JOB_END, "")
    left = int(end) - time.time() if end.isdecimal() else 0.0
    return int(left + seconds_since_start()) - JOB_MARGIN if left > 0 else None


def clock_time(seconds: int) -> str:
    """Local date and time at `seconds` after the start of the command."""
    left = datetime.timedelta(seconds=seconds - seconds_since_start())
    return f"{datetime.datetime.now() + left:%Y-%m-%d %H:%M}"
