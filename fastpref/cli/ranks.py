"""Run a task on this rank of the process group."""

import datetime
from collections.abc import Callable

import torch.distributed as dist

from fastpref.distributed import World, init_world
from fastpref.heartbeat import Heartbeat
from fastpref.signals import signals_change_nothing


def run_on_this_rank(task: Callable[[World], None], timeout_seconds: int) -> None:
    """Join the process group, run `task`, and leave the group together with the other ranks.

    Raises:
        DistributedError: another rank ended, died or hangs; names it, and its reason if known.
    """
    world = init_world(datetime.timedelta(seconds=timeout_seconds))
    is_done = False
    try:
        with Heartbeat(world) as heartbeat:
            try:
                task(world)
                world.wait_for_all()
                is_done = True
            except Exception as error:
                with signals_change_nothing():
                    cause = heartbeat.close(error)
                if cause is error:
                    raise
                raise cause from error
    finally:
        # NCCL's teardown is collective: a failed rank would deadlock with the others, which wait
        # for it inside a step, and could not report its error
        if is_done or world.size == 1 or world.device.type == "cpu":
            dist.destroy_process_group()
