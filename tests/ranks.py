"""Run a test's function on gloo ranks of this machine."""

import multiprocessing
import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

from fastpref.cli.command_line import leave

# many times what any test needs; a deadlock must not hang the suite
TIMEOUT_SECONDS = 300

# ranks are forked from a process that imported what takes seconds, and did nothing else
multiprocessing.set_forkserver_preload(["fastpref.train.task", "hydra", "peft", "pytest"])


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> None:
    """Call `function(*args)` in `world_size` processes that see torchrun's variables."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    # the process that ranks are forked from has the variables of its own start
    environment = dict(os.environ)
    ranks = mp.start_processes(
        _enter,
        (world_size, port, environment, function, args),
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


def _enter(
    rank: int,
    world_size: int,
    port: int,
    environment: dict[str, str],
    function: Callable[..., Any],
    args: tuple[Any, ...],
) -> None:
    os.environ.clear()
    os.environ.update(environment)
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
