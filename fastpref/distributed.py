"""The ranks of a run: a single process, or those that a launcher started."""

import datetime
import itertools
import logging
import os
import pickle
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh

from fastpref.errors import DistributedError, FastprefError, RankError, first_line, in_a_line
from fastpref.explanations import explain
from fastpref.meeting import join_store, stores

logger = logging.getLogger("fastpref")

Result = TypeVar("Result")
Value = TypeVar("Value")

DATA = "data"
"""The mesh dimension along which a step's rows are sharded."""
TIMEOUT = datetime.timedelta(minutes=30)
"""How long ranks wait for one another by default."""
OWN_RUN_ID = "fastpref"
"""Run id of the torchrun that fastpref itself starts."""
# lower bound of the rendezvous timeout: ranks do not start at the same moment, however short a
# timeout of collectives the user sets
SHORTEST_MEETING = datetime.timedelta(minutes=1)
# rank 0 may download a model or tokenize a large dataset while the others wait
PREPARATION_TIMEOUT = datetime.timedelta(hours=12)
# rank 0 may host the store that tells the others of its failure: it stays until they have read it
FAREWELL_TIMEOUT = datetime.timedelta(seconds=30)
SHORTEST_PAUSE, LONGEST_PAUSE = 0.001, 0.1
"""Seconds between two polls of the store, doubled from the first value up to the second."""

LOOK_SECONDS = 3.0
"""Most that the time between two looks for a heartbeat counts as silence: a scheduler may have
suspended this process in between, and the other one with it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class World:
    """This process's rank and device, and how it communicates with the other ranks."""

    rank: int
    size: int
    device: torch.device
    mesh: DeviceMesh
    store: Any
    """Key-value store that all ranks share, for exchanges without a collective."""
    timeout: datetime.timedelta = TIMEOUT
    """How long a rank waits for the others in a collective."""
    _turns: Iterator[int] = field(default_factory=itertools.count)
    """Numbers the calls of `on_main`, which every rank makes in the same order, for their keys."""

    @property
    def is_main(self) -> bool:
        """Rank 0: the one that prints and writes."""
        return self.rank == 0

    @property
    def data_rank(self) -> int:
        """Index of the shard of a step's rows that this rank computes, in [0, data_size)."""
        return self.mesh.get_local_rank(DATA)

    @property
    def data_size(self) -> int:
        """Number of shards that a step's rows are divided into."""
        return self.mesh[DATA].size()

    def sum(self, values: Tensor) -> Tensor:
        """All-reduce (sum) in place on the device, without synchronizing the host with a GPU."""
        if self.size > 1:
            dist.all_reduce(values)
        return values

    def agree_max(self, value: int) -> int:
        """The maximum over ranks, by gloo on the CPU: no device synchronization."""
        if self.size == 1:
            return value
        highest = torch.tensor(value)
        dist.all_reduce(highest, op=dist.ReduceOp.MAX)
        return int(highest)

    def on_main(self, compute: Callable[[], Result]) -> Result:
        """Run `compute` on rank 0 and return its result, or raise its error, on every rank.

        No collective is pending while rank 0 works, so it may take hours.

        Args:
            compute: Called on rank 0 only; its result is pickled.

        Raises:
            FastprefError: the same on every rank.
            DistributedError: with exit code 1, on ranks other than 0, if rank 0 ran into a bug.
        """
        if self.size == 1:
            return compute()
        key = f"on_main {next(self._turns)}"
        if not self.is_main:
            return self._receive(key)
        try:
            result = compute()
            message = pickle.dumps((result, None))
        except BaseException as error:
            self.store.set(key, pickle.dumps((None, _failure(error))))
            self._see_off(key)
            raise
        self.store.set(key, message)
        return result

    def compare_on_main(self, value: Value, compute: Callable[[list[Value]], Result]) -> Result:
        """Gather every rank's value on rank 0 and return `compute` of their list on every rank.

        As in `on_main`, no collective is pending, not even while rank 0 waits for the values.

        Args:
            value: This rank's value; pickled.
            compute: Called on rank 0 only, with the values in rank order.

        Raises:
            FastprefError, DistributedError: see `on_main`.
        """
        turn = next(self._turns)
        keys = [f"value {turn} {rank}" for rank in range(self.size)]
        if not self.is_main:
            self.store.set(keys[self.rank], pickle.dumps(value))

        def gather() -> Result:
            values = [value]
            for rank in range(1, self.size):
                self._wait(keys[rank], PREPARATION_TIMEOUT, sender=rank)
                # safe to unpickle: written by a rank of this run
                values.append(pickle.loads(self.store.get(keys[rank])))
            return compute(values)

        return self.on_main(gather)

    def only_on_main(self, compute: Callable[[], Result]) -> Result | None:
        """Run `compute` on rank 0; its result is returned there only, its error raised on all.

        For results that cannot be pickled, or are too large to send.

        Raises:
            FastprefError, DistributedError: see `on_main`.
        """
        kept: list[Result] = []
        self.on_main(lambda: kept.append(compute()))
        return kept[0] if kept else None

    def wait_for_all(self) -> None:
        """Wait until every rank has called this: rank 0 may host the store that the others read."""
        # without a collective at first, which would time out: rank 0 may wait for a tracker
        self.compare_on_main(None, lambda _: None)
        self.agree_max(0)

    def _receive(self, key: str) -> Any:
        self._wait(key, PREPARATION_TIMEOUT, sender=0)
        # safe to unpickle: written by rank 0 of this run
        result, failure = pickle.loads(self.store.get(key))
        if failure is not None:
            self.store.set(f"{key} {self.rank}", "")
            raise failure
        return result

    def _see_off(self, key: str) -> None:
        """Wait until the others have read a failure: the store may end with rank 0."""
        for rank in range(1, self.size):
            try:
                self._wait(f"{key} {rank}", FAREWELL_TIMEOUT, sender=rank)
            except DistributedError:
                # that rank has already ended
                continue
            except dist.DistError as error:
                logger.error("not every rank heard of the failure: %s", first_line(error))
                return

    def _wait(self, key: str, timeout: datetime.timedelta, *, sender: int) -> None:
        """Wait until a key is in the store; signal handlers run meanwhile.

        Raises:
            DistributedError: `sender`, which is to set it, has ended or its heartbeat stopped.
            DistStoreError: it was not set within `timeout`.
        """
        started = asked = time.monotonic()
        silence, last, pause = 0.0, "", SHORTEST_PAUSE
        # polled: the store's own wait prints warnings when it times out
        while not self.store.check([key]):
            time.sleep(pause)
            pause = min(2 * pause, LONGEST_PAUSE)
            now = time.monotonic()
            if now - started > timeout.total_seconds():
                raise dist.DistStoreError(f"no word after {timeout.total_seconds():.0f} s")
            if now - asked < 1:
                continue
            silence += min(now - asked, LOOK_SECONDS)
            asked = now
            reason = self.look_up(end_key(sender))
            if reason and not self.store.check([key]):
                raise DistributedError(f"rank {sender} ended: {reason}")
            beat = self.look_up(beat_key(sender)) or last
            if beat != last:
                last, silence = beat, 0.0
            elif last and silence > self.timeout.total_seconds():
                raise DistributedError(
                    f"rank {sender} died or hangs: no sign of life for "
                    f"{self.timeout.total_seconds():.0f} s"
                )

    def look_up(self, key: str) -> str:
        """The text under a key of the store; "" if there is none."""
        return self.store.get(key).decode() if self.store.check([key]) else ""


def beat_key(rank: int) -> str:
    """Store key of a rank's heartbeat."""
    return f"beat {rank}"


def end_key(rank: int) -> str:
    """Store key of the reason why a rank ended."""
    return f"end {rank}"


def _failure(error: BaseException) -> FastprefError:
    """The error that the other ranks raise when rank 0 raised `error`."""
    known = explain(error)
    if known is None:
        known = DistributedError(f"rank 0 failed: {in_a_line(error)}")
        # a launcher may see any rank end first: all of them exit with the code of the cause
        known.exit_code = FastprefError.exit_code
    return known


def launched() -> bool:
    """Whether torchrun (or a scheduler that sets its variables) started this process."""
    return "RANK" in os.environ or "WORLD_SIZE" in os.environ


def told_where_to_meet() -> bool:
    """Whether the user's own torchrun started this process, rather than the one of fastpref."""
    return os.environ.get("TORCHELASTIC_RUN_ID", OWN_RUN_ID) != OWN_RUN_ID


def world_size() -> int:
    """The number of ranks of this run, read from the environment without any communication.

    Raises:
        RankError: the variables that torchrun sets contradict each other.
    """
    return read_ranks()[1] if launched() else 1


def read_ranks() -> tuple[int, int, int]:
    """RANK, WORLD_SIZE and LOCAL_RANK, as torchrun sets them.

    Raises:
        RankError: one of them is missing, not a number or out of range.
    """
    required = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    missing = [name for name in required if not os.environ.get(name)]
    if missing:
        given = ", ".join(f"{name}={os.environ[name]}" for name in required if name in os.environ)
        raise RankError(
            f"{' and '.join(missing)} must be set where {given} is; start with torchrun, which "
            "sets all of them, or unset them for one process"
        )
    size = _read_number("WORLD_SIZE", 1, None)
    rank = _read_number("RANK", 0, size)
    _read_number("MASTER_PORT", 1, 2**16)
    local_rank = _read_number("LOCAL_RANK", 0, None) if "LOCAL_RANK" in os.environ else 0
    return rank, size, local_rank


def _read_number(name: str, low: int, below: int | None) -> int:
    text = os.environ[name]
    if text.isdecimal() and low <= int(text) and (below is None or int(text) < below):
        return int(text)
    rule = f"a number >= {low}" if below is None else f"in [{low}, {below})"
    raise RankError(f"the environment variable {name} must be {rule}, got {text!r}")


def init_world(timeout: datetime.timedelta = TIMEOUT) -> World:
    """Join the process group: NCCL for tensors on GPUs, gloo for tensors on the CPU.

    Args:
        timeout: How long a rank waits for the others in a collective, and, if that is longer than
            `SHORTEST_MEETING`, in the rendezvous.

    Raises:
        RankError: torchrun's variables are wrong, or not every rank joined.
    """
    rank, size, local_rank = read_ranks() if launched() else (0, 1, 0)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", index_of_gpu(local_rank, torch.cuda.device_count()))
        torch.cuda.set_device(device)
    meeting = max(timeout, SHORTEST_MEETING)
    store = join_store(rank, size, meeting) if launched() else stores.HashStore()
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timeout)
    mesh = init_device_mesh(device.type, (size,), mesh_dim_names=(DATA,))
    shared = stores.PrefixStore("fastpref", store)
    return World(rank=rank, size=size, device=device, mesh=mesh, store=shared, timeout=timeout)


def index_of_gpu(local_rank: int, num_gpus: int) -> int:
    """Index of this rank's GPU among the visible ones; a scheduler may show each process only one.

    Raises:
        RankError: this machine has more ranks than visible GPUs.
    """
    if num_gpus == 1 and not dist.is_torchelastic_launched():
        return 0
    num_ranks = local_rank + 1
    if num_gpus > 1:
        # every local rank fails, else those with a GPU wait for the one without. Not so with one
        # GPU: torchrun --virtual-local-rank shows each rank its own, as number 0
        num_ranks = max(num_ranks, int(os.environ.get("LOCAL_WORLD_SIZE", "1")))
    if num_ranks > num_gpus:
        raise RankError(
            f"{num_ranks} ranks are on this machine and {num_gpus} of its GPUs visible; start at "
            "most one process a GPU"
        )
    return local_rank


def main_first(world: World, prepare: Callable[[], Result]) -> Result:
    """Run `prepare` on rank 0, then on the other ranks, which find its results in a cache.

    Args:
        prepare: Reads or tokenizes; it may write only a cache that a second call reads.

    Raises:
        FastprefError: raised by `prepare` on rank 0; the same on every rank.
    """
    prepared: list[Result] = []
    world.on_main(lambda: prepared.append(prepare()))
    return prepared[0] if world.is_main else prepare()
