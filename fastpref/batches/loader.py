"""From rows to batches: what each step computes, made ahead of the loop in a thread."""

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
    """An optimizer step, and this rank's part of it."""

    num_examples: int
    """Over all ranks."""
    batches: list[Batch]
    """One a micro-batch, on the host; as many on every rank."""
    num_tokens: int
    """In the data, over all ranks: prompt + response of every sequence."""
    num_computed: int
    """That the model's body computes, over all ranks."""
    columns: EncodedColumns
    """The step's rows."""
    micro_batches: list[MicroBatch]
    """Which of them this rank's batches are of."""

    @property
    def num_scored(self) -> int:
        """Response tokens of its rows that are in the loss, over all ranks."""
        return self.columns.num_scored

    @property
    def most_tokens(self) -> int:
        """Tokens of this rank's largest micro-batch that has more than one row; 0 without any."""
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
    """Adds the reference's log-probabilities to rows; None where they are not known beforehand."""

    @cached_property
    def _table(self) -> datasets.Dataset:
        return self.data.dataset.with_format("arrow")

    def columns(self, index: int) -> EncodedColumns:
        """The rows of step `index`."""
        columns = EncodedColumns.of_arrow(self._table[self.order.batch(index)])
        return columns if self.known is None else self.known(columns)

    def plan(self, index: int, num_ranks: int) -> tuple[EncodedColumns, StepPlan]:
        """The rows of step `index`, and which of them each rank computes at once."""
        columns = self.columns(index)
        # a micro-batch in which no rank has a row would be computed for nothing
        most = max(1, -(-len(columns) // num_ranks))
        plan = self.layout.plan(
            columns,
            num_ranks=num_ranks,
            min_micro_batches=min(self.min_micro_batches, most),
        )
        return columns, plan

    def build(self, columns: EncodedColumns, micro_batch: MicroBatch) -> Batch:
        """The batch of a micro-batch of a plan."""
        batch = self.layout.build(columns, micro_batch, pad_token_id=self.pad_token_id)
        if columns.reference_logps is None:
            return batch
        # scored tokens lie as the responses do: chosen ones of all rows, then rejected ones
        scored = columns.responses(micro_batch.rows).flat()
        return replace(batch, reference_logps=torch.from_numpy(columns.reference_logps[scored]))

    def step(self, index: int, world: World) -> StepBatches:
        """What step `index` computes."""
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
        """The same step of one rank alone, in micro-batches that have at most so many tokens as
        far as their rows can be divided."""
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
        """The steps from `start` on, each ready before it is asked for."""
        return prefetch(lambda index: self.step(index, world), range(start, self.order.num_steps))

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


def pad_token_id(tokenizer: Any, num_embeddings: int) -> int:
    """What fills a row: the tokenizer's padding token, else EOS, else token 0. Never scored or
    attended to, but looked up all the same, so it has a row in the embedding.

    Args:
        tokenizer: Its padding token may have been added to it alone.
        num_embeddings: Rows of the model's embedding.
    """
    for token_id in (tokenizer.pad_token_id, tokenizer.eos_token_id):
        if token_id is not None and token_id < num_embeddings:
            return token_id
    return 0
