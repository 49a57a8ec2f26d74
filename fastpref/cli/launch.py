"""One command, a process for every GPU of every machine; and the threads of each."""

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
from typing import Any

import psutil
import torch

from fastpref.distributed import OWN_RUN_ID, SHORTEST_MEETING, TIMEOUT, launched, read_ranks
from fastpref.errors import ConfigError, DistributedError, first_line
from fastpref.host import available_cores
from fastpref.meeting import join_store
from fastpref.signals import SIGNALS, die, heard

logger = logging.getLogger("fastpref")

SAVE_SECONDS = 600
"""After a signal, before a rank that has not ended is killed."""


def launch_on_every_gpu(
    num_gpus: int, port: int | None, *, timeout: datetime.timedelta = TIMEOUT
) -> int:
    """Run this same command under torchrun, one process a GPU; where a scheduler started it once on
    each of several machines, all of them are one run.

    Args:
        num_gpus: Of this machine.
        port: Where they meet on one machine; None: a free one.
        timeout: How long machines wait for one another.

    Returns:
        The exit code of the first rank of this machine that failed, or 0.

    Raises:
        ConfigError: the port is taken.
        RankError: not every machine came.
        DistributedError: the processes do not find each other.
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
        # of ranks that a signal stops: seconds to save in; older torch gives them 30
        launch.shutdown_timeout = SAVE_SECONDS
    # the command torchrun says 1, this function of it nothing: each would start a thread a core
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, available_cores() // num_gpus)))
    # torchrun forgets the ranks' exit codes at a signal that it handles, and it has to have one
    launch.signals_to_handle = signal.SIGQUIT.name
    try:
        with passing_on(SIGNALS), _all_machines(timeout):
            elastic_launch(launch, sys.executable)("-u", *sys.argv)
    except ChildFailedError as failed:
        _, failure = failed.get_first_failure()
        return failure.exitcode if failure.exitcode > 0 else DistributedError.exit_code
    except SignalException:
        # SIGQUIT, at which nothing is saved
        return DistributedError.exit_code
    except RendezvousError as error:
        raise DistributedError(f"the processes do not meet: {first_line(error)}") from None
    return 0


def _meeting(port: int | None) -> dict[str, Any]:
    """Where the processes meet, for torchrun: on this machine, or where a scheduler's do."""
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
    """Wait for the other machines first: in torchrun's wait no signal is heard."""
    store = None
    if launched():
        store = join_store(*read_ranks()[:2], max(timeout, SHORTEST_MEETING))
    yield
    # held until here: on the first machine it is the server that torchrun meets at too
    del store


@contextmanager
def passing_on(numbers: Iterable[signal.Signals]) -> Iterator[None]:
    """While entered, signals go to the processes that this one started.

    They end by themselves, each with everything saved, and their exit code says so. Where there is
    none a signal is for this process.
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
    """Refuse a port that another program listens on: torchrun would wait for it for minutes.

    Raises:
        ConfigError: naming the port.
    """
    with socket.socket() as probe:
        # as torch does: a port of a connection that has just ended can be had
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError as error:
            raise ConfigError(
                f"fsdp_port={port} cannot be had: {error.strerror}; name another one, or null for "
                "a free one"
            ) from None


def keep_to_cores() -> None:
    """Let torch start no more threads than there are cores for: each would wait for the others."""
    cores = available_cores()
    if "OMP_NUM_THREADS" not in os.environ and torch.get_num_threads() > cores:
        torch.set_num_threads(cores)
