"""The reference of a run, scored before its first step: no second model, no pass of it later."""

import contextlib
import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
import torch.distributed as dist
from numpy.typing import NDArray
from torch import Tensor

from fastpref.batches.columns import EncodedColumns
from fastpref.batches.loader import Loader, StepBatches
from fastpref.batches.prefetch import prefetch
from fastpref.deadline import Deadline
from fastpref.distributed import World
from fastpref.errors import CheckpointError
from fastpref.memory.repetition import Repetition
from fastpref.model.own_reference import beginning_of
from fastpref.model.scorer import TokenScorer
from fastpref.scoring.progress import ScoringProgress
from fastpref.scoring.row_cache import RowCache, row_digests
from fastpref.signals import StopRequest

logger = logging.getLogger("fastpref")

ROWS_OF_A_FILE = 256
"""Rows between two savings, in whole steps: what a kill costs at most."""


class Visit(NamedTuple):
    """A step that is the first one to see some rows."""

    step: int
    rows: NDArray[np.int64]
    """Of the split, in the step's order."""
    digests: list[bytes]
    num_tokens: int


def first_visits(loader: Loader) -> list[Visit]:
    """The steps that a loader's rows are first seen in."""
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
    deadline: Deadline
    await_device: Callable[[], None] = lambda: None
    """Called before a number is fetched from the device."""

    def complete(self, visits: Sequence[tuple[Loader, Sequence[Visit]]]) -> None:
        """Score and save every row that is missing.

        Args:
            visits: Of all rows that the run reads, see `first_visits`.

        Raises:
            CheckpointError: a log-probability is not finite, or a file cannot be written.
            InterruptionError, PreemptionError: a signal came; what was scored is kept.
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
        """The first visits of rows that the cache lacks; equal rows count once."""
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
        """Steps of a loader, as they are trained on."""
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
            # a torchrun that was killed has taken the ranks' store along: rank 0 saves all the same
            with contextlib.suppress(dist.DistError):
                self._save()
            stop.raise_saying(
                f"rows that were scored are kept in {self.cache.folder}; the same command goes on "
                "there"
            )

    @torch.no_grad()
    def _score(self, loader: Loader, visit: Visit, step: StepBatches) -> None:
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
        world.sum(logps)
        self.await_device()
        values = logps.cpu().numpy()
        self._check(loader, visit, columns, values)
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
        self, loader: Loader, visit: Visit, columns: EncodedColumns, logps: NDArray[np.float32]
    ) -> None:
        """Refuse NaN and infinity, with the same outcome on every rank."""
        if np.isfinite(logps).all():
            return
        self._save()
        for i, row in enumerate(visit.rows.tolist()):
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
