"""Log-probabilities of response tokens under one model, shard by shard, on every rank."""

import ctypes
import gc
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray

from fastpref.batch import EncodedRow, PackedBatch
from fastpref.batches.columns import EncodedColumns
from fastpref.batches.layouts import RowLayout, in_groups
from fastpref.config import ModelConfig, PackingConfig
from fastpref.data.source import Rows
from fastpref.data.weights_file import ModelOrigin
from fastpref.distributed import World
from fastpref.errors import CheckpointError, DataError
from fastpref.model.build import load_frozen_scorer, warn_beyond_training
from fastpref.model.scorer import TokenScorer
from fastpref.model.source import pad_token_id
from fastpref.progress import Progress
from fastpref.scoring.shards import PairLogps, Shards
from fastpref.signals import StopRequest

logger = logging.getLogger("fastpref")

LOG_SECONDS = 10.0
"""Time between two log lines where there is no terminal for a progress bar."""
CPU_TOKENS = 2048
"""Tokens scored at once on a CPU, at most: more take memory and are not faster."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two models."""

    label: str
    """positive or negative."""
    model: ModelConfig
    template: str
    """Text of its template, "" for none."""
    origin: ModelOrigin


@torch.no_grad()
def score_missing(
    side: Side,
    sources: Sequence[tuple[Rows, Shards]],
    world: World,
    *,
    tokenizer: Any,
    packing: PackingConfig,
    batch_size: int | None,
) -> None:
    """Score the shards that one model has not scored yet; it is loaded only if there are any.

    Args:
        side: The model.
        sources: Rows and the shards of this model for them.
        world: Who we are.
        tokenizer: For its padding token.
        packing: Whether rows are to be packed.
        batch_size: Rows scored at once; None leaves that to how rows are laid out.

    Raises:
        CheckpointError: a log-probability is not finite.
        InterruptionError, PreemptionError: a signal came.
    """
    # what rank 0 sees counts: another node may see the folder later
    missing = world.on_main(lambda: [shards.missing() for _, shards in sources])
    num_shards = sum(len(shards) for _, shards in sources)
    num_missing = sum(map(len, missing))
    if world.is_main and num_missing < num_shards:
        done = num_shards - num_missing
        logger.info("%s model: %d of %d shards are there already", side.label, done, num_shards)
    if num_missing == 0:
        return
    longest = max(
        len(ids.prompt_ids) + max(len(ids.chosen_ids), len(ids.rejected_ids))
        for _, shards in sources
        for ids in shards.rows
    )
    scorer, layout = load_frozen_scorer(side.model, packing, world, longest=longest)
    check_positions(scorer, side, sources)
    warn_beyond_training(scorer.model, longest)
    with (
        StopRequest() as stop,
        ScoringProgress(side, sources, missing, visible=world.is_main) as progress,
    ):
        ranks = Ranks(
            scorer=scorer,
            layout=layout,
            pad_token_id=pad_token_id(tokenizer, scorer.num_embeddings),
            world=world,
            stop=stop,
            progress=progress,
        )
        for (source, shards), shards_to_score in zip(sources, missing, strict=True):
            for shard in shards_to_score:
                places = shards.rows_of(shard)
                rows = [shards.rows[i] for i in places]
                parts = ranks.score_rows(rows, divide_rows(rows, layout, world.device, batch_size))
                check_finite(parts, places, source, side)
                logps = np.concatenate([x for pair in parts for x in pair])
                world.on_main(partial(shards.write, shard, logps))
                progress.shard_is_done()
    # before the second model is loaded, not when Python gets to it
    del scorer, ranks
    release_memory()


def release_memory() -> None:
    """Hand what is not used any more back to the system."""
    gc.collect()
    # glibc keeps freed memory in an arena of each thread; other libraries have no such function
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


def divide_rows(
    rows: Sequence[EncodedRow], layout: RowLayout, device: torch.device, batch_size: int | None
) -> list[list[int]]:
    """Which rows of a shard are scored at once; the same for any number of ranks."""
    if batch_size is not None:
        return in_groups(len(rows), batch_size)
    most_tokens = CPU_TOKENS if device.type == "cpu" else None
    return layout.divide(EncodedColumns.of_rows(rows), most_tokens=most_tokens)


@dataclass(frozen=True, slots=True, kw_only=True)
class Ranks:
    """A model on every rank, among which batches are dealt in turn."""

    scorer: TokenScorer
    layout: RowLayout
    """How it takes rows."""
    pad_token_id: int
    world: World
    stop: StopRequest
    progress: "ScoringProgress"
    """Told of every batch."""

    def score_rows(
        self, rows: Sequence[EncodedRow], batches: Sequence[Sequence[int]]
    ) -> list[PairLogps]:
        """Log-probabilities of the response tokens of every row: chosen, rejected, in nats.

        Args:
            rows: Of a shard.
            batches: Which of them are scored at once.

        Returns:
            On every rank those of all rows, in their order.

        Raises:
            InterruptionError, PreemptionError: a signal came.
        """
        world = self.world
        mine: list[tuple[int, PairLogps]] = []
        for first in range(0, len(batches), world.size):
            if self.stop.agreed(world):
                self.stop.raise_saying(
                    f"{self.progress.done} are kept; the same command goes on there"
                )
            dealt = batches[first : first + world.size]
            # a rank without a batch takes part in the collectives of sharded models all the same
            places = dealt[world.rank] if world.rank < len(dealt) else []
            batch = self.layout.build_rows(
                [rows[i] for i in places], pad_token_id=self.pad_token_id
            )
            logps_N = self.scorer(batch.to(world.device)).float().cpu().numpy()
            mine += zip(places, split_sequences(logps_N, batch), strict=True)
            self.progress.advance([rows[i] for batch_places in dealt for i in batch_places])
        gathered = [mine]
        if world.size > 1:
            gathered = [[] for _ in range(world.size)]
            dist.all_gather_object(gathered, mine)
        by_place = dict(pair for of_rank in gathered for pair in of_rank)
        return [by_place[i] for i in range(len(rows))]


def split_sequences(logps_N: NDArray[np.float32], batch: PackedBatch) -> list[PairLogps]:
    """Token scores of a batch as a pair of arrays per row: sequence p and P + p are one pair."""
    sequence_ids_N = batch.sequence_ids.cpu().numpy()
    in_order_N = logps_N[np.argsort(sequence_ids_N, kind="stable")]
    lengths = np.bincount(sequence_ids_N, minlength=batch.num_sequences)
    sequences = np.split(in_order_N, np.cumsum(lengths)[:-1])
    P = batch.num_sequences // 2
    return list(zip(sequences[:P], sequences[P : 2 * P], strict=True))


class ScoringProgress:
    """Tokens done, speed and time left: a bar on a terminal, a line now and then elsewhere."""

    def __init__(
        self,
        side: Side,
        sources: Sequence[tuple[Rows, Shards]],
        missing: Sequence[Sequence[int]],
        *,
        visible: bool,
    ) -> None:
        self._num_shards = sum(map(len, missing))
        self._num_done = 0
        self._label = f"{side.label} model"
        self._total = sum(
            part.num_tokens(shard)
            for (_, part), wanted in zip(sources, missing, strict=True)
            for shard in wanted
        )
        self._tokens = 0
        self._visible = visible
        self._started = self._told = time.perf_counter()
        self._bar = Progress(total=self._total, visible=visible, label=f"{self._label}, tokens")

    def __enter__(self) -> "ScoringProgress":
        self._bar.__enter__()
        return self

    def __exit__(self, *error: object) -> None:
        self._bar.__exit__(*error)

    @property
    def done(self) -> str:
        """How many shards of this start are on the disk, in words."""
        return f"{self._num_done} of {self._num_shards} shards of the {self._label}"

    def advance(self, rows: Sequence[EncodedRow]) -> None:
        """These rows are scored."""
        tokens = sum(
            2 * len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids) for row in rows
        )
        self._tokens += tokens
        now = time.perf_counter()
        rate = self._tokens / (now - self._started)
        self._bar.advance(tokens, f"{rate:,.0f} tokens/s")
        if self._visible and not self._bar.on_terminal and now - self._told > LOG_SECONDS:
            self._told = now
            logger.info(
                "%s: %d %% of %s tokens, %s tokens/s, %.0f s left",
                self._label,
                100 * self._tokens // self._total,
                f"{self._total:,}",
                f"{rate:,.0f}",
                (self._total - self._tokens) / rate,
            )

    def shard_is_done(self) -> None:
        """A shard is on the disk."""
        self._num_done += 1


def check_positions(
    scorer: TokenScorer, side: Side, sources: Sequence[tuple[Rows, Shards]]
) -> None:
    """Refuse rows that run off a table of positions.

    Raises:
        DataError: naming the file and the row.
    """
    limit = scorer.num_positions
    if limit is None:
        return
    for rows, shards in sources:
        for number, ids in zip(rows.dataset["row"], shards.rows, strict=True):
            length = len(ids.prompt_ids) + max(len(ids.chosen_ids), len(ids.rejected_ids))
            if length > limit:
                raise DataError(
                    f"{rows.source}:{number}: {length} tokens, {side.origin.name_or_path} has "
                    f"positions for {limit}; weights are estimated for whole rows, "
                    "so leave this one out"
                )


def check_finite(
    parts: Sequence[PairLogps],
    places: Sequence[int],
    rows: Rows,
    side: Side,
) -> None:
    """Refuse a model that gives NaN or infinity; runs on every rank with the same outcome.

    Args:
        parts: Of each row: chosen, rejected.
        places: Where these rows stand among the source's.
        rows: The source.
        side: The model.

    Raises:
        CheckpointError: naming the file, the row and the token.
    """
    for i, pair in zip(places, parts, strict=True):
        for field, logps in zip(("chosen", "rejected"), pair, strict=True):
            wrong = np.flatnonzero(~np.isfinite(logps))
            if len(wrong):
                raise CheckpointError(
                    f"weights.{side.label}: {side.origin.name_or_path} gives a log-probability of "
                    f"{logps[wrong[0]]} at {rows.source}:{rows.dataset['row'][i]}:{field}, token "
                    f"{wrong[0] + 1}; shards that were complete before are kept"
                )
