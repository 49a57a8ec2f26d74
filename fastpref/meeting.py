"""Where ranks that something else started find one another."""

import datetime
import logging
import os
import queue
import threading
import time
import uuid
from collections.abc import Sequence
from typing import Any

import torch.distributed as dist

from fastpref.checks import listed
from fastpref.errors import RankError, first_line

logger = logging.getLogger("fastpref")

# what torch.distributed exports without telling type checkers
stores: Any = dist

ANSWER_SECONDS = 0.05
"""Between two looks of rank 0 for those that call it."""


def join_store(rank: int, size: int, timeout: datetime.timedelta) -> Any:
    """Where the ranks meet at MASTER_ADDR:MASTER_PORT, with nothing there of an earlier start.

    Args:
        timeout: How long to wait for those that may have died before they came.

    Raises:
        RankError: it cannot be opened, or not every rank came.
    """
    place = f"{os.environ['MASTER_ADDR']}:{os.environ['MASTER_PORT']}"
    logger.info("rank %d of %d, meeting the others at %s", rank, size, place)
    found: queue.SimpleQueue[tuple[Any, Exception | None]] = queue.SimpleQueue()

    def meet() -> None:
        try:
            store = _open_store(rank, size, timeout)
            found.put((_part_of_this_start(store, rank, size, timeout), None))
        except Exception as error:
            found.put((None, error))

    # in a thread: torch waits for half an hour without letting a signal's handler run
    threading.Thread(target=meet, daemon=True).start()
    store, error = found.get()
    if error is not None:
        raise RankError(
            f"rank {rank} of {size} cannot meet the others at {place}: {first_line(error)}"
        )
    return store


def _open_store(rank: int, size: int, timeout: datetime.timedelta) -> Any:
    """The store, which need not have seen anybody else."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, _, _ = next(stores.rendezvous("env://", rank, size, timeout=timeout))
        return store
    # rank 0's of torch's own would wait for the others itself, and not know which did not come
    return stores.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        # torchrun, of this process, may open it as well
        multi_tenant=True,
    )


def _part_of_this_start(store: Any, rank: int, size: int, timeout: datetime.timedelta) -> Any:
    """The part of a store that the ranks of this start have to themselves.

    The store of a torchrun outlives the ranks that it starts again, and has all that they said. So
    a rank calls under a name that none had before, and rank 0 answers with the name of the part.

    Raises:
        RankError: not every rank came; which did not.
    """
    own = uuid.uuid4().hex
    if rank == 0:
        part = stores.PrefixStore(own, store)
        part.set(_came(0), "")
        _answer(store, part, own, size, timeout)
        return part
    store.set(f"call {rank}", own)
    _wait_for([0], [f"answer {own}"], store, timeout)
    part = stores.PrefixStore(store.get(f"answer {own}").decode(), store)
    part.set(_came(rank), "")
    _wait_for(range(size), [_came(rank) for rank in range(size)], part, timeout)
    return part


def _answer(store: Any, part: Any, name: str, size: int, timeout: datetime.timedelta) -> None:
    """Tell the other ranks the name of the part, until all are there."""
    deadline = time.monotonic() + timeout.total_seconds()
    answered: set[str] = set()
    away = list(range(1, size))
    while away := [rank for rank in away if not part.check([_came(rank)])]:
        if time.monotonic() > deadline:
            raise _not_come(away, timeout)
        for rank in away:
            call = store.get(f"call {rank}").decode() if store.check([f"call {rank}"]) else name
            if call not in (name, *answered):
                store.set(f"answer {call}", name)
                answered.add(call)
        time.sleep(ANSWER_SECONDS)


def _wait_for(
    ranks: Sequence[int], keys: list[str], store: Any, timeout: datetime.timedelta
) -> None:
    """Until ranks have set their keys."""
    try:
        store.wait(keys, timeout)
    except dist.DistError:
        pairs = zip(ranks, keys, strict=True)
        raise _not_come([rank for rank, key in pairs if not store.check([key])], timeout) from None


def _came(rank: int) -> str:
    return f"come {rank}"


def _not_come(ranks: Sequence[int], timeout: datetime.timedelta) -> RankError:
    names = listed([f"rank {rank}" for rank in ranks])
    return RankError(f"{names} did not come in {timeout.total_seconds():.0f} s")
