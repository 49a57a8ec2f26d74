"""Rendezvous of ranks that a launcher or a scheduler started."""

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

# torch.distributed exports its stores without declaring them to type checkers
stores: Any = dist

ANSWER_SECONDS = 0.05
"""Interval at which rank 0 polls for ranks that call it."""


def join_store(rank: int, size: int, timeout: datetime.timedelta) -> Any:
    """The key-value store at MASTER_ADDR:MASTER_PORT, free of keys from earlier starts, once all
    ranks have joined it.

    Args:
        timeout: How long to wait for the other ranks; one may have died before it joined.

    Raises:
        RankError: the store cannot be opened, or not every rank joined.
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

    # in a thread: torch may wait for half an hour without letting a signal handler run
    threading.Thread(target=meet, daemon=True).start()
    store, error = found.get()
    if error is not None:
        raise RankError(
            f"rank {rank} of {size} cannot meet the others at {place}: {first_line(error)}"
        )
    return store


def _open_store(rank: int, size: int, timeout: datetime.timedelta) -> Any:
    """Open the store, hosted by rank 0 or by torchrun, without waiting until all ranks joined."""
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store, _, _ = next(stores.rendezvous("env://", rank, size, timeout=timeout))
        return store
    # not by torch's env:// rendezvous: rank 0 waits there for all, and cannot tell who is missing
    return stores.TCPStore(
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=rank == 0,
        timeout=timeout,
        wait_for_workers=False,
        # a torchrun that runs in this process may open the same store
        multi_tenant=True,
    )


def _part_of_this_start(store: Any, rank: int, size: int, timeout: datetime.timedelta) -> Any:
    """A prefix of the store that only the ranks of this start use.

    A torchrun's store outlives ranks that are restarted, and still holds their keys. So each rank
    calls rank 0 under a fresh random name, and rank 0 answers with the prefix.

    Raises:
        RankError: naming the ranks that did not join.
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
    """Rank 0: tell the other ranks the prefix `name`, until all have joined."""
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
    """Wait until the ranks have set their keys.

    Raises:
        RankError: naming the ranks that did not.
    """
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
