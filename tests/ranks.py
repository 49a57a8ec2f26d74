"""Run a test's function on gloo ranks of this machine."""

import os
import socket
import time
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp

from fastpref.cli.command_line import leave

# many times what any test needs; a deadlock must not hang the suite
TIMEOUT_SECONDS = 300


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> None:
    """Call `function(*args)` in `world_size` processes that see torchrun's variables."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    ranks = mp.start_processes(
        _enter, (world_size, port, function, args), world_size, join=False, start_method="spawn"
    )
    deadline = time.monotonic() + TIMEOUT_SECONDS
    # join returns False while ranks run, and raises what a rank raised
    while not ranks.join(timeout=1):
        if time.monotonic() > deadline:
            for process in ranks.processes:
                process.kill()
            raise TimeoutError(f"ranks still running after {TIMEOUT_SECONDS} s")


def _enter(
    rank: int, world_size: int, port: int, function: Callable[..., Any], args: tuple[Any, ...]
) -> None:
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
