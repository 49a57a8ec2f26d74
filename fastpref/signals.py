"""SIGINT, SIGTERM, SIGUSR1, SIGHUP: the end where nothing can be lost, elsewhere a request to save.

A handler runs between any two instructions, those of libraries, of imports and of other handlers
included. What it raised could be caught anywhere, and what it changed be half changed already: so
ours set a number or end the process, and do nothing else.
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
    error_text,
)

if TYPE_CHECKING:
    from fastpref.distributed import World

logger = logging.getLogger("fastpref")

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP)
"""Ctrl-C; a scheduler that takes the machine away; one that says so beforehand; a terminal that is
closed, or a connection to it that is lost."""
DEADLINE, NON_FINITE, FAILURE = 253, 254, 255
"""What ranks agree on beside signals, above their numbers: the time is up, no step is applied any
more, one of them cannot write."""
REPEATED = (signal.SIGHUP,)
"""What the system sends, and so does the shell that ends of it."""
SAME_REQUEST_SECONDS = 2.0
"""torchrun passes on a Ctrl-C that the terminal has sent to all of its processes already."""
SHOW_CURSOR = b"\x1b[?25h"
"""A progress bar hides it."""

LAUNCHED_BY_TORCHRUN = "TORCHELASTIC_RUN_ID" in os.environ

_outcomes = ["nothing to save yet"]
"""What a signal that ends the process says of the run; the last one counts."""

_ending: list[FastprefError] = []
"""Why the process is about to end; appended to in one instruction."""

Handler = Callable[[int, FrameType | None], Any]


def stop_error(number: int, outcome: str) -> FastprefError:
    """InterruptionError for SIGINT, PreemptionError for the others."""
    if number == signal.SIGINT:
        return InterruptionError(f"interrupted; {outcome}")
    reasons = {
        signal.SIGUSR1: "asked to stop by SIGUSR1",
        signal.SIGHUP: "the terminal was closed",
        DEADLINE: "checkpoint.deadline is near",
    }
    return PreemptionError(f"{reasons.get(number, 'terminated')}; {outcome}")


def end_if_past(seconds: int | None, world: "World", outcome: str) -> None:
    """End before something long is begun, if the deadline has come already.

    Args:
        seconds: Since the start of the command; None: never.
        outcome: What there is, in words.

    Raises:
        PreemptionError: on every rank, saying `outcome`.
    """
    if world.on_main(Deadline(seconds).is_near):
        raise stop_error(DEADLINE, outcome)


@contextmanager
def signals_end_the_process() -> Iterator[None]:
    """While entered, a signal ends the process where it stands, with their exit codes and
    a message."""

    owner = os.getpid()

    def handle(number: int, _: FrameType | None) -> None:
        if os.getpid() != owner:
            # a process that a library forked off
            die(number)
        quit_saying(stop_error(number, _outcomes[-1]))

    with _handlers(handle):
        yield


@contextmanager
def signals_change_nothing() -> Iterator[None]:
    """While entered, a signal is forgotten: the process is about to end of something else, and a
    launcher that saw another rank end sends one before this rank has said what."""
    with _handlers(lambda *_: None):
        yield


@contextmanager
def say_if_stopped(outcome: str) -> Iterator[None]:
    """What a signal that ends the process inside says of the run."""
    _outcomes.append(outcome)
    try:
        yield
    finally:
        _outcomes.pop()


def quit_saying(error: FastprefError) -> None:
    """End the process at once, from a signal's handler: nothing is buffered, nothing can raise.

    Another signal's handler may run inside this one's: the first one goes on, and its exit code and
    its message belong together.
    """
    _ending.append(error)
    if _ending[0] is not error:
        return
    text = error_text(error).encode(sys.getfilesystemencoding(), "replace")
    # nobody may be there to read it
    with suppress(OSError):
        os.write(2, SHOW_CURSOR * os.isatty(2) + text)
    os._exit(error.exit_code)


def die(number: int, _: FrameType | None = None) -> None:
    """Handle a signal as if there were no handler."""
    signal.signal(number, signal.SIG_DFL)
    signal.raise_signal(number)
    # the first process of a container has no such end
    os._exit(128 + number)


def heard(numbers: Iterable[signal.Signals] = SIGNALS) -> list[signal.Signals]:
    """Signals of some that whoever started this process did not tell it to ignore: what stands in
    the background of a script ignores the Ctrl-C that is meant for the foreground."""
    return [number for number in numbers if signal.getsignal(number) is not signal.SIG_IGN]


def signals_end_with(exit_code: int) -> None:
    """From now on a signal ends the process at once, with an exit code that is known already."""
    # not SIG_DFL: Python complains of a signal that it has noted and finds no handler for
    for number in heard():
        signal.signal(number, lambda *_: os._exit(exit_code))


@contextmanager
def _handlers(handle: Handler) -> Iterator[None]:
    """Install a handler of the signals that are not ignored; at the end those before it."""
    # only the main thread may
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
    """While entered, the first signal is remembered; a second one acts at once.

    A file that cannot be written, a deadline that is near, and what calls `ask`, want the same: to
    save and end.

    Args:
        deadline: By which everything has to be saved; None: there is none.
    """

    def __init__(self, deadline: Deadline | None = None) -> None:
        self._deadline = deadline or Deadline(None)
        self._received = 0
        self._received_at = 0.0
        self._asked = 0
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
        self._look_at_the_clock()
        return bool(self._received or self._asked or self._agreed or self._failure)

    def ask(self, reason: int) -> None:
        """Ask all ranks to stop: for `NON_FINITE`."""
        self._asked = max(self._asked, reason)

    def agreed(self, world: "World") -> bool:
        """Whether any rank was asked to stop; every rank gets the same answer."""
        self._look_at_the_clock()
        self._agree(world)
        # afterwards: one that has come in between counts already
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
        # what this rank received stays apart: its own signal may come after another rank's
        own = FAILURE if self._failure else max(self._asked, self._received)
        self._agreed = world.agree_max(own)

    @contextmanager
    def if_unwritable(self) -> Iterator[None]:
        """A file that cannot be written inside ends the run after the model is saved."""
        try:
            yield
        except CheckpointError as error:
            self._failure = self._failure or error

    def raise_if_requested(self, what_is_saved: str, world: "World") -> None:
        """`raise_saying` once everything is saved; every rank does, or none."""
        self._agree(world)
        self.raise_saying(what_is_saved)

    def raise_saying(self, what_is_saved: str) -> None:
        """If the ranks agreed to stop: the exit code that tells why, and what was saved.

        Raises:
            CheckpointError: a file could not be written.
            InterruptionError: it was SIGINT.
            PreemptionError: it was another signal, or the deadline.
        """
        if self._failure or self._agreed == FAILURE:
            cause = self._failure or "rank 0 cannot write to the run folder"
            raise CheckpointError(f"{cause}; {what_is_saved}")
        if self._agreed:
            raise stop_error(self._agreed, what_is_saved)

    def _handle(self, number: int, _: FrameType | None) -> None:
        now = time.monotonic()
        if not self._received:
            # its time first: another handler may run in between
            self._received_at = now
            self._received = number
        elif number in REPEATED or (
            LAUNCHED_BY_TORCHRUN and now - self._received_at < SAME_REQUEST_SECONDS
        ):
            return
        elif number == signal.SIGINT:
            quit_saying(stop_error(number, f"asked for twice, so at once; {_outcomes[-1]}"))
        else:
            # no exit code of ours: a scheduler would take 75 for a model that was saved
            die(number)
