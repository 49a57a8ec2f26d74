"""Saving the training checkpoints of a run, beside the training, and keeping some of them."""

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
from fastpref.errors import CheckpointError

logger = logging.getLogger("fastpref")

SIGN_SECONDS = 30.0
"""Until a file that one machine has made is seen by the others: network disks remember for some
seconds that there was none."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SaveReport:
    """How one save went."""

    step: int
    """Optimizer steps done."""
    folder: Path
    """Where the checkpoint is, or would have been."""
    num_bytes: int
    """On the disk; 0 if it failed."""
    standstill_seconds: float
    """How long training waited, for the save before this one too."""
    write_seconds: float
    """From the first byte to the last rename."""
    error: str | None = None
    """Why there is none; the same on every rank."""


class CheckpointStore:
    """Saves a run's checkpoints, one at a time, and deletes those that are not kept.

    Every rank has one and makes the same calls in the same order. A save that fails leaves the
    training state as it is, and is reported.

    Args:
        run_dir: The run's folder; checkpoints go to `<run_dir>/checkpoints`.
        agreement: Of the ranks; left open.
        device: Where this rank computes.
        asynchronous: Copy the state to the host's memory and write from there while training goes
            on; False: write before `save` returns, without the copy.
        keep: How many of the newest checkpoints stay, > 0.
        best: Which checkpoint stays besides; None: none does.
        resumed_from: What the run starts from; it is never deleted. Checkpoints in this folder
            that it does not go on from are of another history, and set aside.

    Raises:
        CheckpointError: the folder cannot be made or cleared, or ranks see different ones.
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
        # steps that need not be saved again
        self._saved: set[int] = set()
        self._newest = -1
        if resumed_from and self._is_here(resumed_from.folder):
            self._newest = resumed_from.step
            if step_of(resumed_from.folder) is not None:
                self._saved.add(resumed_from.step)
        agreement.on_main(self._open)
        if agreement.size > 1:
            self._check_is_shared()

    def __enter__(self) -> "CheckpointStore":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

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
        """Save the state after `step` optimizer steps; waits for the save before it.

        A step that this store has saved already is not saved again; metrics are added to it.

        Args:
            step: Optimizer steps done.
            policy, optimizer, scheduler: The state.
            record: What `load_checkpoint` returns: the run's progress, fingerprints and the like.
                JSON: keys are strings, tuples come back as lists.
            metrics: Held-out metrics of these weights, among them that of `best`.
            last: Nothing goes on meanwhile: it is written before this returns, without a copy.
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
            self._report(
                step, standstill_seconds=now - started, write_started=now, error=str(error)
            )
            return
        if not beside:
            self._write(snapshot, started, beside=False)
            self._raise_bug()
            return
        # from here on the thread speaks to the other ranks' threads, and this one must not
        self._writer = threading.Thread(
            target=self._write,
            args=(snapshot, started),
            kwargs={"beside": True},
            name="checkpoint writer",
            daemon=True,
        )
        self._writer.start()

    def poll(self) -> list[SaveReport]:
        """Saves that ended since the last call, without waiting for any; ranks may see them at
        different calls."""
        self._raise_bug()
        reports = []
        while not self._reports.empty():
            reports.append(self._reports.get())
        return reports

    def wait(self) -> list[SaveReport]:
        """Wait for the save in flight, if there is one; `poll` after it."""
        self._join()
        return self.poll()

    def close(self) -> None:
        """Wait for the save in flight and free the copies."""
        self._join()
        self._copies = HostCopies()

    def _open(self) -> None:
        """Rank 0: a folder with nothing in it that is not of this run's history."""
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            clear_leftovers(self.folder)
            for path in step_folders(self.folder):
                step = step_of(path) or 0
                if step >= self._newest and step not in self._saved:
                    aside = set_aside(path)
                    logger.warning("%s is not what this run goes on from: now %s", path, aside.name)
        except OSError as error:
            raise CheckpointError(
                f"{self.folder} cannot be used for checkpoints: {error}"
            ) from error

    def _check_is_shared(self) -> None:
        """Refuse a folder that is another one for some rank: every rank writes its part there."""

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
        """Whether a checkpoint is one of this folder's, which may be a link to another disk."""
        own = self.folder / checkpoint.name
        return own.exists() and own.samefile(checkpoint)

    def _add_metrics(self, step: int, metrics: dict[str, float]) -> None:
        """Rank 0: what was measured of a checkpoint that was saved before it was."""
        try:
            add_metrics(self.folder / folder_name(step), metrics)
        except CheckpointError as error:
            logger.warning("the metrics of step %d are not beside its checkpoint: %s", step, error)

    def _write(self, snapshot: Snapshot, started: float, *, beside: bool) -> None:
        """Write a snapshot and report how it went."""
        write_started = time.perf_counter()
        num_bytes, error = 0, None
        try:
            if self.device.type == "cuda":
                # a thread begins on the first GPU, and would claim memory there
                torch.cuda.set_device(self.device)
            checkpoint = write_checkpoint(self.folder, snapshot, self.agreement)
            self._saved.add(snapshot.step)
            num_bytes = checkpoint.manifest.num_bytes
            self._retain()
        except CheckpointError as problem:
            error = str(problem)
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
        num_bytes: int = 0,
        error: str | None = None,
    ) -> None:
        self._reports.put(
            SaveReport(
                step=step,
                folder=self.folder / folder_name(step),
                num_bytes=num_bytes,
                standstill_seconds=standstill_seconds,
                write_seconds=time.perf_counter() - write_started,
                error=error,
            )
        )

    def _retain(self) -> None:
        """Rank 0: delete what is not kept; a file system that refuses costs room, not the run."""
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
