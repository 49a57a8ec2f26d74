"""SIGINT and SIGTERM as a request that the loop reads between two steps."""

import logging
import signal
import threading
from pathlib import Path
from types import FrameType
from typing import Any

from fastpref.distributed import World
from fastpref.errors import InterruptionError, PreemptionError

logger = logging.getLogger("fastpref")


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is remembered; a second one acts at once."""

    def __init__(self) -> None:
        self.signal = 0
        self._previous: dict[int, Any] = {}

    def __enter__(self) -> "StopRequest":
        # only the main thread may install handlers
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._previous[number] = signal.signal(number, self._remember)
        return self

    def __exit__(self, *_: object) -> None:
        self._restore()

    def agreed(self, world: World) -> bool:
        """Whether any rank was asked to stop; every rank gets the same answer."""
        self.signal = world.agree_max(self.signal)
        return self.signal != 0

    def raise_if_requested(self, run_dir: Path) -> None:
        """`raise_saying` once the model is saved."""
        self.raise_saying(f"the model so far is in {run_dir / 'LATEST'}")

    def raise_saying(self, what_is_saved: str) -> None:
        """If a signal came: the exit code that tells a scheduler which, and what was saved.

        Raises:
            InterruptionError: it was SIGINT.
            PreemptionError: it was SIGTERM.
        """
        if self.signal == signal.SIGINT:
            raise InterruptionError(f"interrupted; {what_is_saved}")
        if self.signal:
            raise PreemptionError(f"terminated; {what_is_saved}")

    def _remember(self, number: int, _: FrameType | None) -> None:
        self.signal = number
        self._restore()
        name = signal.Signals(number).name
        logger.warning("%s: saving after this step; once more quits without saving", name)

    def _restore(self) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, handler)
        self._previous.clear()
