"""Reference log-probabilities, scored by the policy itself before the first training step.

No second model is held in memory, and no training step runs a reference forward.
"""

import contextlib
import logging
import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from fastpref.batches.loader import Loader, StepBatches
from fastpref.batches.prefetch import prefetch
from fastpref.deadline import Deadline
from fastpref.distributed import World
from fastpref.errors import CheckpointError
from fastpref.heartbeat import await_device
from fastpref.memory.repetition import Repetition
from fastpref.model.own_reference import beginning_of
from fastpref.model.scorer import TokenScorer
from fastpref.scoring.progress import ScoringProgress
from fastpref.scoring.row_cache import RowCache, row_digests
from fastpref.signals import StopRequest

logger = logging.getLogger("fastpref")

ROWS_OF_A_FILE = 256
"""Scored rows after which the cache is saved, at the end of a step; limits what a kill loses."""


class Visit(NamedTuple):
    """A training step in which some rows are seen for the first time."""

    step: int
    rows: NDArray[np.int64]
    """Row indices into the split, in the step's order."""
    digests: list[bytes]
    num_tokens: int


def first_visits(loader: Loader) -> list[Visit]:
    """The steps of a loader in which at least one row is seen for the first time."""
    seen = np.zeros(len(loader.data.dataset), bool)
    visits = []
    for index in range(loader.order.num_steps):
        rows = loader.order.batch(index)
        if seen[rows].all():
            continue
        seen[rows] = True
        columns = loader.columns(index)
        tokens = int(columns.num_tokens.sum())
        visits.append(Visit(index, rows, row_digests(columns), tokens))
    return visits


@dataclass(frozen=True, slots=True, kw_only=True)
class ReferenceScoring:
    """Scores the rows of a run that the cache lacks, in the same micro-batches as in training.

    A row's log-probabilities are thus bit-identical to those of a reference that runs in the step
    which first sees the row, and equal models start at a log-ratio of exactly zero.
    """

    policy: TokenScorer
    """Before its first update."""
    cache: RowCache
    world: World
    repetition: Repetition
    """Retry policy for running out of memory."""
    about: dict[str, Any]
    """Description, for people, of the model and settings that the cache belongs to."""
    deadline: Deadline

    def complete(self, visits: Sequence[tuple[Loader, Sequence[Visit]]]) -> None:
        """Score and save every row that is missing.

        Args:
            visits: Of every loader of the run, see `first_visits`.

        Raises:
            CheckpointError: a log-probability is not finite, or a file cannot be written.
            InterruptionError, PreemptionError: a stop signal arrived, or the deadline is near;
                rows scored so far are saved.
        """
        started = time.perf_counter()
        num_found = len(self.cache)
        missing = self._missing(visits)
        num_tokens = sum(visit.num_tokens for _, of_loader in missing for visit in of_loader)
        if num_found:
            logger.info(
                "reference: %s rows were scored by earlier runs; log-ratios of equal models are "
                "zero there up to rounding",
                f"{num_found:,}",
            )
        if not num_tokens:
            return
        logger.info("reference: scoring the rows that %s lacks", self.cache.folder)
        with (
            StopRequest(self.deadline) as stop,
            ScoringProgress("reference", num_tokens, visible=self.world.is_main) as progress,
        ):
            for loader, of_loader in missing:
                self._score_visits(loader, of_loader, stop, progress)
            self._save()
            self._end_if_asked(stop)
        num_scored = len(self.cache) - num_found
        seconds = time.perf_counter() - started
        logger.info("reference: %s rows scored in %.1f s", f"{num_scored:,}", seconds)

    def _missing(
        self, visits: Sequence[tuple[Loader, Sequence[Visit]]]
    ) -> list[tuple[Loader, list[Visit]]]:
        """Visits with at least one row that neither the cache nor an earlier visit contains."""
        seen = set[bytes]()
        missing = list[tuple[Loader, list[Visit]]]()
        for loader, of_loader in visits:
            missing.append((loader, []))
            for visit in of_loader:
                lacking = {x for x in visit.digests if x not in self.cache} - seen
                if lacking:
                    seen |= lacking
                    missing[-1][1].append(visit)
        return missing

    def _score_visits(
        self,
        loader: Loader,
        visits: Sequence[Visit],
        stop: StopRequest,
        progress: ScoringProgress,
    ) -> None:
        """Score steps of a loader, in the micro-batches of training."""
        world, indices = self.world, [visit.step for visit in visits]
        with prefetch(lambda index: loader.step(index, world), indices) as steps:
            for visit, step in zip(visits, steps, strict=True):
                self._end_if_asked(stop)
                self._score(loader, visit, step)
                progress.advance(visit.num_tokens)
                if self.cache.num_unsaved >= ROWS_OF_A_FILE:
                    self._save()

    def _end_if_asked(self, stop: StopRequest) -> None:
        if stop.agreed(self.world):
            # a killed torchrun takes the ranks' store along: rank 0 saves before it notices
            with contextlib.suppress(dist.DistError):
                self._save()
            stop.raise_saying(
                f"rows that were scored are kept in {self.cache.folder}; the same command goes on "
                "there"
            )

    @torch.no_grad()
    def _score(self, loader: Loader, visit: Visit, step: StepBatches) -> None:
        """Score a step, each rank its own rows, and add the all-reduced result to the cache."""
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
        world.sum(logps)
        await_device(world)
        values = logps.cpu().numpy()
        self._check(loader, visit, step, values)
        self.cache.add(columns, values)

    def _logps(self, step: StepBatches) -> list[Tensor]:
        """Reference log-probabilities of each micro-batch, (N,)."""
        reference, parts = beginning_of(self.policy), []
        for batch in step.batches:
            logps_N = reference(batch.to(self.world.device))
            assert isinstance(logps_N, Tensor)
            parts.append(logps_N)
            self.policy.release()
        return parts

    def _check(
        self, loader: Loader, visit: Visit, step: StepBatches, logps: NDArray[np.float32]
    ) -> None:
        """Refuse NaN and infinity, with the same outcome on every rank."""
        if np.isfinite(logps).all():
            return
        self._save()
        for i, row in enumerate(visit.rows.tolist()):
            for side in ("chosen", "rejected"):
                of_side = getattr(step.columns, side).take(np.array([i])).flat()
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
