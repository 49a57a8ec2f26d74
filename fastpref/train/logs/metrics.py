"""Metrics of a run: collected on the device, written as JSON lines, logged to the console."""

import json
import logging
import math
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol, Self

import torch
from torch import Tensor

from fastpref.complete_files import append_whole, sync, writing
from fastpref.distributed import World
from fastpref.errors import first_line
from fastpref.heartbeat import await_device
from fastpref.train.logs.utilization import UsefulWork

logger = logging.getLogger("fastpref")

Record = dict[str, Any]
"""One line of metrics.jsonl: step, examples, split, then the metrics."""


class Tracker(Protocol):
    """Receives the records of a run in addition to metrics.jsonl."""

    name: str

    def log(self, record: Record) -> None: ...

    def close(self) -> None: ...


def name_for_split(metric: str, split: str) -> str:
    """The seed repositories' key: ("rewards/margins", "eval") -> "rewards_eval/margins"."""
    group, _, rest = metric.partition("/")
    return f"{group}_{split}/{rest}" if rest else f"{group}/{split}"


@dataclass(slots=True, kw_only=True)
class PendingStep:
    """One optimizer step whose metrics are still on the device."""

    step: int
    examples: int
    """Examples seen since the start, this step's included."""
    num_examples: int
    """Examples of this step, over all ranks."""
    num_tokens: int
    """Real policy tokens of this step, over all ranks: prompt + response of every sequence."""
    num_computed: int
    """Tokens that the model's body computed in this step, over all ranks."""
    num_scored: int
    """Response tokens of this step, over all ranks."""
    lr: float
    names: list[str]
    values: Tensor
    """(K,) float32, in the order of `names`: already summed over ranks and divided."""


@dataclass(slots=True, kw_only=True)
class MetricsLog:
    """Writes one JSON line per optimizer step and per evaluation, and feeds the trackers.

    The metrics of several steps are copied from the device together, once `min_interval_seconds`
    have passed: a copy makes the host wait for the device, so it never happens inside a step.
    """

    path: Path
    min_interval_seconds: float
    world: World
    """The ranks, of which rank 0 writes."""
    first_loss_tolerance: float | None = None
    """How far the first step's loss may be from ln 2 without a warning, if policy and reference
    start equal; None: it is not checked."""
    work: UsefulWork | None = None
    """Operations that a step needs, for MFU; None if unknown."""
    trackers: list[Tracker] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    """All records so far, those of earlier starts included."""
    unwritten: list[str] = field(default_factory=list)
    """Lines that could not be written to the file; `bring_to_disk` tries again."""
    _is_refused: bool = False
    _pending: list[PendingStep] = field(default_factory=list)
    _last_flush: float = field(default_factory=time.perf_counter)

    def add_step(self, step: PendingStep) -> bool:
        """Add a step to the pending ones; True if it is time to flush them."""
        self._pending.append(step)
        return time.perf_counter() - self._last_flush >= self.min_interval_seconds

    def flush(self) -> Record | None:
        """Copy the pending steps to the host and write them; returns the last one's record.

        Ranks other than 0 drop them and return None: the metrics are the same on every rank.
        """
        if not self._pending:
            return None
        if not self.world.is_main:
            self._pending.clear()
            self.restart_clock()
            return None
        await_device(self.world)
        counts = [len(step.names) for step in self._pending]
        values = torch.cat([step.values for step in self._pending]).cpu().split(counts)
        seconds = max(time.perf_counter() - self._last_flush, 1e-9)
        num_examples = sum(step.num_examples for step in self._pending)
        num_tokens = sum(step.num_tokens for step in self._pending)
        utilization = self._utilization(seconds)
        for step, row in zip(self._pending, values, strict=True):
            record: Record = {"step": step.step, "examples": step.examples, "split": "train"}
            record |= dict(zip(step.names, row.tolist(), strict=True))
            record |= {
                "lr": step.lr,
                "examples_per_second": num_examples / seconds,
                "tokens_per_second": num_tokens / seconds,
                "tokens_computed": step.num_computed,
                "padding_share": max(0.0, 1 - step.num_tokens / step.num_computed),
                **utilization,
                "peak_memory_gib": peak_memory_gib(self.world.device),
                "counters/examples": step.examples,
                "counters/updates": step.step,
            }
            self._add(record)
            if step.step == 1 and self.first_loss_tolerance is not None:
                check_first_loss(record["loss/train"], self.first_loss_tolerance)
        self._pending.clear()
        self.restart_clock()
        self._write_lines()
        return self.records[-1]

    def _utilization(self, seconds: float) -> dict[str, float]:
        if self.work is None:
            return {}
        # a shared prompt is computed once, so counts once; padding does not count
        useful = sum(min(step.num_tokens, step.num_computed) for step in self._pending)
        scored = sum(step.num_scored for step in self._pending)
        return {"mfu": self.work.share(useful / seconds, scored / seconds)}

    def restart_clock(self) -> None:
        """Exclude the time until now, an evaluation's or a checkpoint's, from the step rates."""
        self._last_flush = time.perf_counter()

    def write(self, record: Record) -> None:
        """Append one record; a number that is not finite is written as null, as JSON requires.

        Raises:
            CheckpointError: the file cannot be written. It is raised once; further lines are kept
                in memory until `bring_to_disk`.
        """
        self._add(record)
        self._write_lines()

    def _add(self, record: Record) -> None:
        self.records.append(record)
        for tracker in list(self.trackers):
            self._try(tracker, partial(tracker.log, record))
        line = {
            key: None if isinstance(value, float) and not math.isfinite(value) else value
            for key, value in record.items()
        }
        self.unwritten.append(json.dumps(line) + "\n")

    def _write_lines(self) -> None:
        """Append all unwritten lines to the file, or none."""
        if self._is_refused:
            return
        self._is_refused = True
        append_whole(self.path, "".join(self.unwritten))
        self.unwritten.clear()
        self._is_refused = False

    def forget_from(self, step: int) -> None:
        """Drop the pending steps from `step` on."""
        self._pending = [pending for pending in self._pending if pending.step < step]

    def bring_to_disk(self) -> None:
        """Retry lines that could not be written, and sync the file, so that it survives a power
        failure.

        Raises:
            CheckpointError: it cannot be written.
        """
        self._is_refused = False
        if self.unwritten:
            self._write_lines()
        if self.world.is_main and self.path.is_file():
            with writing(self.path):
                sync(self.path)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, _: object, first: BaseException | None, __: object) -> None:
        """Close the log; an error of that does not replace the one that ended the run."""
        try:
            self.close()
        except Exception as error:
            if first is None:
                raise
            logger.warning("%s lacks the last lines: %s", self.path.name, first_line(error))

    def close(self) -> None:
        """Write the pending steps and close the trackers, also if the steps cannot be written."""
        try:
            self.flush()
        finally:
            for tracker in list(self.trackers):
                self._try(tracker, tracker.close)

    def _try(self, tracker: Tracker, act: Callable[[], None]) -> None:
        """Run a tracker's action; if it fails, drop the tracker with a warning, not the run."""
        try:
            act()
        # services and their libraries may raise anything
        except Exception as error:
            self.trackers.remove(tracker)
            logger.warning(
                "%s failed and follows the run no longer: %s; %s has all numbers",
                tracker.name,
                first_line(error),
                self.path,
            )


def sum_over_examples(metrics: Iterable[Mapping[str, Tensor]]) -> tuple[list[str], Tensor]:
    """Sums over the examples of several micro-batches.

    Args:
        metrics: Per micro-batch: name -> (P,) values.

    Returns:
        Names, and their sums (K,) float32 on the device; divide by the global count.
    """
    totals: dict[str, Tensor] = {}
    for micro_batch in metrics:
        for name, values in micro_batch.items():
            total = values.float().sum()
            totals[name] = totals[name] + total if name in totals else total
    return list(totals), torch.stack(list(totals.values()))


def first_loss_tolerance(*, exact: bool) -> float:
    """How far from ln 2 the first loss may be if policy and reference are equal.

    Args:
        exact: Policy and reference run the same operations, so their log-ratios are exactly zero
            and only the mean over the step rounds ln 2; otherwise 16 bits leave 0.01 at most.
    """
    return 5e-6 * math.log(2) if exact else 0.02


def check_first_loss(loss: float, tolerance: float) -> None:
    """Warn if a run whose policy and reference are equal does not start at ln 2.

    Nothing else shows a wrong mask, wrong positions, randomness in the model, or a policy and a
    reference that compute differently.

    Args:
        loss: Loss of the first step.
        tolerance: Largest difference due to rounding, see `first_loss_tolerance`.
    """
    if not abs(loss - math.log(2)) <= tolerance:
        logger.warning(
            "THE FIRST LOSS IS %.6f AND SHOULD BE ln 2 = 0.693147: policy and reference have the "
            "same weights and score the same tokens differently; do not trust this run. "
            "packing.enabled=false tells whether packing is the cause",
            loss,
        )


def peak_memory_gib(device: torch.device) -> float:
    """The allocator's peak on a GPU, the process's peak resident memory on a CPU, in GiB."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    # in bytes on macOS, elsewhere in KiB
    unit = 1 if sys.platform == "darwin" else 2**10
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30


def format_metrics(record: Record) -> str:
    """One console line in the seed repositories' form: floats to five digits."""
    shown = {
        key: f"{value:.5g}" if isinstance(value, float) else value
        for key, value in record.items()
        if key not in ("step", "examples", "split")
    }
    return "{" + ", ".join(f"{key}: {value}" for key, value in shown.items()) + "}"
