"""When a run's state is saved, and what the log says about each save."""

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace

from fastpref.checkpoint.folders import CHECKPOINTS, Best
from fastpref.checkpoint.size import estimate_bytes, free_bytes
from fastpref.checkpoint.store import CheckpointStore, SaveReport
from fastpref.deadline import Deadline, clock_time
from fastpref.errors import CheckpointError, WritingMemoryError
from fastpref.host import available_to_rank
from fastpref.signals import StopRequest
from fastpref.train.logs.metrics import Record
from fastpref.train.resume.comparison import FORMAT, HELD_OUT
from fastpref.train.run import Run

logger = logging.getLogger("fastpref")

WRITE_RATE = 200 * 2**20
"""Bytes per second that the first save is expected to write."""
COPY_SHARE = 0.5
"""Share of the available host memory that copies may take with checkpoint.mode=auto."""


class Checkpoints:
    """Saves a run's state when a save is due.

    Every rank has one and makes the same calls in the same order.

    Args:
        run: The run whose state is saved.
        store: Where checkpoints are written.
        deadline: Is told how long a save takes.
    """

    def __init__(self, run: Run, store: CheckpointStore, deadline: Deadline) -> None:
        self._run = run
        self._store = store
        self._deadline = deadline
        self._newest: SaveReport | None = None
        self._trains = True
        # step of the best evaluation, and the best value before it
        self._best_step, self._best_before = -1, (run.state.best, run.state.best_of)
        start = run.start.checkpoint
        self._metrics = dict(start.manifest.metrics) if start else {}

    def after_evaluation(self, evaluation: Record | None, stop: StopRequest) -> None:
        """Call after an evaluation before the first step of this start, be it the initial one or
        one that an earlier start did not finish. If it is the best so far, and not at step 0, its
        metrics are added to the checkpoint of this step, which is saved if there is none."""
        if evaluation is not None and self._run.state.step and self._is_best(evaluation):
            self.save(stop)

    def after_step(self, evaluation: Record | None, stop: StopRequest) -> None:
        """Save if a checkpoint is due after this step.

        Args:
            evaluation: Metrics of an evaluation after this step; None if there was none.
            stop: Is told of a file that cannot be written.
        """
        state, every = self._run.state, self._run.config.checkpoint.every
        self._hear(self._store.poll())
        is_best = evaluation is not None and self._is_best(evaluation)
        if state.step == self._run.train.order.num_steps:
            # `finish` saves it
            return
        if is_best or (every and state.step % every == 0):
            self.save(stop)

    def save(self, stop: StopRequest, *, last: bool = False) -> None:
        """Save the current state, but not at step 0 or once steps are no longer applied.

        Args:
            stop: Is told of a file that cannot be written.
            last: Training is over: write it before this returns, without a copy.
        """
        run, state = self._run, self._run.state
        if run.updates.guard.first_bad_step() or not state.step:
            return
        with stop.if_unwritable():
            run.log.flush()
            run.log.bring_to_disk()
        state.guard = run.updates.guard.state()
        state.max_tokens = run.repetition.limit or state.max_tokens
        record = {
            "format": FORMAT,
            "state": state.to_json() | {"seconds": state.seconds + run.seconds()},
            "options": asdict(run.config),
            "fingerprints": run.fingerprints,
            "unwritten": run.log.unwritten,
        }
        metrics = self._metrics if state.evaluated == state.step else {}
        parts = (run.policy, run.updates.optimizer, run.updates.scheduler)
        self._store.save(state.step, *parts, record=record, metrics=metrics, last=last)
        run.log.restart_clock()
        self._hear(self._store.poll())

    def finish(self, stop: StopRequest) -> None:
        """Save the last state, and wait until it is written."""
        self._trains = False
        self.save(stop, last=True)
        self._hear(self._store.wait())

    @property
    def unsaved(self) -> str | None:
        """Why the newest state could not be saved; None if it was, or there was nothing to save."""
        return self._newest.error if self._newest else None

    def raise_if_unsaved(self) -> None:
        """Fail a run whose last state could not be saved, after its model was exported.

        Raises:
            CheckpointError: the last save failed.
        """
        newest = self._newest
        if newest is not None and newest.error is not None:
            kind = WritingMemoryError if newest.is_shortage else CheckpointError
            raise kind(
                f"{newest.error}; {self._run.run_dir / 'LATEST'} has the model, but nothing goes "
                "on from this state"
            )

    def _hear(self, reports: list[SaveReport]) -> None:
        for report in reports:
            self._newest = report
            if report.error is not None and report.step == self._best_step:
                # a best that is not on the disk must not keep a later one from being saved
                self._run.state.best, self._run.state.best_of = self._best_before
            seconds = report.standstill_seconds
            if self._store.asynchronous:
                seconds += report.write_seconds
            # twice: exporting the model takes about as long again
            self._deadline.expect(2 * seconds)
            if self._run.world.is_main:
                say(report, trains=self._trains)

    def _is_best(self, evaluation: Record) -> bool:
        """Whether an evaluation is the best so far by `checkpoint.keep_best`; keeps its metrics."""
        self._metrics = {
            name: value for name, value in evaluation.items() if isinstance(value, float)
        }
        best, run = self._store.best, self._run
        if best is None:
            return False
        # ranks hear of a failed save at different times: here all have heard of it
        self._hear(self._store.wait())
        run.log.restart_clock()
        state, value = run.state, self._metrics[best.metric]
        # an earlier best of another metric or other rows cannot be compared
        assert run.eval is not None
        count = min(run.config.n_eval_examples, len(run.eval.data.dataset))
        rows = f" of {count} of {run.fingerprints[HELD_OUT]}"
        best_of = best.metric + rows
        before = state.best if state.best_of == best_of else None
        sign = 1 if best.higher_is_better else -1
        if not math.isfinite(value) or (before is not None and not sign * value > sign * before):
            return False
        self._best_step, self._best_before = state.step, (state.best, state.best_of)
        if state.best_of and not state.best_of.endswith(rows):
            state.best_since = state.step
            self._store.best = replace(best, since=state.best_since)
        state.best, state.best_of = value, best_of
        return True


@contextmanager
def open_checkpoints(run: Run, deadline: Deadline) -> Iterator[Checkpoints]:
    """Open the checkpoints of a run; on exit, wait for a save in flight."""
    options = run.config.checkpoint
    num_bytes = estimate_bytes(run.policy, run.updates.optimizer, run.world.size)
    deadline.expect(num_bytes / WRITE_RATE)
    on_gpu = run.world.device.type == "cuda"
    can = writes_beside(options.mode, num_bytes // run.world.size, pinned=on_gpu)
    # all ranks agree: on a machine with less memory or more ranks the copy may not fit
    asynchronous = run.world.agree_max(int(not can)) == 0
    if run.world.is_main:
        announce(run, num_bytes, asynchronous=asynchronous)
    with CheckpointStore(
        run.run_dir,
        run.start.agreement,
        run.world.device,
        asynchronous=asynchronous,
        keep=options.keep,
        best=best_by(options.keep_best, since=run.state.best_since),
        resumed_from=run.start.checkpoint,
    ) as store:
        yield Checkpoints(run, store, deadline)


def writes_beside(mode: str, num_bytes: int, *, pinned: bool) -> bool:
    """Whether checkpoints are copied to host memory and written while training continues.

    Args:
        mode: async, sync or auto.
        num_bytes: Size of this rank's copy.
        pinned: Whether it is in pinned memory, which torch allocates in powers of two: at most
            twice as much.
    """
    num_bytes *= 2 if pinned else 1
    fits = num_bytes < COPY_SHARE * available_to_rank()
    return mode == "async" or (mode == "auto" and fits)


def best_by(metric: str | None, *, since: int) -> Best | None:
    """How the best checkpoint is chosen, by the name of a metric; None: no best one is kept.

    Args:
        since: The first step that was evaluated on the present rows.
    """
    if metric is None:
        return None
    return Best(metric, higher_is_better=not metric.startswith(("loss", "kl")), since=since)


def announce(run: Run, num_bytes: int, *, asynchronous: bool) -> None:
    """Log when checkpoints are saved and how large they will be; warn if they will not fit."""
    options = run.config.checkpoint
    gib, free = num_bytes / 2**30, free_bytes(run.run_dir) / 2**30
    rhythm = f"every {options.every} steps and at the end" if options.every else "at the end"
    deadline = options.deadline_seconds()
    if deadline is not None:
        rhythm += f", which comes by {clock_time(deadline)}"
    logger.info(
        "checkpoints of %.2f GiB %s, %s, the newest %d stay: %s has %.1f GiB free",
        gib,
        rhythm,
        "written beside the training" if asynchronous else "written while training waits",
        options.keep,
        run.run_dir / CHECKPOINTS,
        free,
    )
    # a new one is written before the oldest is deleted
    if (options.keep + 1) * gib > free:
        logger.warning(
            "%d checkpoints of %.2f GiB do not fit into %.1f GiB: set checkpoint.keep, or "
            "run_dir on another disk",
            options.keep + 1,
            gib,
            free,
        )


def say(report: SaveReport, *, trains: bool) -> None:
    """Log the outcome of a save in one line.

    Args:
        trains: Whether training goes on.
    """
    if report.error is not None:
        logger.error("NO CHECKPOINT: %s%s", report.error, "; training goes on" if trains else "")
        return
    logger.info(
        "checkpoint %s: %.2f GiB in %.1f s, training stood still for %.2f s",
        report.folder.name,
        report.num_bytes / 2**30,
        report.write_seconds,
        report.standstill_seconds,
    )
