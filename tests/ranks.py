"""Run a test's function on gloo ranks of this machine."""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from multiprocessing import reduction
from multiprocessing.context import ForkServerProcess
from typing import Any, NamedTuple

import torch
import torch.multiprocessing as mp
from shortcuts import leave_pictures_blank, taken

from fastpref.cli.command_line import leave
from fastpref.distributed import World

# many times what any test needs; a deadlock must not hang the suite
TIMEOUT_SECONDS = 300
ALONE = World(rank=0, size=1, device=torch.device("cpu"), mesh=None, store=None)
"""A world of one rank, without a process group."""

# ranks are forked from a process that has imported what takes seconds, and did nothing else
multiprocessing.set_forkserver_preload(
    [
        *("fastpref.train.task", "fastpref.tisdpo.recipe", "transformers.models.llama"),
        *("hydra", "matplotlib.pyplot", "peft", "pytest"),
    ]
)


class OfTest(NamedTuple):
    """What the process that ranks are forked from has not: it began before this test did."""

    variables: dict[str, str]
    streams: tuple["Stream", "Stream"]
    shortcuts: list[Callable[[], None]]

    @classmethod
    def here(cls) -> "OfTest":
        """Those of this process."""
        return cls(dict(os.environ), (Stream(1), Stream(2)), taken())

    def take(self) -> None:
        """Have them in this process."""
        os.environ.clear()
        os.environ.update(self.variables)
        for stream, number in zip(self.streams, (1, 2), strict=True):
            os.dup2(stream.number, number)
        leave_pictures_blank()
        for shortcut in self.shortcuts:
            shortcut()


class Stream:
    """A file descriptor, whatever its number becomes in another process."""

    def __init__(self, number: int) -> None:
        self.number = number

    def __reduce__(self) -> Any:
        return _stream_of, (reduction.DupFd(self.number),)


def _stream_of(duplicate: Any) -> Stream:
    return Stream(duplicate.detach())


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> None:
    """Call `function(*args)` in `world_size` processes that see torchrun's variables."""
    ranks = mp.start_processes(
        _enter,
        (world_size, free_port(), OfTest.here(), function, args),
        world_size,
        join=False,
        start_method="forkserver",
    )
    deadline = time.monotonic() + TIMEOUT_SECONDS
    # join returns False while ranks run, and raises what a rank raised
    while not ranks.join(timeout=1):
        if time.monotonic() > deadline:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError(f"ranks still running after {TIMEOUT_SECONDS} s")


def start_on_ranks(
    function: Callable[..., Any], world_size: int, *args: Any
) -> list[ForkServerProcess]:
    """The same, but the processes are the caller's to wait for and to end."""
    world = (world_size, free_port(), OfTest.here(), function, args)
    context = multiprocessing.get_context("forkserver")
    ranks = [context.Process(target=_enter, args=(rank, *world)) for rank in range(world_size)]
    for rank in ranks:
        rank.start()
    return ranks


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        return int(probe.getsockname()[1])


def _enter(
    rank: int,
    world_size: int,
    port: int,
    of_test: OfTest,
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    of_test.take()
    os.environ.update(
        RANK=str(rank),
        LOCAL_RANK=str(rank),
        WORLD_SIZE=str(world_size),
        MASTER_ADDR="localhost",
        MASTER_PORT=str(port),
        OMP_NUM_THREADS="1",
    )
    function(*args)
    leave(0)
