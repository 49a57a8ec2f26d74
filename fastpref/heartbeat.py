"""Which rank died or hangs: every one says in the ranks' store that it lives, and why it ended.

A collective that fails says that somebody is missing, not who.
"""

import logging
import threading
import time

import torch
import torch.distributed as dist

from fastpref.checks import listed
from fastpref.distributed import World, beat_key, end_key
from fastpref.errors import DistributedError, FastprefError, LostRankError, RankError, first_line
from fastpref.explanations import explain
from fastpref.signals import quit_saying

logger = logging.getLogger("fastpref")

ENDED = "ended"
"""Where the first rank that ends says its number."""
BEAT_SECONDS = 0.5
"""Between two beats."""
SILENCE_SECONDS = 3.0
"""Without a beat: a rank that was killed or stopped."""
STORE_SECONDS = 5.0
"""For the store to answer."""
QUERY_SECONDS, WATCH_SECONDS = 0.001, 1.0
"""Between two questions whether a GPU is done, and how the other ranks are."""
LOST_SECONDS = 30.0
"""Without a beat of a rank that a GPU may be waiting for; and until a host that does not hear of it
is ended."""


class Heartbeat:
    """While entered, this rank's beats go to the store, from a thread.

    Args:
        world: The ranks, and the store that they share.
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
            # no longer: it may be held by a store that does not answer
            self._thread.join(2 * BEAT_SECONDS)

    def close(self, error: Exception) -> Exception:
        """Say to the others why this rank ends, or find out which of them is lost.

        Args:
            error: That ended the task of this rank.

        Returns:
            What it ends with; of an error that rank 0 has no word for, this rank says it.
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
        """Whether rank 0 ends as well: whatever is everybody's ends it at the same time."""
        deadline = time.monotonic() + SILENCE_SECONDS + STORE_SECONDS
        try:
            while not self._world.look_up(end_key(0)):
                if time.monotonic() > deadline:
                    return False
                time.sleep(BEAT_SECONDS / 10)
        except (dist.DistError, RuntimeError):
            # it has left, and taken the store along
            pass
        return True

    def say_why(self, error: BaseException) -> None:
        """Tell the others why this rank ends; they may wait for it in a collective."""
        text = str(error) if isinstance(error, FastprefError) else type(error).__name__
        rank, store = self._world.rank, self._world.store
        try:
            store.set(end_key(rank), text or type(error).__name__)
            # of the first one
            store.compare_set(ENDED, "", str(rank))
        except (dist.DistError, RuntimeError):
            # the store went with another rank
            logger.debug("rank %d cannot say why it ends", rank)

    def name_the_lost(self, error: LostRankError) -> DistributedError:
        """The error with the ranks that it is about: those that ended, or those that are silent."""
        found: list[DistributedError] = []
        # in a thread: whoever has the store may be the one that hangs
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
        except (dist.DistError, RuntimeError) as lost:
            return RankError(f"rank 0, or what else had the ranks' store, died: {first_line(lost)}")
        if ended:
            # they have said so, or rank 0 does
            reasons = "; ".join(f"rank {rank} ended: {why}" for rank, why in ended.items())
            return self._settled(reasons, speaks=False)
        if silent:
            names = listed([f"rank {rank}" for rank in silent])
            text = f"{names} died or hangs, there is no sign of life; {error}"
            # the first that knows: rank 0 may wait for one that is there
            return self._settled(text, speaks=self._world.store.add("speakers", 1) == 1)
        return DistributedError(
            f"{error}; every rank is alive: one is late, or waits for what others skipped"
        )

    def _settled(self, text: str, *, speaks: bool) -> RankError:
        """What this rank ends with, and the others know of."""
        error = RankError(text)
        error.is_own = speaks
        self.say_why(error)
        return error

    def _beat(self) -> None:
        count = 0
        while not self._ended.wait(BEAT_SECONDS):
            count += 1
            try:
                self._world.store.set(beat_key(self._world.rank), str(count))
            except (dist.DistError, RuntimeError):
                return

    def end_if_stuck(self) -> None:
        """End the process where a rank has ended, the GPU waits for it, and the host for the GPU.

        A host launches as many kernels as a queue takes, then waits in the next launch, where it
        asks for nothing and hears no signal. There is nothing to save: a step is not done, and no
        checkpoint is made without the other rank.
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
        """Ranks that do not beat while this one listens; one may say meanwhile why it ended."""
        look_up = self._world.look_up
        before = {rank: look_up(beat_key(rank)) for rank in self._others()}
        deadline = time.monotonic() + SILENCE_SECONDS
        silent = list(before)
        while silent and time.monotonic() < deadline:
            time.sleep(BEAT_SECONDS / 2)
            silent = [rank for rank in silent if look_up(beat_key(rank)) == before[rank]]
        return silent


class Watch:
    """What a rank looks at while it waits: whether one has ended, and another's beats.

    Args:
        world: The ranks, and the store that they share.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        # each rank looks after one, whatever their number
        self._watched, self._last = (world.rank + 1) % world.size, ""
        self._heard = time.monotonic()

    def look(self) -> DistributedError | None:
        """That a rank ended, which one and why; or that the next one shows no sign of life."""
        world, now = self._world, time.monotonic()
        first = world.look_up(ENDED)
        if first:
            return DistributedError(f"rank {first} ended: {world.look_up(end_key(int(first)))}")
        beat = world.look_up(beat_key(self._watched))
        if beat != self._last:
            self._last, self._heard = beat, now
        elif now - self._heard > LOST_SECONDS:
            return LostRankError(f"a GPU waits, with no word of rank {self._watched}")
        return None


def await_device(world: World) -> None:
    """Wait for what a GPU computes, before a number of it is fetched.

    A rank that has ended leaves the others' GPUs in a collective without end. Whoever fetches a
    number then waits as long, and hears no signal.

    Raises:
        DistributedError: a rank ended; which one, and why.
        LostRankError: the next one shows no sign of life.
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
