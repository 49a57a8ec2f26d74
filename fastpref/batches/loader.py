"""From rows to batches: each step's micro-batches, prefetched in a thread."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any, NamedTuple

import datasets
import torch

from fastpref.batch import Batch
from fastpref.batches.columns import EncodedColumns
from fastpref.batches.layouts import RowLayout
from fastpref.batches.order import GlobalOrder
from fastpref.batches.plan import MicroBatch, StepPlan
from fastpref.batches.prefetch import prefetch
from fastpref.data.encode import PreferenceSplit
from fastpref.distributed import World


class StepBatches(NamedTuple):
    """Data of an optimizer step, with this rank's micro-batches."""

    num_examples: int
    """Rows of the step, over all ranks."""
    batches: list[Batch]
    """One per micro-batch, in host memory; equally many on every rank."""
    num_tokens: int
    """Tokens in the data, over all ranks: prompt + response of every sequence."""
    num_computed: int
    """Tokens that the model's body computes, over all ranks."""
    columns: EncodedColumns
    """Rows of the step, of all ranks."""
    micro_batches: list[MicroBatch]
    """Plan of this rank's batches: the rows of each."""

    @property
    def num_scored(self) -> int:
        """Response tokens in the loss, over all ranks."""
        return self.columns.num_scored

    @property
    def most_tokens(self) -> int:
        """Tokens of this rank's largest micro-batch with more than one row; 0 if there is none."""
        return max((x.num_tokens for x in self.micro_batches if len(x.rows) > 1), default=0)


@dataclass(frozen=True, kw_only=True)
class Loader:
    """A data split, the order it is visited in, and how its rows become batches."""

    data: PreferenceSplit
    order: GlobalOrder
    layout: RowLayout
    pad_token_id: int
    min_micro_batches: int = 1
    known: Callable[[EncodedColumns], EncodedColumns] | None = None
    """Adds precomputed log-probabilities of the reference to rows; None if there are none."""

    @cached_property
    def _table(self) -> datasets.Dataset:
        return self.data.dataset.with_format("arrow")

    def columns(self, index: int) -> EncodedColumns:
        """The rows of step `index`."""
        columns = EncodedColumns.of_arrow(self._table[self.order.batch(index)])
        return columns if self.known is None else self.known(columns)

    def plan(self, index: int, num_ranks: int) -> tuple[EncodedColumns, StepPlan]:
        """The rows of step `index`, and their assignment to micro-batches and ranks."""
        columns = self.columns(index)
        # avoid micro-batches in which no rank has a row
        most = max(1, -(-len(columns) // num_ranks))
        plan = self.layout.plan(
            columns,
            num_ranks=num_ranks,
            min_micro_batches=min(self.min_micro_batches, most),
        )
        return columns, plan

    def build(self, columns: EncodedColumns, micro_batch: MicroBatch) -> Batch:
        """Build the batch of a planned micro-batch."""
        batch = self.layout.build(columns, micro_batch, pad_token_id=self.pad_token_id)
        if columns.reference_logps is None:
            return batch
        # same order as `target`: the chosen responses of all rows, then the rejected ones
        scored = columns.responses(micro_batch.rows).flat()
        return replace(batch, reference_logps=torch.from_numpy(columns.reference_logps[scored]))

    def step(self, index: int, world: World) -> StepBatches:
        """Plan step `index` and build this rank's batches."""
        columns, plan = self.plan(index, world.data_size)
        micro_batches = [of_ranks[world.data_rank] for of_ranks in plan]
        return StepBatches(
            num_examples=len(columns),
            batches=self._build_all(columns, micro_batches, world),
            num_tokens=int(columns.num_tokens.sum()),
            num_computed=num_computed(plan),
            columns=columns,
            micro_batches=micro_batches,
        )

    def split(self, step: StepBatches, max_tokens: int, world: World) -> StepBatches:
        """The same step in micro-batches of at most `max_tokens`, except for single longer rows;
        for a single rank only."""
        columns, parts = step.columns, list[MicroBatch]()
        for micro_batch in step.micro_batches:
            is_large = micro_batch.num_tokens > max_tokens
            parts += (
                self.layout.split(columns, micro_batch, max_tokens) if is_large else [micro_batch]
            )
        return step._replace(
            batches=self._build_all(columns, parts, world),
            num_computed=sum(part.num_tokens for part in parts),
            micro_batches=parts,
        )

    def _build_all(
        self, columns: EncodedColumns, micro_batches: list[MicroBatch], world: World
    ) -> list[Batch]:
        batches = [self.build(columns, micro_batch) for micro_batch in micro_batches]
        if world.device.type == "cuda":
            return [batch.pin_memory() for batch in batches]
        return batches

    def steps(self, world: World, start: int = 0) -> AbstractContextManager[Iterator[StepBatches]]:
        """Iterate over the steps from `start`, prefetched in a thread."""
        return prefetch(lambda index: self.step(index, world), range(start, self.order.num_steps))

    def savings(self, num_ranks: int, num_steps: int) -> tuple[int, int]:
        """Tokens in the data, and tokens computed for them, over the first `num_steps` steps."""
        in_data, computed = 0, 0
        for index in range(num_steps):
            columns, plan = self.plan(index, num_ranks)
            in_data += int(columns.num_tokens.sum())
            computed += num_computed(plan)
        return in_data, computed


def num_computed(plan: StepPlan) -> int:
    """Tokens that the model's body computes in a planned step, over all ranks."""
    return sum(batch.num_tokens for of_ranks in plan for batch in of_ranks)


def pad_token_id(tokenizer: Any, num_embeddings: int) -> int:
    """Padding token: the tokenizer's padding token, else EOS, else 0. Never scored or attended to,
    but it is embedded, so its id must be below `num_embeddings`.

    Args:
        tokenizer: Its padding token may be missing in the model's embedding.
        num_embeddings: Rows of the model's embedding.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None and token_id < num_embeddings:
            return token_id
    return 0
