"""SIGINT, SIGTERM, SIGUSR1, SIGHUP: exit at once if nothing can be lost, else request a save.

A handler runs between any two bytecode instructions, in libraries, imports and other handlers too.
An exception raised there could be caught anywhere, and state changed there could be half changed
already. So our handlers set a number or end the process, and do nothing else.
"""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import TYPE_CHECKING, Any

from fastpref.deadline import Deadline
from fastpref.errors import (
    CheckpointError,
    FastprefError,
    InterruptionError,
    PreemptionError,
    WritingMemoryError,
    error_text,
)

if TYPE_CHECKING:
    from fastpref.distributed import World

logger = logging.getLogger("fastpref")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Ctrl-C; a scheduler that takes the machine away; its advance warning; a terminal that is closed
or loses its connection."""
DEADLINE, NON_FINITE, FAILURE, SHORTAGE = 253, 254, 255, 256
"""Reasons to stop besides signals, above their numbers: `checkpoint.deadline` is near, steps are
no longer applied because one was not finite, a rank cannot write a file, a rank cannot for want of
memory or file descriptors."""
REPEATED = (signal.SIGHUP,)
"""Signals that come twice for one event: from the system, and from the shell that it ends."""
SAME_REQUEST_SECONDS = 2.0
"""Under torchrun a second signal within this time is the same request: torchrun forwards a Ctrl-C
that the terminal has already sent to all of its processes."""
SHOW_CURSOR = b"\x1b[?25h"
"""Terminal sequence; a progress bar hides the cursor."""

LAUNCHED_BY_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ

_outcomes = ["nothing to save yet"]
"""What the message of a signal that ends the process says was saved; the last entry counts."""

_ending: list[FastprefError] = []
"""Why the process is about to end; the first counts. Appending is a single instruction."""

Handler = Callable[[int, FrameType | None], Any]


def stop_error(number: int, outcome: str) -> FastprefError:
    """InterruptionError for SIGINT, PreemptionError for every other reason."""
    if number == signal.SIGINT:
        return InterruptionError(f"interrupted; {outcome}")
    reasons = {
        signal.SIGUSR1: "asked to stop by SIGUSR1",
        signal.SIGHUP: "the terminal was closed",
        DEADLINE: "checkpoint.deadline is near",
    }
    return PreemptionError(f"{reasons.get(number, 'terminated')}; {outcome}")


def end_if_past(seconds: int | None, world: "World", outcome: str) -> None:
    """Stop before a long operation begins, if the deadline has already passed.

    Args:
        seconds: Deadline in seconds after the start of the command; None: no deadline.
        outcome: What was saved so far, for the message.

    Raises:
        PreemptionError: on every rank, with `outcome` in its message.
    """
    if world.on_main(Deadline(seconds).is_near):
        raise stop_error(DEADLINE, outcome)


@contextmanager
def signals_end_the_process() -> Iterator[None]:
    """While entered, a signal ends the process at once, with the exit code and the message of its
    `stop_error`."""

    owner = os.getpid()

    def handle(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:
            # in a process that a library forked
            die(number)
        quit_saying(stop_error(number, _outcomes[-1]))

    with _handlers(handle):
        yield


@contextmanager
def signals_change_nothing() -> Iterator[None]:
    """While entered, signals are ignored: the process is about to report another error, and a
    launcher that saw another rank end may send a signal before it has done so."""
    with _handlers(lambda *_: None):
        yield


@contextmanager
def say_if_stopped(outcome: str) -> Iterator[None]:
    """Set what the message says was saved, if a signal ends the process in this block."""
    _outcomes.append(outcome)
    try:
        yield
    finally:
        _outcomes.pop()


def quit_saying(error: FastprefError) -> None:
    """End the process at once from a signal handler: unbuffered, and without raising.

    A second signal's handler may run inside the first one's. The first one then prevails, so that
    exit code and message belong together.
    """
    _ending.append(error)
    if _ending[0] is not error:
        return
    text = error_text(error).encode(sys.getfilesystemencoding(), "replace")
    # stderr may be closed
    with suppress(OSError):
        os.write(2, SHOW_CURSOR * os.isatty(2) + text)
    os._exit(error.exit_code)


def die(number: int) -> None:
    """Apply a signal's default action, which ends the process."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    # the first process of a container ignores signals that it does not handle
    os._exit(128 + number)


def heard(numbers: Iterable[signal.Signals] = SIGNALS) -> list[signal.Signals]:
    """Those of `numbers` that this process does not ignore: a background process of a script is
    started to ignore the Ctrl-C that is meant for the foreground."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def signals_end_with(exit_code: int) -> None:
    """From now on a signal ends the process at once with `exit_code`, which is already decided."""
    # not SIG_DFL: Python prints a warning if a pending signal has lost its handler
    for number in heard():
        signal.signal(number, lambda *_: os._exit(exit_code))


@contextmanager
def _handlers(handle: Handler) -> Iterator[None]:
    """Handle the signals that are not ignored; restore the previous handlers at the end."""
    # only the main thread may install handlers
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handle) for number in heard()}
    try:
        yield
    finally:
        for number, handler in before.items():
            # None: not installed from Python
            signal.signal(number, signal.SIG_DFL if handler is None else handler)


class StopRequest:
    """While entered, the first signal is a request to save and stop; a second one acts at once.

    A file that cannot be written, a near deadline and `ask` make the same request.

    Args:
        deadline: The time by which everything must be saved; None: there is none.
    """

    def __init__(self, deadline: Deadline | None = None) -> None:
        self._deadline = deadline or Deadline(None)
        self._received = 0
        self._received_at = 0.0
        self._asked = 0
        self._agreed = 0
        self.failure: CheckpointError | None = None
        self._was_told = False
        self._installed = _handlers(self._handle)

    def __enter__(self) -> "StopRequest":
        self._installed.__enter__()
        return self

    def __exit__(self, *error: Any) -> None:
        self._installed.__exit__(*error)

    @property
    def requested(self) -> bool:
        """Whether this process was asked to stop; other ranks may not know of it yet."""
        self._look_at_the_clock()
        return bool(self._own_reason or self._agreed)

    def ask(self, reason: int) -> None:
        """Ask all ranks to stop for a reason other than a signal, such as `NON_FINITE`."""
        self._asked = max(self._asked, reason)

    def agreed(self, world: "World") -> bool:
        """Whether any rank was asked to stop; every rank gets the same answer."""
        self._look_at_the_clock()
        self._agree(world)
        # looked at after agreeing, so that a signal that came in between counts
        if self._agreed and self._received and not self._was_told:
            self._was_told = True
            name = signal.Signals(self._received).name
            ending = "" if self._received in REPEATED else "; once more ends the process at once"
            logger.warning("%s: stopping here%s", name, ending)
        return self._agreed != 0

    def _look_at_the_clock(self) -> None:
        if self._deadline.is_near():
            self.ask(DEADLINE)

    def _agree(self, world: "World") -> None:
        # kept apart from `_received`: this rank's signal may come after another rank's
        self._agreed = world.agree_max(self._own_reason)

    @property
    def _own_reason(self) -> int:
        """Why this rank asks all ranks to stop; 0: it does not."""
        if self.failure is None:
            return max(self._asked, self._received)
        return SHORTAGE if isinstance(self.failure, WritingMemoryError) else FAILURE

    @contextmanager
    def if_unwritable(self) -> Iterator[None]:
        """Make a failed write in this block a request to stop: the model is saved first."""
        try:
            yield
        except CheckpointError as error:
            self.failure = self.failure or error

    def raise_if_requested(self, what_is_saved: str, world: "World") -> None:
        """`raise_saying` after everything is saved; either every rank raises, or none."""
        self._agree(world)
        self.raise_saying(what_is_saved)

    def raise_saying(self, what_is_saved: str) -> None:
        """Raise the error of the stop that the ranks agreed on, if any; it says what was saved.

        Raises:
            CheckpointError: a file could not be written; WritingMemoryError for want of memory or
                file descriptors.
            InterruptionError: it was SIGINT.
            PreemptionError: it was another signal, or the deadline.
        """
        if self._agreed >= FAILURE:
            cause = self.failure or "rank 0 cannot write to the run folder"
            kind = WritingMemoryError if self._agreed == SHORTAGE else CheckpointError
            raise kind(f"{cause}; {what_is_saved}")
        if self._agreed:
            raise stop_error(self._agreed, what_is_saved)

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self._received:
            # the time is set first: another handler may run in between
            self._received_at = now
            self._received = number
        elif number in REPEATED or (
            LAUNCHED_BY_TORCHRUN and now - self._received_at < SAME_REQUEST_SECONDS
        ):
            return
        elif number == signal.SIGINT:
            quit_saying(stop_error(number, f"asked for twice, so at once; {_outcomes[-1]}"))
        else:
            # not exit code 75, which tells a scheduler that the model was saved
            die(number)
