"""Launch one process per GPU from a single command, and limit each process's threads."""

import contextlib
import datetime
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from types import FrameType
from typing import TYPE_CHECKING, Any

import psutil
import torch

from fastpref.distributed import OWN_RUN_ID, SHORTEST_MEETING, TIMEOUT, launched, read_ranks
from fastpref.errors import ConfigError, DistributedError, first_line, say_error
from fastpref.host import available_cores
from fastpref.meeting import join_store
from fastpref.signals import SIGNALS, die, heard

# slow to import, and needed only by the process that launches
if TYPE_CHECKING:
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

logger = logging.getLogger("fastpref")

SAVE_SECONDS = 600
"""Seconds that a rank has to save after a signal, before it is killed."""


def launch_on_every_gpu(
    num_gpus: int, port: int | None, *, timeout: datetime.timedelta = TIMEOUT
) -> int:
    """Rerun this command under torchrun with one process per GPU.

    If a scheduler started the command once on each of several machines, they form one run.

    Args:
        num_gpus: GPUs of this machine.
        port: Rendezvous port of a single-machine run; None: any free port.
        timeout: How long the machines wait for one another at the start.

    Returns:
        The exit code of the first rank that failed on this machine, or 0; see `_exit_code`.

    Raises:
        ConfigError: the port is in use.
        RankError: not every machine arrived in time.
        DistributedError: the rendezvous failed.
    """
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError
    from torch.distributed.elastic.rendezvous import RendezvousError
    from torch.distributed.launcher.api import LaunchConfig, elastic_launch

    launch = LaunchConfig(
        **_meeting(port),
        nproc_per_node=num_gpus,
        run_id=OWN_RUN_ID,
        max_restarts=0,
    )
    if hasattr(launch, "shutdown_timeout"):
        # time for ranks to save after a signal; older torch is fixed at 30 s
        launch.shutdown_timeout = SAVE_SECONDS
    # elastic_launch, unlike the torchrun command, leaves it unset: each rank would use all cores
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // num_gpus)))
    # torchrun loses the ranks' exit codes on a signal it handles, but must be given one
    launch.signals_to_handle = signal.SIGQUIT.name
    try:
        with passing_on(SIGNALS), _all_machines(timeout):
            elastic_launch(launch, sys.executable)("-u", *sys.argv)
    except ChildFailedError as failed:
        return _exit_code(failed)
    except SignalException:
        # SIGQUIT: nothing was saved
        return DistributedError.exit_code
    except RendezvousError as error:
        raise DistributedError(f"the processes do not meet: {first_line(error)}") from None
    return 0


def _exit_code(failed: "ChildFailedError") -> int:
    """The exit code of the rank whose failure ended the others.

    A rank that a signal killed could not say so itself: a message names it. A rank that misses
    another may end before the one it misses, which waits to hear whether rank 0 tells its error.
    """
    rank, first = failed.get_first_failure()
    if first.exitcode < 0:
        killed = DistributedError(f"rank {rank} was killed by {first.signal_name()}")
        say_error(killed)
        return killed.exit_code
    if first.exitcode != DistributedError.exit_code:
        return first.exitcode
    codes = [failure.exitcode for failure in failed.failures.values()]
    # not that of a signal, which torchrun sends to all once one has failed
    causes = [code for code in codes if 0 < code < DistributedError.exit_code]
    return causes[0] if causes else first.exitcode


def _meeting(port: int | None) -> dict[str, Any]:
    """torchrun's rendezvous settings: on this machine, or at the scheduler's MASTER_ADDR."""
    if launched():
        machine, machines, _ = read_ranks()
        endpoint = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
        rendezvous = {"rdzv_backend": "static", "rdzv_configs": {"rank": machine}}
    else:
        machines = 1
        endpoint = f"localhost:{port or 0}"
        rendezvous = {"rdzv_backend": "c10d"}
        if port is not None:
            check_port(port)
    return {"min_nodes": machines, "max_nodes": machines, "rdzv_endpoint": endpoint} | rendezvous


@contextmanager
def _all_machines(timeout: datetime.timedelta) -> Iterator[None]:
    """Wait for the other machines on entry: torchrun's own wait handles no signals."""
    store = None
    if launched():
        store = join_store(*read_ranks()[:2], max(timeout, SHORTEST_MEETING))
    yield
    # kept alive until here: on the first machine it also serves torchrun's rendezvous
    del store


@contextmanager
def passing_on(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """Forward signals to this process's children while entered.

    The children save, exit by themselves and report the outcome in their exit codes. Without
    children, the previous handler of this process takes the signal.
    """

    def pass_on(number: int, frame: FrameType | None) -> None:
        children = psutil.Process().children()
        for child in children:
            with contextlib.suppress(psutil.NoSuchProcess):
                child.send_signal(number)
        if not children:
            handler = before[number]
            handler(number, frame) if callable(handler) else die(number)

    before: dict[int, Any] = {}
    for number in heard(numbers):
        before[number] = signal.getsignal(number)
        signal.signal(number, pass_on)
    try:
        yield
    finally:
        for own, handler in before.items():
            signal.signal(own, handler)


def check_port(port: int) -> None:
    """Refuse a port that another program listens on; torchrun would wait for it for minutes.

    Raises:
        ConfigError: the port cannot be bound.
    """
    with socket.socket() as probe:
        # like torch: a port in TIME_WAIT can be bound
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"fsdp_port={port} cannot be had: {error.strerror}; name another one, or null for "
                "a free one"
            ) from None


def keep_to_cores() -> None:
    """Limit torch's threads to the available cores, unless OMP_NUM_THREADS is set."""
    cores = available_cores()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)
