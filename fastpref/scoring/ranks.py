"""Data-parallel scoring: batches of rows are dealt to the ranks in turn."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch.distributed as dist
from numpy.typing import NDArray

from fastpref.batch import Batch, EncodedRow
from fastpref.batches.columns import EncodedColumns
from fastpref.batches.layouts import RowLayout, in_groups
from fastpref.distributed import World
from fastpref.heartbeat import await_device
from fastpref.memory.repetition import Repetition
from fastpref.model.scorer import TokenScorer
from fastpref.scoring.progress import ScoringProgress
from fastpref.scoring.shards import PairLogps, num_tokens
from fastpref.signals import StopRequest


def repeat_scoring(world: World, batch_size: int | None) -> Repetition:
    """The out-of-memory retry policy; its message names the option that sets the batch size."""
    by_tokens = "packing.max_tokens={most}"
    remedy = by_tokens if batch_size is None else "a smaller weights.batch_size"
    return Repetition(num_ranks=world.size, remedy=remedy)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """Scores rows on all ranks; batches are dealt to the ranks in turn."""

    scorer: TokenScorer
    layout: RowLayout
    """How the scorer takes rows: packed or padded."""
    pad_token_id: int
    world: World
    stop: StopRequest
    progress: ScoringProgress
    """Advanced after every round of batches."""
    repetition: Repetition
    """Retry policy for running out of memory."""
    batch_size: int | None
    """Rows per batch; None: chosen by the layout."""

    @property
    def kept(self) -> str:
        """What is kept of a scoring that is stopped, for the message."""
        return f"{self.progress.done} are kept; the same command goes on there"

    def score_rows(self, rows: Sequence[EncodedRow]) -> list[PairLogps]:
        """Per-token log-probabilities of every row's responses, in nats.

        Args:
            rows: The rows of one shard.

        Returns:
            The (chosen, rejected) arrays of every row, in order, the same on every rank.

        Raises:
            InterruptionError, PreemptionError: a stop signal arrived, or the deadline is near.
        """
        world, batches = self.world, self._divide(rows)
        mine: list[tuple[int, PairLogps]] = []
        for first in range(0, len(batches), world.size):
            if self.stop.agreed(world):
                self.stop.raise_saying(self.kept)
            dealt = batches[first : first + world.size]
            # a rank without a batch still has to join the collectives of a sharded model
            places = dealt[world.rank] if world.rank < len(dealt) else []
            scored = self.repetition.compute_items(
                [rows[i] for i in places],
                self._score,
                tokens=lambda row: sum(map(len, row[:3])),
                undo=self.scorer.release,
            )
            mine += zip(places, scored, strict=True)
            done = (rows[i] for batch_places in dealt for i in batch_places)
            self.progress.advance(sum(map(num_tokens, done)))
        gathered = [mine]
        if world.size > 1:
            gathered = [[] for _ in range(world.size)]
            dist.all_gather_object(gathered, mine)
        by_place = dict(pair for of_rank in gathered for pair in of_rank)
        return [by_place[i] for i in range(len(rows))]

    def _divide(self, rows: Sequence[EncodedRow]) -> list[list[int]]:
        """Row indices of each batch; the same for any number of ranks."""
        if self.batch_size is not None:
            return in_groups(len(rows), self.batch_size)
        return self.layout.divide(EncodedColumns.of_rows(rows))

    def _score(self, rows: Sequence[EncodedRow]) -> list[PairLogps]:
        """Score one batch of rows."""
        batch = self.layout.build_rows(rows, pad_token_id=self.pad_token_id)
        logps_N = self.scorer(batch.to(self.world.device)).float()
        await_device(self.world)
        return split_sequences(logps_N.cpu().numpy(), batch)


def split_sequences(logps_N: NDArray[np.float32], batch: Batch) -> list[PairLogps]:
    """Split a batch's token scores into a pair of arrays per row: sequences p and P + p."""
    sequence_ids_N = batch.sequence_ids.cpu().numpy()
    in_order_N = logps_N[np.argsort(sequence_ids_N, kind="stable")]
    lengths = np.bincount(sequence_ids_N, minlength=batch.num_sequences)
    sequences = np.split(in_order_N, np.cumsum(lengths)[:-1])
    P = batch.num_sequences // 2
    return list(zip(sequences[:P], sequences[P : 2 * P], strict=True))
