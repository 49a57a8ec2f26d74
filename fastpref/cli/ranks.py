"""A task on this rank and on the others."""

import datetime
from collections.abc import Callable

import torch.distributed as dist

from fastpref.distributed import World, init_world
from fastpref.heartbeat import Heartbeat
from fastpref.signals import signals_change_nothing


def run_on_this_rank(task: Callable[[World], None], timeout_seconds: int) -> None:
    """Join the other ranks, and leave them together.

    Raises:
        DistributedError: another rank ended, died or hangs; which one, and why if it said so.
    """
    world = init_world(datetime.timedelta(seconds=timeout_seconds))
    is_done = False
    try:
        with Heartbeat(world) as heartbeat:
            try:
                task(world)
                # rank 0 may wait for a tracker's service: no collective is open meanwhile
                world.compare_on_main(None, lambda _: None)
                # no rank leaves, and takes the others' store along, before all are done
                world.agree_max(0)
                is_done = True
            except Exception as error:
                with signals_change_nothing():
                    cause = heartbeat.close(error)
                if cause is error:
                    raise
                raise cause from error
    finally:
        # NCCL's connections are taken apart by all ranks together: one that has failed would wait
        # for the others, who wait for it in a step, and could not even say why
        if is_done or world.size == 1 or world.device.type == "cpu":
            dist.destroy_process_group()
