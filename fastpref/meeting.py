"""Where ranks that something else started find one another."""

import datetime
import logging
import os
import queue
import threading
from typing import Any

import torch.distributed as dist

from fastpref.checks import listed
from fastpref.errors import RankError, first_line

logger = logging.getLogger("fastpref")

# what torch.distributed exports without telling type checkers
stores: Any = dist


def join_store(rank: int, size: int, timeout: datetime.timedelta) -> Any:
    """The store at MASTER_ADDR:MASTER_PORT that the ranks meet in.

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
            store.set(f"come {rank}", "")
            await_all(store, size, timeout)
            found.put((store, None))
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


def await_all(store: Any, size: int, timeout: datetime.timedelta) -> None:
    """Wait until every rank has come: the store is there before all of them are.

    Raises:
        RankError: not all came in time; which did not.
    """
    keys = [f"come {rank}" for rank in range(size)]
    try:
        store.wait(keys, timeout)
    except dist.DistError:
        missing = [f"rank {rank}" for rank, key in enumerate(keys) if not store.check([key])]
        seconds = timeout.total_seconds()
        raise RankError(f"{listed(missing)} did not come in {seconds:.0f} s") from None
