"""From rows to batches: what each step computes, made ahead of the loop in a thread."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from types import TracebackType
from typing import Generic, NamedTuple, TypeVar

import datasets
import numpy as np

from fastpref.batch import PackedBatch, pad_rows
from fastpref.batches.columns import EncodedColumns
from fastpref.batches.order import GlobalOrder
from fastpref.batches.packed import MicroBatch, StepPlan, pack, plan_step
from fastpref.data.encode import PreferenceSplit
from fastpref.distributed import World

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """Results of `make`, computed in a thread up to `depth` ahead of whoever iterates.

    To be entered; leaving ends the thread, wherever the iteration stands and whatever was raised.
    An error in the thread is raised where its result was due.
    """

    def __init__(
        self, make: Callable[[int], Item], indices: Iterable[int], *, depth: int = 2
    ) -> None:
        self._make = make
        self._indices = indices
        self._results: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="fastpref-feed", daemon=True)

    def __enter__(self) -> Iterator[Item]:
        self._thread.start()
        return self._iterate()

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self._stopped.set()
        self._thread.join()

    def _iterate(self) -> Iterator[Item]:
        for _ in self._indices:
            result, error = self._results.get()
            if error is not None:
                raise error
            assert result is not None
            yield result

    def _work(self) -> None:
        for index in self._indices:
            try:
                result: tuple[Item | None, BaseException | None] = (self._make(index), None)
            except BaseException as error:
                result = (None, error)
            while not self._stopped.is_set():
                try:
                    self._results.put(result, timeout=0.1)
                    break
                except queue.Full:
                    pass
            if self._stopped.is_set() or result[1] is not None:
                return


class StepBatches(NamedTuple):
    """An optimizer step, and this rank's part of it."""

    num_examples: int
    """Over all ranks."""
    batches: list[PackedBatch]
    """One a micro-batch, on the host; as many on every rank."""
    num_tokens: int
    """In the data, over all ranks: prompt + response of every sequence."""
    num_computed: int
    """That the model's body computes, over all ranks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RowLayout:
    """How rows become batches."""

    packed: bool
    """False: right-padded rows, divided by number alone."""
    share_prompt: bool
    """Compute what sequences of a micro-batch have in common once; of packed rows."""
    max_tokens: int
    """Most tokens of a micro-batch; of packed rows."""
    pad_token_id: int

    def plan(self, columns: EncodedColumns, num_ranks: int, min_micro_batches: int) -> StepPlan:
        """Which rows of a step each rank computes at once."""
        if self.packed:
            return plan_step(
                columns,
                max_tokens=self.max_tokens,
                num_ranks=num_ranks,
                min_micro_batches=min_micro_batches,
                share_prompt=self.share_prompt,
            )
        longest = columns.prompt.lengths + np.maximum(
            columns.chosen.lengths, columns.rejected.lengths
        )

        def padded(rows: np.ndarray) -> MicroBatch:
            num_tokens = columns.num_sides * len(rows) * int(longest[rows].max(initial=0))
            return MicroBatch(rows, rows, np.zeros_like(rows), num_tokens)

        return [
            [padded(rows) for rows in np.array_split(of_ranks, num_ranks)]
            for of_ranks in np.array_split(np.arange(len(columns)), min_micro_batches)
        ]

    def build(self, columns: EncodedColumns, micro_batch: MicroBatch) -> PackedBatch:
        """The batch of a micro-batch of the plan."""
        if self.packed:
            return pack(
                columns,
                micro_batch,
                pad_token_id=self.pad_token_id,
                share_prompt=self.share_prompt,
            )
        rows = [columns.row(row) for row in micro_batch.rows.tolist()]
        return pad_rows(rows, pad_token_id=self.pad_token_id)


@dataclass(frozen=True, kw_only=True)
class Split:
    """A data split, the order it is visited in, and how its rows become batches."""

    data: PreferenceSplit
    order: GlobalOrder
    layout: RowLayout
    min_micro_batches: int = 1

    @cached_property
    def _table(self) -> datasets.Dataset:
        return self.data.dataset.with_format("arrow")

    def plan(self, index: int, num_ranks: int) -> tuple[EncodedColumns, StepPlan]:
        """The rows of step `index`, and which of them each rank computes at once."""
        rows = self.order.batch(index)
        columns = EncodedColumns.of_arrow(self._table[rows])
        # a micro-batch in which no rank has a row would be computed for nothing
        most = max(1, -(-len(columns) // num_ranks))
        return columns, self.layout.plan(columns, num_ranks, min(self.min_micro_batches, most))

    def step(self, index: int, world: World) -> StepBatches:
        """What step `index` computes."""
        columns, plan = self.plan(index, world.size)
        batches = [self.layout.build(columns, of_ranks[world.rank]) for of_ranks in plan]
        if world.device.type == "cuda":
            batches = [batch.pin_memory() for batch in batches]
        return StepBatches(
            num_examples=len(columns),
            batches=batches,
            num_tokens=int(columns.num_tokens.sum()),
            num_computed=num_computed(plan),
        )

    def steps(self, world: World) -> Prefetch[StepBatches]:
        """All steps one after another, each ready before it is asked for."""
        return Prefetch(lambda index: self.step(index, world), range(self.order.num_steps))

    def savings(self, num_ranks: int, num_steps: int) -> tuple[int, int]:
        """Tokens in the data and tokens computed for them, over the first steps."""
        in_data, computed = 0, 0
        for index in range(num_steps):
            columns, plan = self.plan(index, num_ranks)
            in_data += int(columns.num_tokens.sum())
            computed += num_computed(plan)
        return in_data, computed


def num_computed(plan: StepPlan) -> int:
    """Tokens that the model's body computes in a step, over all ranks."""
    return sum(batch.num_tokens for of_ranks in plan for batch in of_ranks)
