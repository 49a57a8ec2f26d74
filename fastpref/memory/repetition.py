"""What to do where memory ran out in the middle: less at once, and once more.

On one rank only. Among several one that fails leaves the others inside a collective, so the run
ends there, with the number to set.
"""

import ctypes
import gc
import logging
from collections.abc import Callable, Sequence
from typing import TypeVar

import torch

from fastpref.errors import MemoryExhaustedError, RankMemoryError, is_out_of_memory

logger = logging.getLogger("fastpref")

Work = TypeVar("Work")
Item = TypeVar("Item")
Result = TypeVar("Result")


class Repetition:
    """Computes what memory turned out not to hold again, in smaller parts.

    Args:
        num_ranks: Whoever computes together.
        remedy: What to set so that less is computed at once; {most} stands for the tokens.
    """

    def __init__(self, *, num_ranks: int, remedy: str = "packing.max_tokens={most}") -> None:
        self._num_ranks = num_ranks
        self._remedy = remedy
        self.limit: int | None = None
        """Tokens that may be computed at once since memory ran out; None: it never did."""

    def compute(
        self,
        work: Work,
        function: Callable[[Work], Result],
        *,
        split: Callable[[Work, int], Work],
        size: Callable[[Work], int],
        undo: Callable[[], None] = lambda: None,
    ) -> tuple[Result, Work]:
        """`function(work)`, repeated with work in smaller parts for as long as memory runs out.

        Args:
            work: What to compute.
            function: Computes it, part by part.
            split: The same work in parts of at most a limit.
            size: Tokens of the largest part that can be divided; 0 without any.
            undo: Takes back what a call that failed has left behind.

        Returns:
            That, and the work in the parts in which it was computed.

        Raises:
            MemoryExhaustedError: nothing can be divided any more.
            RankMemoryError: there are other ranks.
        """
        while True:
            if self.limit is not None and size(work) > self.limit:
                work = split(work, self.limit)
            try:
                return function(work), work
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                self._lower(size(work), error)
            # here, where nothing holds the frames of the failed call any more
            undo()
            release_memory()

    def compute_items(
        self,
        items: Sequence[Item],
        function: Callable[[Sequence[Item]], list[Result]],
        *,
        tokens: Callable[[Item], int],
        undo: Callable[[], None] = lambda: None,
    ) -> list[Result]:
        """`function(items)`, a result an item, of all at once or of as many as memory holds.

        Raises:
            MemoryExhaustedError, RankMemoryError: see `compute`.
        """

        def size(parts: list[Sequence[Item]]) -> int:
            return max((sum(map(tokens, part)) for part in parts if len(part) > 1), default=0)

        def split(parts: list[Sequence[Item]], most: int) -> list[Sequence[Item]]:
            halves: list[Sequence[Item]] = []
            for part in parts:
                middle = len(part) // 2
                fits = size([part]) <= most
                halves += [part] if fits else split([part[:middle], part[middle:]], most)
            return halves

        results, _ = self.compute(
            [items],
            lambda parts: [result for part in parts for result in function(part)],
            split=split,
            size=size,
            undo=undo,
        )
        return results

    def _lower(self, size: int, error: Exception) -> None:
        half = min(size // 2, self.limit or size)
        if not half:
            raise MemoryExhaustedError(
                "out of memory in a single row; a smaller max_length, "
                "activation_checkpointing=true or more GPUs need less"
            ) from error
        remedy = self._remedy.format(most=half)
        if self._num_ranks > 1:
            raise RankMemoryError(
                f"out of memory in {size:,} tokens at once; set {remedy}"
            ) from error
        self.limit = half
        logger.warning(
            "out of memory in %s tokens at once: computing them again, from here on at most %s at "
            "once, to the same result; %s starts with that",
            f"{size:,}",
            f"{half:,}",
            remedy,
        )


def release_memory() -> None:
    """Hand what is not used any more back to the system."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    # glibc keeps freed memory in an arena of each thread; other libraries have no such function
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
