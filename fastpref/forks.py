"""Processes that are forked here, and the one that started this one: how each hears of an end."""

import ctypes
import gc
import os
import signal
from collections.abc import Iterator
from contextlib import contextmanager

from fastpref.signals import LAUNCHED_BY_TORCHRUN, heard

_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of linux/prctl.h."""
_forks_work_for_us: list[bool] = []
_collected_before_fork = [True]


def stop_without_launcher() -> None:
    """Take the end of torchrun for SIGTERM: killed outright it passes nothing on, and its ranks
    would train to their end with nobody to know, in a folder that the next start wants."""
    if LAUNCHED_BY_TORCHRUN:
        _hear_of_parents_death(signal.SIGTERM)


@contextmanager
def forks_end_with_us() -> Iterator[None]:
    """Processes forked here end when this one does, however it does, and at a signal without a
    word."""
    _forks_work_for_us.append(True)
    try:
        yield
    finally:
        _forks_work_for_us.pop()


def _before_fork() -> None:
    _collected_before_fork[0] = gc.isenabled()
    gc.disable()


def _go_on_after_fork() -> None:
    if _collected_before_fork[0]:
        gc.enable()


def _begin_as_fork() -> None:
    # what was garbage there is not collected here: threads that it would wait for are not here
    gc.freeze()
    _go_on_after_fork()
    if not _forks_work_for_us:
        return
    # no handler of Python's: one that is noted as a fork begins to wait would wait with it
    for number in heard():
        signal.signal(number, signal.SIG_DFL)
    # elsewhere than on Linux it waits for work that never comes
    _hear_of_parents_death(signal.SIGKILL)


def _hear_of_parents_death(number: signal.Signals) -> None:
    """Have the system send this process a signal when the one that started it ends; on Linux."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PARENT_DEATH_SIGNAL, number)


os.register_at_fork(
    before=_before_fork, after_in_parent=_go_on_after_fork, after_in_child=_begin_as_fork
)
