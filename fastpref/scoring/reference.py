"""The reference of a run, scored before its first step: no second model, no pass of it later."""

import logging
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from fastpref.batches.columns import EncodedColumns
from fastpref.batches.loader import Loader, StepBatches
from fastpref.batches.prefetch import Prefetch
from fastpref.distributed import World
from fastpref.errors import CheckpointError
from fastpref.memory.repetition import Repetition
from fastpref.model.own_reference import beginning_of
from fastpref.model.scorer import TokenScorer
from fastpref.scoring.progress import ScoringProgress
from fastpref.scoring.row_cache import RowCache
from fastpref.signals import StopRequest

logger = logging.getLogger("fastpref")

ROWS_OF_A_FILE = 256
"""Rows between two savings: what a kill costs at most."""


class Visits(NamedTuple):
    """Steps of a loader whose rows are missing."""

    loader: Loader
    steps: list[int]
    num_tokens: int
    """Of all their rows."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceScoring:
    """Scores what a cache lacks of a run's rows, in the micro-batches in which they are trained on.

    So a row's numbers are those of a reference that computes in the step that first sees it, to
    the last bit, and equal models start at a log-ratio of exactly zero.
    """

    policy: TokenScorer
    """As training starts from it."""
    cache: RowCache
    world: World
    repetition: Repetition
    """What to do where memory runs out."""
    about: dict[str, Any]
    """What the numbers belong to, in words."""

    def complete(self, loaders: Sequence[Loader]) -> None:
        """Score and save every row that is missing.

        Args:
            loaders: Of all rows that the run reads.

        Raises:
            CheckpointError: a log-probability is not finite, or a file cannot be written.
            InterruptionError, PreemptionError: a signal came; what was scored is kept.
        """
        visible = self.world.is_main
        visits = list(self._visits(loaders))
        num_tokens = sum(visit.num_tokens for visit in visits)
        if not num_tokens:
            if visible:
                logger.info("reference: all rows are in %s", self.cache.folder)
            return
        if visible:
            logger.info("reference: rows that %s lacks are scored once", self.cache.folder)
        with (
            StopRequest() as stop,
            ScoringProgress("reference", num_tokens, visible=visible) as progress,
        ):
            for visit in visits:
                self._score_visit(visit, stop, progress)
        self._save()

    def _visits(self, loaders: Sequence[Loader]) -> Iterator[Visits]:
        """The first steps that see what is missing."""
        seen = set[bytes]()
        for loader in loaders:
            steps, num_tokens = [], 0
            for index in range(loader.order.num_steps):
                columns = loader.columns(index)
                missing = self.cache.missing(columns)
                if missing - seen:
                    steps.append(index)
                    num_tokens += int(columns.num_tokens.sum())
                    seen |= missing
            yield Visits(loader, steps, num_tokens)

    def _score_visit(self, visit: Visits, stop: StopRequest, progress: ScoringProgress) -> None:
        """A loader's steps, as they are trained on."""
        loader, world = visit.loader, self.world
        with Prefetch(lambda index: loader.step(index, world), visit.steps) as steps:
            for index, step in zip(visit.steps, steps, strict=True):
                if stop.agreed(world):
                    self._save()
                    stop.raise_saying(
                        f"rows that were scored are kept in {self.cache.folder}; the same command "
                        "goes on there"
                    )
                self._score(loader, index, step)
                progress.advance(step.num_tokens)
                if self.cache.num_unsaved >= ROWS_OF_A_FILE:
                    self._save()

    @torch.no_grad()
    def _score(self, loader: Loader, index: int, step: StepBatches) -> None:
        """A step's rows, on every rank its own, put together on all of them."""
        world, columns = self.world, step.columns
        parts, computed = self.repetition.compute(
            step,
            self._logps,
            split=lambda batches, limit: loader.split(batches, limit, world),
            size=lambda batches: batches.most_tokens,
            undo=self.policy.release,
        )
        logps = torch.zeros(len(columns.ids), device=world.device)
        for micro_batch, part_N in zip(computed.micro_batches, parts, strict=True):
            scored = torch.from_numpy(columns.responses(micro_batch.rows).flat())
            logps[scored.to(world.device)] = part_N
        values = world.sum(logps).cpu().numpy()
        self._check(loader, index, columns, values)
        self.cache.add(columns, values)

    def _logps(self, step: StepBatches) -> list[Tensor]:
        """(N,) of each micro-batch."""
        reference, parts = beginning_of(self.policy), []
        for batch in step.batches:
            logps_N = reference(batch.to(self.world.device))
            assert isinstance(logps_N, Tensor)
            parts.append(logps_N)
            self.policy.release()
        return parts

    def _check(
        self, loader: Loader, index: int, columns: EncodedColumns, logps: NDArray[np.float32]
    ) -> None:
        """Refuse NaN and infinity, with the same outcome on every rank."""
        if np.isfinite(logps).all():
            return
        self._save()
        for i, row in enumerate(loader.order.batch(index).tolist()):
            for side in ("chosen", "rejected"):
                of_side = getattr(columns, side).take(np.array([i])).flat()
                wrong = np.flatnonzero(~np.isfinite(logps[of_side]))
                if len(wrong):
                    raise CheckpointError(
                        f"the reference gives a log-probability of {logps[of_side[wrong[0]]]} at "
                        f"{loader.data.places.name(row)}:{side}, token {wrong[0] + 1}; rows that "
                        "were scored before are kept"
                    )

    def _save(self) -> None:
        unsaved = self.cache.take_unsaved()
        if unsaved:
            self.world.on_main(lambda: self.cache.write(unsaved, self.about))
