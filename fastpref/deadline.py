"""The time by which a command has to end."""

import os
import time

from fastpref.distributed import World
from fastpref.signals import DEADLINE, StopRequest, stop_error


class Deadline:
    """When all that was computed has to be saved at the latest.

    Args:
        seconds: Since the start of the command; None: never.
        save_seconds: What a save is expected to take.
    """

    def __init__(self, seconds: int | None, save_seconds: float) -> None:
        self._seconds = seconds
        self._save_seconds = save_seconds
        self._longest_step = 0.0
        self._last = time.monotonic()

    def expect(self, save_seconds: float) -> None:
        """What a save will take, now that one was seen."""
        self._save_seconds = save_seconds

    def is_near(self) -> bool:
        """Whether another step may be one too many; to be called once a step."""
        now = time.monotonic()
        self._longest_step = max(self._longest_step, now - self._last)
        self._last = now
        if self._seconds is None:
            return False
        return seconds_since_start() + self._longest_step + self._save_seconds > self._seconds

    def ask(self, stop: StopRequest, world: World) -> None:
        """Ask all ranks to stop if another step may be one too many; to be called once a step."""
        if world.is_main and self.is_near():
            stop.ask(DEADLINE)


def end_if_past(seconds: int | None, world: World, outcome: str) -> None:
    """End before something long is begun, if the time has come already.

    Args:
        seconds: Since the start of the command; None: never.
        world: Whoever runs.
        outcome: What there is, in words.

    Raises:
        PreemptionError: on every rank, saying `outcome`.
    """
    if world.on_main(Deadline(seconds, save_seconds=0).is_near):
        raise stop_error(DEADLINE, outcome)


def seconds_since_start() -> float:
    """Since this process was started."""
    with open("/proc/self/stat", encoding="ascii", errors="replace") as file:
        # after the name in brackets, which may hold spaces
        fields = file.read().rpartition(")")[2].split()
    ticks = os.sysconf("SC_CLK_TCK")
    return time.clock_gettime(time.CLOCK_BOOTTIME) - int(fields[19]) / ticks
