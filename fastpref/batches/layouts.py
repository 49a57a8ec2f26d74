"""The two ways in which rows lie in a batch; a run chooses one, and nothing else asks which."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import ClassVar, Protocol

import numpy as np

from fastpref.batch import Batch, EncodedRow
from fastpref.batches.columns import EncodedColumns
from fastpref.batches.filled import fill_up, filled_length
from fastpref.batches.packed import pack, pack_rows
from fastpref.batches.packing_plan import plan_step
from fastpref.batches.padded import pad, pad_rows
from fastpref.batches.plan import MicroBatch, StepPlan

CPU_TOKENS = 8192
"""Tokens of a micro-batch on a CPU, at most, where nobody says how many."""


class RowLayout(Protocol):
    """How rows become batches. Pure functions of the rows, so every rank makes the same plan."""

    @property
    def name(self) -> str:
        """In words."""

    @property
    def max_tokens(self) -> int:
        """Most tokens of a micro-batch; rows that cannot be divided may have more."""

    @property
    def shares_prompts(self) -> bool:
        """Whether both responses of a pair attend to one copy of its prompt."""

    @property
    def repeats_prompts(self) -> bool:
        """Whether some layers compute a shared prompt once for each response all the same."""

    def limited_to(self, max_tokens: int) -> "RowLayout":
        """The same layout with another limit."""

    def unfilled(self) -> "RowLayout":
        """The same layout without tokens that only make batches equally long."""

    def plan(self, columns: EncodedColumns, *, num_ranks: int, min_micro_batches: int) -> StepPlan:
        """Which of a step's rows each rank computes at once.

        Args:
            num_ranks: Ranks that share the step.
            min_micro_batches: Micro-batches of a rank, at least.
        """

    def divide(self, columns: EncodedColumns, *, most_tokens: int | None) -> list[list[int]]:
        """Which rows are computed at once where nobody says how many: for one rank.

        Args:
            columns: All rows.
            most_tokens: Of a batch, where the layout's own limit is higher; None for that limit.
        """

    def split(
        self, columns: EncodedColumns, micro_batch: MicroBatch, max_tokens: int
    ) -> list[MicroBatch]:
        """A micro-batch of the plan as several smaller ones, as far as its rows can be divided.

        Args:
            micro_batch: Which of them.
            max_tokens: Of each part.
        """

    def build(
        self, columns: EncodedColumns, micro_batch: MicroBatch, *, pad_token_id: int
    ) -> Batch:
        """The batch of a micro-batch of the plan."""

    def build_rows(self, rows: Sequence[EncodedRow], *, pad_token_id: int) -> Batch:
        """Rows as one batch, in their order; none of them is a batch too."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """One after another in one row, without padding between them."""

    share_prompt: bool
    """Compute what sequences of a micro-batch have in common once."""
    max_tokens: int
    """Most tokens of a micro-batch."""
    few_lengths: bool = False
    """Fill rows up to one of a few lengths, see `fill_up`."""
    among_rows: bool = True
    """Share prompts among pairs too. Where some layers compute a prompt once for each response all
    the same, a row of many pairs with one prompt would take them far more memory than its tokens
    say; of a pair it is less than twice as much."""

    @property
    def name(self) -> str:
        return "packed, prompts shared" if self.share_prompt else "packed"

    @property
    def shares_prompts(self) -> bool:
        return self.share_prompt

    @property
    def repeats_prompts(self) -> bool:
        return self.share_prompt and not self.among_rows

    def limited_to(self, max_tokens: int) -> "PackedRows":
        return replace(self, max_tokens=max_tokens)

    def unfilled(self) -> "PackedRows":
        return replace(self, few_lengths=False)

    def plan(self, columns: EncodedColumns, *, num_ranks: int, min_micro_batches: int) -> StepPlan:
        """As few micro-batches as the tokens allow, see `plan_step`."""
        plan = self._plan(
            columns, self.max_tokens, num_ranks=num_ranks, min_micro_batches=min_micro_batches
        )
        return [[self._filled(batch) for batch in of_ranks] for of_ranks in plan]

    def divide(self, columns: EncodedColumns, *, most_tokens: int | None) -> list[list[int]]:
        """By their tokens."""
        plan = self._plan(columns, min(self.max_tokens, most_tokens or self.max_tokens))
        return [batch.rows.tolist() for [batch] in plan]

    def split(
        self, columns: EncodedColumns, micro_batch: MicroBatch, max_tokens: int
    ) -> list[MicroBatch]:
        """By its tokens."""
        plan = self._plan(columns.take(micro_batch.rows), max_tokens)
        smaller = self.limited_to(max_tokens)
        return [smaller._filled(part._replace(rows=micro_batch.rows[part.rows])) for [part] in plan]

    def build(
        self, columns: EncodedColumns, micro_batch: MicroBatch, *, pad_token_id: int
    ) -> Batch:
        """One packed row, see `pack`."""
        batch = pack(
            columns, micro_batch, pad_token_id=pad_token_id, share_prompt=self.share_prompt
        )
        if not self.few_lengths:
            return batch
        return fill_up(batch, micro_batch.num_tokens, pad_token_id=pad_token_id)

    def build_rows(self, rows: Sequence[EncodedRow], *, pad_token_id: int) -> Batch:
        """One packed row."""
        batch = pack_rows(
            rows,
            pad_token_id=pad_token_id,
            share_prompt=self.share_prompt,
            among_rows=self.among_rows,
        )
        if not self.few_lengths:
            return batch
        length = self._length(batch.input_ids.shape[1])
        return fill_up(batch, length, pad_token_id=pad_token_id)

    def _plan(self, columns: EncodedColumns, max_tokens: int, **ranks: int) -> StepPlan:
        return plan_step(
            columns,
            max_tokens=max_tokens,
            share_prompt=self.share_prompt,
            among_rows=self.among_rows,
            **ranks,
        )

    def _filled(self, micro_batch: MicroBatch) -> MicroBatch:
        """A micro-batch of the plan as this layout builds it."""
        return micro_batch._replace(num_tokens=self._length(micro_batch.num_tokens))

    def _length(self, num_tokens: int) -> int:
        if not self.few_lengths:
            return num_tokens
        # one token stands in a row without any
        return filled_length(max(1, num_tokens), max_tokens=self.max_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedRows:
    """Beside each other, padded on the right."""

    max_tokens: int = CPU_TOKENS
    """Most tokens of a micro-batch, padding included."""
    batch_size: int = 4
    """Rows scored at once where nobody says how many, as in the TIS-DPO code."""
    name: ClassVar[str] = "padded"
    shares_prompts: ClassVar[bool] = False
    """Every sequence is a row of its own."""
    repeats_prompts: ClassVar[bool] = False

    def limited_to(self, max_tokens: int) -> "PaddedRows":
        return replace(self, max_tokens=max_tokens)

    def unfilled(self) -> "PaddedRows":
        return self

    def plan(self, columns: EncodedColumns, *, num_ranks: int, min_micro_batches: int) -> StepPlan:
        """As many rows in each, as few micro-batches as the tokens allow."""
        most = max(min_micro_batches, -(-len(columns) // num_ranks))
        # fewer have no room for the rows even without padding
        fewest = -(-int(columns.num_tokens.sum()) // (self.max_tokens * num_ranks))
        for num_micro_batches in range(min(max(min_micro_batches, fewest), most), most + 1):
            plan = [
                [_padded(columns, rows) for rows in np.array_split(of_ranks, num_ranks)]
                for of_ranks in np.array_split(np.arange(len(columns)), num_micro_batches)
            ]
            if max(batch.num_tokens for of_ranks in plan for batch in of_ranks) <= self.max_tokens:
                break
        return plan

    def divide(self, columns: EncodedColumns, *, most_tokens: int | None) -> list[list[int]]:
        """By their number."""
        return in_groups(len(columns), self.batch_size)

    def split(
        self, columns: EncodedColumns, micro_batch: MicroBatch, max_tokens: int
    ) -> list[MicroBatch]:
        """In parts of equally many rows."""
        num_rows = len(micro_batch.rows)
        # as if all were as long as the longest
        fitting = max(1, num_rows * max_tokens // micro_batch.num_tokens)
        parts = np.array_split(micro_batch.rows, -(-num_rows // fitting))
        return [_padded(columns, rows) for rows in parts]

    def build(
        self, columns: EncodedColumns, micro_batch: MicroBatch, *, pad_token_id: int
    ) -> Batch:
        """Right-padded rows, see `pad`."""
        return pad(columns, micro_batch.rows, pad_token_id=pad_token_id)

    def build_rows(self, rows: Sequence[EncodedRow], *, pad_token_id: int) -> Batch:
        """Right-padded rows."""
        return pad_rows(rows, pad_token_id=pad_token_id)


def in_groups(num_rows: int, size: int) -> list[list[int]]:
    """The numbers below `num_rows` in groups of `size`, the last of them as large as is left."""
    return [list(range(i, min(i + size, num_rows))) for i in range(0, num_rows, size)]


def _padded(columns: EncodedColumns, rows: np.ndarray) -> MicroBatch:
    prompts, chosen, rejected = (
        ranges.lengths[rows] for ranges in (columns.prompt, columns.chosen, columns.rejected)
    )
    longest = int((prompts + np.maximum(chosen, rejected)).max(initial=0))
    num_tokens = columns.num_sides * len(rows) * longest
    return MicroBatch(rows, rows, np.zeros_like(rows), num_tokens)
