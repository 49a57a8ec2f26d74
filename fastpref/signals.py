"""SIGINT and SIGTERM: an error where nothing can be lost, a request where there is a model to save.

A handler runs between any two instructions, those of another handler included: all that ours do is
to set a number or to raise.
"""

import logging
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType
from typing import TYPE_CHECKING, Any

from fastpref.errors import CheckpointError, FastprefError, InterruptionError, PreemptionError

if TYPE_CHECKING:
    from fastpref.distributed import World

logger = logging.getLogger("fastpref")

SIGNALS = (signal.SIGINT, signal.SIGTERM)
FAILURE = 255
"""What ranks agree on where one of them cannot write; above every signal's number."""


class StopSignal(KeyboardInterrupt):
    """A signal ends what is running. No library's `except Exception` takes it for an error."""

    def __init__(self, number: int, outcome: str = "") -> None:
        super().__init__(number, outcome)
        self.number = number
        self.outcome = outcome

    def as_error(self, outcome: str) -> FastprefError:
        """The error with the exit code that tells a scheduler which signal it was.

        Args:
            outcome: What became of the run, where the signal's handler does not know better.
        """
        return stop_error(self.number, self.outcome or outcome)


def stop_error(number: int, outcome: str) -> FastprefError:
    """InterruptionError for SIGINT, PreemptionError for SIGTERM."""
    if number == signal.SIGINT:
        return InterruptionError(f"interrupted; {outcome}")
    return PreemptionError(f"terminated; {outcome}")


def act_by_default() -> None:
    """From now on a signal just ends the process."""
    for number in SIGNALS:
        signal.signal(number, signal.SIG_DFL)


@contextmanager
def signals_raise() -> Iterator[None]:
    """While entered, SIGINT and SIGTERM raise where the program stands; the next one kills it.

    Raises:
        StopSignal: one of them came.
    """

    def handle(number: int, _: FrameType | None) -> None:
        act_by_default()
        raise StopSignal(number)

    with _handlers(handle):
        yield


@contextmanager
def say_if_stopped(outcome: str) -> Iterator[None]:
    """Let a signal that raises inside say what became of the run.

    Raises:
        InterruptionError, PreemptionError: one came.
    """
    try:
        yield
    except StopSignal as stopped:
        raise stopped.as_error(outcome) from None


@contextmanager
def _handlers(handle: Any) -> Iterator[None]:
    """Install a handler of both signals; at the end those before it, unless it put others."""
    # only the main thread may
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.getsignal(number) for number in SIGNALS}
    for number in SIGNALS:
        signal.signal(number, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            if signal.getsignal(number) == handle:
                # None: not installed from Python
                signal.signal(number, signal.SIG_DFL if handler is None else handler)


class StopRequest:
    """While entered, the first SIGINT or SIGTERM is remembered; a second one acts at once.

    A file that cannot be written asks for the same: to save the model and end.
    """

    def __init__(self) -> None:
        self._received = 0
        self._agreed = 0
        self._failure: CheckpointError | None = None
        self._was_told = False
        self._installed = _handlers(self._handle)

    def __enter__(self) -> "StopRequest":
        self._installed.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._installed.__exit__(*error)

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop; others may not know of it yet."""
        return bool(self._received or self._agreed or self._failure)

    def agreed(self, world: "World") -> bool:
        """Whether any rank was asked to stop; every rank gets the same answer."""
        if self._received and not self._was_told:
            self._was_told = True
            name = signal.Signals(self._received).name
            logger.warning("%s: saving after this step; once more quits without saving", name)
        # what this rank received stays apart: its own signal may come after another rank's
        self._agree(world)
        return self._agreed != 0

    def _agree(self, world: "World") -> None:
        self._agreed = world.agree_max(FAILURE if self._failure else self._received)

    @contextmanager
    def if_unwritable(self) -> Iterator[None]:
        """A file that cannot be written inside ends the run after the model is saved."""
        try:
            yield
        except CheckpointError as error:
            self._failure = self._failure or error

    def raise_if_requested(self, run_dir: Path, world: "World") -> None:
        """`raise_saying` once the model is saved; every rank does, or none."""
        self._agree(world)
        self.raise_saying(f"the model so far is in {run_dir / 'LATEST'}")

    def raise_saying(self, what_is_saved: str) -> None:
        """If the ranks agreed to stop: the exit code that tells why, and what was saved.

        Raises:
            CheckpointError: a file could not be written.
            InterruptionError: it was SIGINT.
            PreemptionError: it was SIGTERM.
        """
        if self._failure or self._agreed == FAILURE:
            cause = self._failure or "rank 0 cannot write to the run folder"
            raise CheckpointError(f"{cause}; {what_is_saved}")
        if self._agreed:
            raise stop_error(self._agreed, what_is_saved)

    def _handle(self, number: int, _: FrameType | None) -> None:
        if not self._received:
            self._received = number
            return
        act_by_default()
        if number == signal.SIGINT:
            raise StopSignal(number, "asked for twice, so nothing was saved")
        signal.raise_signal(number)
