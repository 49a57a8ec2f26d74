"""Run a test's function on gloo ranks of this machine."""

import os
import socket
from collections.abc import Callable
from typing import Any

import torch.multiprocessing as mp


def run_on_ranks(function: Callable[..., Any], world_size: int, *args: Any) -> None:
    """Call `function(*args)` in `world_size` processes that see torchrun's variables."""
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    mp.start_processes(_enter, (world_size, port, function, args), world_size, start_method="spawn")


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
