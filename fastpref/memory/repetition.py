"""Recovery when memory runs out during training: retry with smaller micro-batches.

On a single rank only. With several, the other ranks wait inside a collective, so the run ends with
a message that names the option to set.
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
    """Retries work that ran out of memory in smaller parts.

    Args:
        num_ranks: Ranks that compute together.
        remedy: Option to recommend in messages; {most} stands for the number of tokens.
    """

    def __init__(self, *, num_ranks: int, remedy: str = "packing.max_tokens={most}") -> None:
        self._num_ranks = num_ranks
        self._remedy = remedy
        self.limit: int | None = None
        """Limit of tokens per part since memory ran out; None if it never did."""

    def compute(
        self,
        work: Work,
        function: Callable[[Work], Result],
        *,
        split: Callable[[Work, int], Work],
        size: Callable[[Work], int],
        undo: Callable[[], None] = lambda: None,
    ) -> tuple[Result, Work]:
        """Call `function(work)`, retrying with smaller parts while memory runs out.

        Args:
            work: Work in parts.
            function: Computes all parts, one after another.
            split: (work, limit) -> the same work in parts of at most `limit` tokens.
            size: Tokens of the largest part that can be divided; 0 if there is none.
            undo: Reverts side effects of a failed call.

        Returns:
            The result, and the work as it was divided for it.

        Raises:
            MemoryExhaustedError: no part can be divided further.
            RankMemoryError: memory ran out with several ranks.
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
            # after the except clause, which keeps the frames of the failed call alive
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
        """`function(items)`, one result per item, in one call or in as many as memory requires.

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
        half = size // 2
        if not half:
            # without gradients no activations are kept
            or_recomputed = ", activation_checkpointing=true" if torch.is_grad_enabled() else ""
            raise MemoryExhaustedError(
                f"out of memory in a single row; a smaller max_length{or_recomputed} or more GPUs "
                "need less"
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
    """Return unused memory to the system: garbage collection, CUDA cache, malloc arenas."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
    # glibc keeps freed memory in per-thread arenas; other C libraries have no malloc_trim
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
