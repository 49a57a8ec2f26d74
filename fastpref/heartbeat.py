"""Heartbeats, which identify the rank that died or hangs.

A failed collective says that a rank is missing, not which. So every rank keeps writing a heartbeat
to the shared store, and when it ends, the reason.
"""

import logging
import threading
import time

import torch
import torch.distributed as dist

from fastpref.checks import listed
from fastpref.distributed import LOOK_SECONDS, World, beat_key, end_key
from fastpref.errors import DistributedError, FastprefError, LostRankError, RankError, first_line
from fastpref.explanations import explain
from fastpref.signals import quit_saying

logger = logging.getLogger("fastpref")

ENDED = "ended"
"""Store key of the number of the first rank that ended."""
BEAT_SECONDS = 0.5
"""Interval between two heartbeats."""
SILENCE_SECONDS = 3.0
"""Time without a heartbeat after which a rank counts as killed or stopped."""
STORE_SECONDS = 5.0
"""Time allowed for the store to answer."""
QUERY_SECONDS, WATCH_SECONDS = 0.001, 1.0
"""Intervals between two polls of a GPU's event, and of the other ranks' state."""
LOST_SECONDS = 30.0
"""Time without a heartbeat after which a rank that a GPU may wait for counts as lost. If a
rank is lost or ended and the GPU stays busy for as long again, the process is ended: its host is
blocked."""


class Heartbeat:
    """While entered, a thread writes this rank's heartbeat to the shared store.

    Args:
        world: The ranks and their store.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self._ended = threading.Event()
        self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)

    def __enter__(self) -> "Heartbeat":
        if self._world.size > 1:
            self._thread.start()
            if self._world.device.type == "cuda":
                threading.Thread(target=self.end_if_stuck, name="watch", daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._ended.set()
        if self._world.size > 1:
            # with a limit: the thread may be blocked by a store that does not answer
            self._thread.join(2 * BEAT_SECONDS)

    def close(self, error: Exception) -> Exception:
        """Tell the other ranks why this one ends, or find out which of them was lost.

        Args:
            error: The exception that ended the task on this rank.

        Returns:
            The error to end with; this rank prints it if it does not end rank 0 as well.
        """
        if self._world.size == 1:
            return error
        known = explain(error)
        if isinstance(known, LostRankError):
            known = self.name_the_lost(known)
            if isinstance(known, RankError):
                return known
        self.say_why(known or error)
        if known is None:
            return error
        if self._world.is_main or known.is_own or self._rank_0_says_why():
            return known
        own = type(known)(f"rank {self._world.rank}: {known}")
        own.is_own = True
        return own

    def _rank_0_says_why(self) -> bool:
        """Whether rank 0 ends as well: an error that all ranks share ends it at the same time."""
        deadline = time.monotonic() + SILENCE_SECONDS + STORE_SECONDS
        try:
            while not self._world.look_up(end_key(0)):
                if time.monotonic() > deadline:
                    return False
                time.sleep(BEAT_SECONDS / 10)
        except (dist.DistError, RuntimeError):
            # rank 0 has ended, and the store with it
            pass
        return True

    def say_why(self, error: BaseException) -> None:
        """Tell the other ranks why this one ends; they may wait for it in a collective."""
        text = str(error) if isinstance(error, FastprefError) else type(error).__name__
        rank, store = self._world.rank, self._world.store
        try:
            store.set(end_key(rank), text or type(error).__name__)
            # kept if an earlier rank has set it
            store.compare_set(ENDED, "", str(rank))
        except (dist.DistError, RuntimeError):
            # the store ended with the rank that hosted it
            logger.debug("rank %d cannot say why it ends", rank)

    def name_the_lost(self, error: LostRankError) -> DistributedError:
        """The error that names the lost ranks: those that ended, or whose heartbeat stopped."""
        found: list[DistributedError] = []
        # in a thread: the process that hosts the store may be the one that hangs
        look = threading.Thread(target=lambda: found.append(self._look(error)), daemon=True)
        look.start()
        look.join(SILENCE_SECONDS + STORE_SECONDS)
        if found:
            return found[0]
        return RankError(f"rank 0, or what else has the ranks' store, does not answer; {error}")

    def _look(self, error: LostRankError) -> DistributedError:
        try:
            ended = self._reasons()
            silent = [] if ended else self._silent()
            # a rank that ended meanwhile may have said why
            ended = ended or self._reasons()
        except (dist.DistError, RuntimeError) as lost:
            return RankError(f"rank 0, or what else had the ranks' store, died: {first_line(lost)}")
        if ended:
            # printed already by those ranks, or by rank 0
            reasons = "; ".join(f"rank {rank} ended: {why}" for rank, why in ended.items())
            return self._settled(reasons, speaks=False)
        if silent:
            names = listed([f"rank {rank}" for rank in silent])
            text = f"{names} died or hangs, there is no sign of life; {error}"
            # printed by the first rank to find out: rank 0 may be waiting for a live one
            return self._settled(text, speaks=self._world.store.add("speakers", 1) == 1)
        return DistributedError(
            f"{error}; every rank is alive: one is late, or waits for what others skipped"
        )

    def _settled(self, text: str, *, speaks: bool) -> RankError:
        """The error this rank ends with, told to the others and printed here if it `speaks`."""
        error = RankError(text)
        error.is_own = speaks
        self.say_why(error)
        return error

    def _beat(self) -> None:
        count = 0
        try:
            # a connection of its own: on the shared one, `set` waits for another thread's `get`,
            # such as NCCL's for a communicator whose first rank is late
            store = self._world.store.clone()
            while not self._ended.wait(BEAT_SECONDS):
                count += 1
                store.set(beat_key(self._world.rank), str(count))
        except (dist.DistError, RuntimeError):
            return

    def end_if_stuck(self) -> None:
        """End the process if a rank has ended, the GPU waits for it, and the host for the GPU.

        Once the GPU's launch queue is full, the host blocks in the next kernel launch, where it
        neither polls nor runs signal handlers. Nothing is lost: the step is unfinished, and no
        checkpoint can be written without the other rank.
        """
        watch, idle = Watch(self._world), time.monotonic()
        while not self._ended.wait(WATCH_SECONDS):
            try:
                error = watch.look()
            except (dist.DistError, RuntimeError) as gone:
                error = LostRankError(f"the ranks' store is gone: {first_line(gone)}")
            if error is None or torch.cuda.default_stream(self._world.device).query():
                idle = time.monotonic()
            elif time.monotonic() - idle > LOST_SECONDS:
                cause = self.close(error)
                assert isinstance(cause, FastprefError)
                quit_saying(cause)

    def _others(self) -> list[int]:
        return [rank for rank in range(self._world.size) if rank != self._world.rank]

    def _reasons(self) -> dict[int, str]:
        reasons = {rank: self._world.look_up(end_key(rank)) for rank in self._others()}
        return {rank: reason for rank, reason in reasons.items() if reason}

    def _silent(self) -> list[int]:
        """Ranks without a heartbeat for `SILENCE_SECONDS` from now; some may end meanwhile."""
        look_up = self._world.look_up
        before = {rank: look_up(beat_key(rank)) for rank in self._others()}
        deadline = time.monotonic() + SILENCE_SECONDS
        silent = list(before)
        while silent and time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 2)
            silent = [rank for rank in silent if look_up(beat_key(rank)) == before[rank]]
        return silent


class Watch:
    """Polled by a waiting rank: whether any rank has ended, and whether the next one still lives.

    Args:
        world: The ranks and their store.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        # each rank watches one other, so that polling does not grow with the number of ranks
        self._watched, self._last = (world.rank + 1) % world.size, ""
        self._looked, self._silence = time.monotonic(), 0.0

    def look(self) -> DistributedError | None:
        """The error that names a rank that ended and why, or the next one as lost; else None."""
        world, now = self._world, time.monotonic()
        self._silence += min(now - self._looked, LOOK_SECONDS)
        self._looked = now
        first = world.look_up(ENDED)
        if first:
            return DistributedError(f"rank {first} ended: {world.look_up(end_key(int(first)))}")
        beat = world.look_up(beat_key(self._watched))
        if beat != self._last:
            self._last, self._silence = beat, 0.0
        elif self._silence > LOST_SECONDS:
            return LostRankError(f"a GPU waits, with no word of rank {self._watched}")
        return None


def await_device(world: World) -> None:
    """Wait for the work queued on this rank's GPU, before a result is copied to the host.

    When a rank has ended, the other GPUs wait in a collective forever. A host that copies a result
    would wait as long, and run no signal handler.

    Raises:
        DistributedError: a rank ended; which one, and why.
        LostRankError: the next rank's heartbeat stopped.
    """
    if world.size == 1 or world.device.type != "cuda":
        return
    done = torch.cuda.Event()
    done.record()
    watch, asked = Watch(world), time.monotonic()
    while not done.query():
        time.sleep(QUERY_SECONDS)
        if time.monotonic() - asked < WATCH_SECONDS:
            continue
        asked = time.monotonic()
        error = watch.look()
        if error is not None:
            raise error
