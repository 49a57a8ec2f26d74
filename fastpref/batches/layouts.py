"""The two layouts of rows in a batch, packed and padded, behind one interface."""

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

CPU_TOKENS = 2048
"""Default limit of tokens per micro-batch on a CPU: more take more memory and are no faster."""
GPU_TOKENS = 8192
"""The same on a GPU, as long as what its memory holds has not been measured."""
PADDED_ROWS = 4
"""Rows per batch of padded rows without a given batch size, as in the TIS-DPO code."""


class RowLayout(Protocol):
    """How rows become batches. Pure functions of the rows, so every rank makes the same plan."""

    @property
    def name(self) -> str:
        """Name for logs and tables."""

    @property
    def max_tokens(self) -> int:
        """Maximum tokens per micro-batch; exceeded only by rows that cannot be divided."""

    @property
    def share_prompt(self) -> bool:
        """Whether both responses of a pair attend to one copy of its prompt."""

    @property
    def repeats_prompts(self) -> bool:
        """Whether some layers still compute a shared prompt once per response."""

    def limited_to(self, max_tokens: int) -> "RowLayout":
        """The same layout with another limit."""

    def unfilled(self) -> "RowLayout":
        """The same layout without padding to fixed lengths."""

    def plan(self, columns: EncodedColumns, *, num_ranks: int, min_micro_batches: int) -> StepPlan:
        """Assign a step's rows to micro-batches and ranks.

        Args:
            num_ranks: Data-parallel ranks.
            min_micro_batches: Minimum number of micro-batches per rank.
        """

    def divide(self, columns: EncodedColumns) -> list[list[int]]:
        """Divide all rows into batches of one rank, without a given batch size."""

    def split(
        self, columns: EncodedColumns, micro_batch: MicroBatch, max_tokens: int
    ) -> list[MicroBatch]:
        """Split a micro-batch into smaller ones; a single row is not divided further.

        Args:
            micro_batch: Micro-batch of a plan of these columns.
            max_tokens: Maximum tokens of each part.
        """

    def build(
        self, columns: EncodedColumns, micro_batch: MicroBatch, *, pad_token_id: int
    ) -> Batch:
        """Build the batch of a planned micro-batch."""

    def build_rows(self, rows: Sequence[EncodedRow], *, pad_token_id: int) -> Batch:
        """Build one batch of the rows, in their order; `rows` may be empty."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedRows:
    """Sequences concatenated in one row, without padding between them."""

    share_prompt: bool
    """Compute prefixes common to several sequences of a micro-batch once."""
    max_tokens: int
    """Maximum tokens per micro-batch."""
    few_lengths: bool = False
    """Pad rows to one of a few lengths, see `fill_up`."""
    among_rows: bool = True
    """Share prompts between pairs too, not only within a pair. Should be off where some layers
    compute a prompt once per response: there many pairs with one prompt would take far more memory
    than their token count suggests, a single pair less than twice as much."""

    @property
    def name(self) -> str:
        return "packed, prompts shared" if self.share_prompt else "packed"

    @property
    def repeats_prompts(self) -> bool:
        return self.share_prompt and not self.among_rows

    def limited_to(self, max_tokens: int) -> "PackedRows":
        return replace(self, max_tokens=max_tokens)

    def unfilled(self) -> "PackedRows":
        return replace(self, few_lengths=False)

    def plan(self, columns: EncodedColumns, *, num_ranks: int, min_micro_batches: int) -> StepPlan:
        """Plan as few micro-batches as the token limit allows, see `plan_step`."""
        plan = self._plan(
            columns, self.max_tokens, num_ranks=num_ranks, min_micro_batches=min_micro_batches
        )
        return [[self._filled(batch) for batch in of_ranks] for of_ranks in plan]

    def divide(self, columns: EncodedColumns) -> list[list[int]]:
        """Divide by number of tokens."""
        plan = self._plan(columns, self.max_tokens)
        return [batch.rows.tolist() for [batch] in plan]

    def split(
        self, columns: EncodedColumns, micro_batch: MicroBatch, max_tokens: int
    ) -> list[MicroBatch]:
        """Split by number of tokens."""
        plan = self._plan(columns.take(micro_batch.rows), max_tokens)
        smaller = self.limited_to(max_tokens)
        return [smaller._filled(part._replace(rows=micro_batch.rows[part.rows])) for [part] in plan]

    def build(
        self, columns: EncodedColumns, micro_batch: MicroBatch, *, pad_token_id: int
    ) -> Batch:
        """Build one packed row, see `pack`."""
        batch = pack(
            columns, micro_batch, pad_token_id=pad_token_id, share_prompt=self.share_prompt
        )
        if not self.few_lengths:
            return batch
        return fill_up(batch, micro_batch.num_tokens, pad_token_id=pad_token_id)

    def build_rows(self, rows: Sequence[EncodedRow], *, pad_token_id: int) -> Batch:
        """Build one packed row."""
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
        """The micro-batch with the number of tokens that `build` pads it to."""
        return micro_batch._replace(num_tokens=self._length(micro_batch.num_tokens))

    def _length(self, num_tokens: int) -> int:
        if not self.few_lengths:
            return num_tokens
        # an empty row is built as one padding token
        return filled_length(max(1, num_tokens), max_tokens=self.max_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class PaddedRows:
    """One sequence per row, padded on the right."""

    max_tokens: int = CPU_TOKENS
    """Maximum tokens per micro-batch, padding included."""
    name: ClassVar[str] = "padded"
    share_prompt: ClassVar[bool] = False
    """Always False: every sequence is a row of its own."""
    repeats_prompts: ClassVar[bool] = False

    def limited_to(self, max_tokens: int) -> "PaddedRows":
        return replace(self, max_tokens=max_tokens)

    def unfilled(self) -> "PaddedRows":
        return self

    def plan(self, columns: EncodedColumns, *, num_ranks: int, min_micro_batches: int) -> StepPlan:
        """Plan as few micro-batches as the token limit allows; their row counts differ by <= 1."""
        most = max(min_micro_batches, -(-len(columns) // num_ranks))
        # lower bound: fewer could not hold the tokens even without padding
        fewest = -(-int(columns.num_tokens.sum()) // (self.max_tokens * num_ranks))
        for num_micro_batches in range(min(max(min_micro_batches, fewest), most), most + 1):
            plan = [
                [_padded(columns, rows) for rows in np.array_split(of_ranks, num_ranks)]
                for of_ranks in np.array_split(np.arange(len(columns)), num_micro_batches)
            ]
            if max(batch.num_tokens for of_ranks in plan for batch in of_ranks) <= self.max_tokens:
                break
        return plan

    def divide(self, columns: EncodedColumns) -> list[list[int]]:
        """Divide by number of rows, `PADDED_ROWS`."""
        return in_groups(len(columns), PADDED_ROWS)

    def split(
        self, columns: EncodedColumns, micro_batch: MicroBatch, max_tokens: int
    ) -> list[MicroBatch]:
        """Split into parts of equally many rows."""
        num_rows = len(micro_batch.rows)
        # upper bound: every row padded to the longest of the whole micro-batch
        fitting = max(1, num_rows * max_tokens // micro_batch.num_tokens)
        parts = np.array_split(micro_batch.rows, -(-num_rows // fitting))
        return [_padded(columns, rows) for rows in parts]

    def build(
        self, columns: EncodedColumns, micro_batch: MicroBatch, *, pad_token_id: int
    ) -> Batch:
        """Build right-padded rows, see `pad`."""
        return pad(columns, micro_batch.rows, pad_token_id=pad_token_id)

    def build_rows(self, rows: Sequence[EncodedRow], *, pad_token_id: int) -> Batch:
        """Build right-padded rows."""
        return pad_rows(rows, pad_token_id=pad_token_id)


def in_groups(num_rows: int, size: int) -> list[list[int]]:
    """Divide range(num_rows) into consecutive groups of `size`; the last may be smaller."""
    return [list(range(i, min(i + size, num_rows))) for i in range(0, num_rows, size)]


def _padded(columns: EncodedColumns, rows: np.ndarray) -> MicroBatch:
    prompts, chosen, rejected = (
        ranges.lengths[rows] for ranges in (columns.prompt, columns.chosen, columns.rejected)
    )
    longest = int((prompts + np.maximum(chosen, rejected)).max(initial=0))
    num_tokens = columns.num_sides * len(rows) * longest
    return MicroBatch(rows, rows, np.zeros_like(rows), num_tokens)
