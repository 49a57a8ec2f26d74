"""Forked processes end with this process, and this process stops when its launcher ends."""

import ctypes
import gc
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager

from fastpref.signals import LAUNCHED_BY_TORCHRUN, heard

_PARENT_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of linux/prctl.h."""
_forks_work_for_us: list[bool] = []
_collected_before_fork = [True]
_forking = threading.Lock()


def stop_without_launcher() -> None:
    """Receive SIGTERM when torchrun dies. A torchrun killed with SIGKILL forwards no signal, and
    its orphaned ranks would keep training in a folder that the next start needs."""
    if LAUNCHED_BY_TORCHRUN:
        _hear_of_parents_death(signal.SIGTERM)


@contextmanager
def forks_end_with_us() -> Iterator[None]:
    """While entered, processes forked here end whenever this process ends, on Linux even if it is
    killed, and exit silently on a signal."""
    _forks_work_for_us.append(True)
    try:
        yield
    finally:
        _forks_work_for_us.pop()


def _before_fork() -> None:
    # held until the fork is made: a fork by another thread in between would take the collector for
    # switched off, and leave it so
    _forking.acquire()
    _collected_before_fork[0] = gc.isenabled()
    gc.disable()


def _go_on_after_fork() -> None:
    if _collected_before_fork[0]:
        gc.enable()
    _forking.release()


def _begin_as_fork() -> None:
    # never collect the parent's garbage: its finalizers may join threads that a fork does not have
    gc.freeze()
    _go_on_after_fork()
    if not _forks_work_for_us:
        return
    # no Python handlers: one whose signal comes just before a blocking call runs only after it
    for number in heard():
        signal.signal(number, signal.SIG_DFL)
    # Linux only: on other systems an orphaned fork waits for work that never comes
    _hear_of_parents_death(signal.SIGKILL)


def _hear_of_parents_death(number: signal.Signals) -> None:
    """Ask Linux to send this process a signal when its parent ends; no effect elsewhere."""
    prctl = getattr(ctypes.CDLL(None), "prctl", None)
    if prctl is not None:
        prctl(_PARENT_DEATH_SIGNAL, number)


os.register_at_fork(
    before=_before_fork, after_in_parent=_go_on_after_fork, after_in_child=_begin_as_fork
)
