"""Saving a run's checkpoints while it trains, and deleting those that are not to be kept."""

import logging
import threading
import time
from dataclasses import dataclass
from pathlib import Path
from queue import SimpleQueue
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastpref.checkpoint.agreement import AgreedError, Agreement
from fastpref.checkpoint.folders import (
    CHECKPOINTS,
    SIGN,
    Best,
    clear_leftovers,
    folder_name,
    retain,
    set_aside,
    step_folders,
    step_of,
)
from fastpref.checkpoint.manifest import Checkpoint, add_metrics
from fastpref.checkpoint.snapshot import HostCopies, Snapshot, take_snapshot
from fastpref.checkpoint.writer import write_checkpoint
from fastpref.complete_files import writing
from fastpref.errors import CheckpointError, WritingMemoryError, is_shortage

logger = logging.getLogger("fastpref")

SIGN_SECONDS = 30.0
"""How long to wait until a file that one machine created is visible on the others: network file
systems cache for some seconds that it did not exist."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport:
    """Outcome of one save."""

    step: int
    """Optimizer steps completed."""
    folder: Path
    """The checkpoint's folder, whether or not the save succeeded."""
    num_bytes: int
    """Size on disk; 0 if the save failed."""
    standstill_seconds: float
    """How long training waited, including for the previous save."""
    write_seconds: float
    """Time to write it and delete old ones."""
    error: str | None = None
    """Why the save failed, the same on every rank; None if it succeeded."""
    is_shortage: bool = False
    """Whether it failed because a rank lacked memory or file descriptors."""


class CheckpointStore:
    """Saves a run's checkpoints, one at a time, and deletes those that are not to be kept.

    Every rank has one and makes the same calls in the same order. A failed save leaves the
    training state unchanged, and is reported.

    Args:
        run_dir: The run's folder; checkpoints go to `<run_dir>/checkpoints`.
        agreement: Connects the ranks; it stays open.
        device: This rank's device.
        asynchronous: Copy the state to host memory and write it from a thread while training
            continues; False: write it before `save` returns, without a copy.
        keep: Number of newest checkpoints to keep, > 0.
        best: How the best checkpoint, which is kept too, is chosen; None: no best one is kept.
        resumed_from: The checkpoint the run resumes from, which is never deleted. Others are set
            aside as of another history, unless it is in this folder and they are of earlier steps.

    Raises:
        CheckpointError: the folder cannot be created or cleared, or ranks see different folders.
    """

    def __init__(
        self,
        run_dir: Path,
        agreement: Agreement,
        device: torch.device,
        *,
        asynchronous: bool,
        keep: int,
        best: Best | None = None,
        resumed_from: Checkpoint | None = None,
    ) -> None:
        self.folder = run_dir / CHECKPOINTS
        self.agreement = agreement
        self.device = device
        self.asynchronous = asynchronous
        self.keep = keep
        self.best = best
        self.resumed_from = resumed_from
        self._copies = HostCopies()
        self._writer: threading.Thread | None = None
        self._reports: SimpleQueue[SaveReport] = SimpleQueue()
        self._bug: BaseException | None = None
        # steps whose checkpoints are in the folder already
        self._saved: set[int] = set()
        newest = -1
        if resumed_from and self._is_here(resumed_from.folder):
            newest = resumed_from.step
            if step_of(resumed_from.folder) is not None:
                self._saved.add(newest)
        agreement.on_main(lambda: self._open(newest))
        if agreement.size > 1:
            self._check_is_shared()

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *_: object) -> None:
        """Wait for the save in flight and free the host copies."""
        self._join()
        self._copies = HostCopies()

    def save(
        self,
        step: int,
        policy: nn.Module,
        optimizer: Optimizer,
        scheduler: LambdaLR,
        *,
        record: dict[str, Any],
        metrics: dict[str, float] | None = None,
        last: bool = False,
    ) -> None:
        """Save the state after `step` optimizer steps, after waiting for the previous save.

        A step that is saved already is not saved again; metrics are added to its checkpoint.

        Args:
            step: Optimizer steps completed.
            policy, optimizer, scheduler: The state to save.
            record: Returned by `load_checkpoint`: the run's progress, fingerprints and the like.
                JSON: keys are strings, tuples come back as lists.
            metrics: Held-out metrics of these weights, including the one of `best`.
            last: Training ends here: write it before this returns, without a copy.
        """
        started = time.perf_counter()
        self._join()
        beside = self.asynchronous and not last
        if step in self._saved:
            self.agreement.on_main(lambda: self._add_metrics(step, metrics or {}))
            return
        try:
            snapshot = take_snapshot(
                step,
                policy,
                optimizer,
                scheduler,
                record=record,
                metrics=metrics or {},
                copies=self._copies if beside else None,
                agreement=self.agreement,
                device=self.device,
            )
        except CheckpointError as error:
            now = time.perf_counter()
            self._report(step, standstill_seconds=now - started, write_started=now, error=error)
            return
        if not beside:
            self._write(snapshot, started, beside=False)
            self._raise_bug()
            return
        # until the writer thread ends, no other thread may use the agreement's process group
        self._writer = threading.Thread(
            target=self._write,
            args=(snapshot, started),
            kwargs={"beside": True},
            name="checkpoint writer",
            daemon=True,
        )
        self._writer.start()

    def poll(self) -> list[SaveReport]:
        """Reports of the saves that ended since the last call, without waiting; ranks may get them
        from different calls."""
        self._raise_bug()
        reports = []
        while not self._reports.empty():
            reports.append(self._reports.get())
        return reports

    def wait(self) -> list[SaveReport]:
        """Wait for the save in flight, if any, then return `poll`."""
        self._join()
        return self.poll()

    def _open(self, newest: int) -> None:
        """Rank 0: create the folder, and set aside checkpoints that are not of this run's history,
        which ends with step `newest`; -1: it has none here."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            clear_leftovers(self.folder)
            for path in step_folders(self.folder):
                step = step_of(path) or 0
                if step >= newest and step not in self._saved:
                    aside = set_aside(path)
                    logger.warning("%s is not what this run goes on from: now %s", path, aside.name)
        except OSError as error:
            kind = WritingMemoryError if is_shortage(error) else CheckpointError
            raise kind(f"{self.folder} cannot be used for checkpoints: {error}") from error

    def _check_is_shared(self) -> None:
        """Refuse a folder that is not the same one on all ranks: each writes its shards there."""

        def leave_sign() -> str:
            sign = self.folder / f"{SIGN}{time.time_ns()}"
            with writing(sign):
                sign.touch()
            return sign.name

        def look() -> None:
            deadline = time.monotonic() + SIGN_SECONDS
            while not sign.exists():
                if time.monotonic() > deadline:
                    raise CheckpointError(
                        f"{self.folder} is not the folder that rank 0 has under this name: run_dir "
                        "must lie on a disk that all machines share"
                    )
                time.sleep(0.1)

        sign = self.folder / self.agreement.on_main(leave_sign)
        try:
            self.agreement.each(look)
        except AgreedError as error:
            raise CheckpointError(str(error)) from error
        finally:
            if self.agreement.rank == 0:
                sign.unlink(missing_ok=True)

    def _is_here(self, checkpoint: Path) -> bool:
        """Whether a checkpoint is in this folder, which may be a link to another disk."""
        own = self.folder / checkpoint.name
        return own.exists() and own.samefile(checkpoint)

    def _add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Rank 0: add metrics to a checkpoint that was saved before they were measured."""
        try:
            add_metrics(self.folder / folder_name(step), metrics)
        except (CheckpointError, OSError) as error:
            logger.warning("the metrics of step %d are not beside its checkpoint: %s", step, error)

    def _write(self, snapshot: Snapshot, started: float, *, beside: bool) -> None:
        """Write a snapshot, delete old checkpoints, and report the outcome."""
        write_started = time.perf_counter()
        num_bytes, error = 0, None
        try:
            if self.device.type == "cuda":
                # a new thread starts on GPU 0, and would allocate memory there
                torch.cuda.set_device(self.device)
            checkpoint = write_checkpoint(self.folder, snapshot, self.agreement)
            self._saved.add(snapshot.step)
            num_bytes = checkpoint.manifest.num_bytes
            self._retain()
        except CheckpointError as problem:
            error = problem
        except BaseException as bug:
            self._bug = bug
            return
        stood_until = write_started if beside else time.perf_counter()
        self._report(
            snapshot.step,
            standstill_seconds=stood_until - started,
            write_started=write_started,
            num_bytes=num_bytes,
            error=error,
        )

    def _report(
        self,
        step: int,
        *,
        standstill_seconds: float,
        write_started: float,
        error: CheckpointError | None,
        num_bytes: int = 0,
    ) -> None:
        self._reports.put(
            SaveReport(
                step=step,
                folder=self.folder / folder_name(step),
                num_bytes=num_bytes,
                standstill_seconds=standstill_seconds,
                write_seconds=time.perf_counter() - write_started,
                error=None if error is None else str(error),
                is_shortage=isinstance(error, WritingMemoryError),
            )
        )

    def _retain(self) -> None:
        """Rank 0: delete checkpoints that are not kept; a failure costs disk space, not the run."""
        if self.agreement.rank != 0:
            return
        start = self.resumed_from
        try:
            retain(
                self.folder,
                keep=self.keep,
                best=self.best,
                protected=start.folder if start else None,
            )
        except OSError as error:
            logger.warning("an old checkpoint could not be deleted: %s", error)

    def _join(self) -> None:
        if self._writer is not None:
            self._writer.join()
            self._writer = None
        self._raise_bug()

    def _raise_bug(self) -> None:
        if self._bug is not None:
            bug, self._bug = self._bug, None
            raise bug
