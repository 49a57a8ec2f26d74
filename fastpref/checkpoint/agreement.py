"""Tasks that all ranks run together, over a separate process group: an error on one rank is raised
on every rank."""

import warnings
from collections.abc import Callable
from typing import Any, TypeVar

import torch.distributed as dist

from fastpref.distributed import World
from fastpref.errors import FastprefError, in_a_line, is_shortage

Result = TypeVar("Result")

EXPECTED_ERRORS = (FastprefError, OSError, RuntimeError, MemoryError)
"""Errors that a disk, a device or another rank can cause; anything else is a bug in fastpref."""


class AgreedError(Exception):
    """A task failed on at least one rank; the message is the same on all and names each.

    Args:
        text: The message.
        is_shortage: Whether some rank lacked memory or file descriptors; the same on all ranks.
    """

    def __init__(self, text: str, *, is_shortage: bool) -> None:
        super().__init__(text)
        self.is_shortage = is_shortage


class Agreement:
    """Exchange of small objects between ranks, over gloo.

    It has its own process group, so a thread may use it while the training loop uses the others.
    Every rank makes the same calls in the same order.

    Args:
        world: The ranks, and how long they wait for one another.
    """

    def __init__(self, world: World) -> None:
        self._world = world
        self.rank = world.rank
        self.size = world.size
        group = dist.new_group(backend="gloo", timeout=world.timeout)
        # new_group returns an int only to a rank that is no member; here every rank is one
        assert isinstance(group, dist.ProcessGroup)
        self.group = group
        if self.is_alone:
            # DCP warns with no_dist=True, which is what callers pass on one rank
            warnings.filterwarnings("ignore", "torch.distributed is disabled", UserWarning)

    @property
    def is_alone(self) -> bool:
        """Whether this is the only rank, so that DCP need not use gloo, whose threads copy tensors
        with OpenMP: from then on OpenMP's threads sleep while they wait, which costs 10 % of a
        step."""
        return self.size == 1

    def __enter__(self) -> "Agreement":
        return self

    def __exit__(self, *_: object) -> None:
        """Destroy the process group; no operation may be in flight."""
        dist.destroy_process_group(self.group)

    def each(self, task: Callable[[], Result]) -> list[Result]:
        """Run a task on every rank.

        Returns:
            The results of all ranks in rank order, on every rank.

        Raises:
            AgreedError: on every rank, if the task raised on any. A rank whose own error is not
                one of `EXPECTED_ERRORS` raises that error instead.
        """
        failure: Exception | None = None
        mine: tuple[Any, str | None, bool]
        try:
            mine = (task(), None, False)
        except Exception as error:
            failure = error
            mine = (None, describe(error), is_shortage(error))
        outcomes: list[Any] = [None] * self.size
        dist.all_gather_object(outcomes, mine, group=self.group)
        if failure is not None and not isinstance(failure, EXPECTED_ERRORS):
            raise failure
        reasons = {rank: reason for rank, (_, reason, _) in enumerate(outcomes) if reason}
        if reasons:
            text, lacks = name_ranks(reasons, self.size), any(lacks for *_, lacks in outcomes)
            raise AgreedError(text, is_shortage=lacks) from failure
        return [result for result, *_ in outcomes]

    def on_main(self, task: Callable[[], Result]) -> Result:
        """See `World.on_main`: rank 0 may read every byte of a checkpoint while the others wait."""
        return self._world.on_main(task)


def name_ranks(reasons: dict[int, str], world_size: int) -> str:
    """The ranks' error messages in one line; a message that all ranks share appears once."""
    shared = set(reasons.values())
    if len(reasons) == world_size and len(shared) == 1:
        return shared.pop()
    return "; ".join(f"rank {rank}: {reason}" for rank, reason in sorted(reasons.items()))


def describe(error: BaseException) -> str:
    """An error in one line, with its class if the message was not written for users."""
    if isinstance(error, FastprefError | OSError | AgreedError):
        return str(error)
    return in_a_line(error)
