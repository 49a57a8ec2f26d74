"""The world a run lives in: one process, or the ranks that torchrun started."""

import datetime
import itertools
import logging
import os
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch._C._distributed_c10d import HashStore
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastpref.errors import DistributedError, FastprefError, first_line

logger = logging.getLogger("fastpref")

Result = TypeVar("Result")

# rank 0 may tokenize a large data set while the others wait
PREPARATION_TIMEOUT = datetime.timedelta(hours=12)

_preparations = itertools.count()


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process among the ranks."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that prints and writes."""
        return self.rank == 0

    def sum(self, values: Tensor) -> Tensor:
        """Sum over ranks, in place, on the device: nothing waits for the host on a GPU."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def agree_max(self, value: int) -> int:
        """The largest value of any rank, over the CPU's own process group: no device sync."""
        if self.size == 1:
            return value
        highest = torch.tensor(value)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return int(highest)

    def share_from_main(self, value: str) -> str:
        """Rank 0's value, on every rank."""
        values = [value]
        if self.size > 1:
            dist.broadcast_object_list(values, src=0, device=torch.device("cpu"))
        return values[0]


def launched() -> bool:
    """Whether torchrun (or a scheduler that sets its variables) started this process."""
    return "RANK" in os.environ and "WORLD_SIZE" in os.environ


def world_size() -> int:
    """How many ranks this run will have, known before any of them talks to another."""
    return int(os.environ["WORLD_SIZE"]) if launched() else 1


def init_world() -> World:
    """Join the process group: NCCL for tensors on GPUs, gloo for tensors on the CPU."""
    on_gpu = torch.cuda.is_available()
    rank = int(os.environ.get("RANK", 0))
    local_rank = int(os.environ.get("LOCAL_RANK", 0))
    device = torch.device("cuda", local_rank) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    backend = "cpu:gloo,cuda:nccl" if on_gpu else "gloo"
    if launched():
        dist.init_process_group(backend)
    else:
        dist.init_process_group(backend, store=HashStore(), rank=0, world_size=1)
    mesh = init_device_mesh(device.type, (dist.get_world_size(),))
    return World(rank=rank, size=dist.get_world_size(), device=device, mesh=mesh)


def main_first(world: World, name: str, prepare: Callable[[], Result]) -> Result:
    """Run `prepare` on rank 0, then on the others, who find its results in the cache.

    No collective is open while rank 0 works, so it may take hours. Its error is everybody's.

    Args:
        world: Who we are.
        name: What is prepared, for the message.
        prepare: Reads, tokenizes; writes nothing but a cache that a second call finds.
    """
    if world.size == 1:
        return prepare()
    store = dist.distributed_c10d._get_default_store()
    # every rank prepares the same things in the same order; a task may prepare rows twice
    key = f"{name} {next(_preparations)}"
    if world.is_main:
        try:
            result = prepare()
        except BaseException as error:
            store.set(key, str(getattr(error, "exit_code", 1)))
            raise
        store.set(key, "0")
        return result
    store.wait([key], PREPARATION_TIMEOUT)
    exit_code = int(store.get(key))
    if exit_code:
        # whichever rank a launcher sees end first, the exit code is that of the cause
        failure = DistributedError(f"rank 0 failed at: {name}")
        failure.exit_code = exit_code
        raise failure
    return prepare()


def explain(error: BaseException) -> FastprefError | None:
    """What torch's communication errors mean for a user, None if it is not one of them."""
    if isinstance(error, dist.DistError):
        return DistributedError(f"a rank died or did not answer: {first_line(error)}")
    text = str(error)
    # gloo raises plain RuntimeErrors
    signs = ("Connection closed by peer", "Connection reset by peer", "gloo", "Timed out waiting")
    if isinstance(error, RuntimeError) and any(sign in text for sign in signs):
        return DistributedError(f"a rank died or did not answer: {first_line(error)}")
    return None
