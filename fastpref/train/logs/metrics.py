"""Numbers of a run: collected on the device, written as JSON lines, shown to people."""

import json
import logging
import math
import os
import resource
import sys
import time
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from fastpref.complete_files import append_whole, writing
from fastpref.distributed import World
from fastpref.errors import first_line
from fastpref.heartbeat import await_device
from fastpref.train.logs.utilization import UsefulWork

logger = logging.getLogger("fastpref")

Record = dict[str, Any]
"""One line of metrics.jsonl: step, examples, split, then the metrics."""


class Tracker(Protocol):
    """Something that follows a run beside metrics.jsonl."""

    name: str

    def log(self, record: Record) -> None: ...

    def close(self) -> None: ...


def name_for_split(metric: str, split: str) -> str:
    """The seed repositories' key: ("rewards/margins", "eval") -> "rewards_eval/margins"."""
    group, _, rest = metric.partition("/")
    return f"{group}_{split}/{rest}" if rest else f"{group}/{split}"


@dataclass(slots=True, kw_only=True)
class PendingStep:
    """One optimizer step whose numbers are still on the device."""

    step: int
    examples: int
    """Examples seen since the start, this step's included."""
    num_examples: int
    """Examples of this step, over all ranks."""
    num_tokens: int
    """Real policy tokens of this step, over all ranks: prompt + response of every sequence."""
    num_computed: int
    """Tokens that the model's body computed for them, over all ranks."""
    num_scored: int
    """Response tokens, over all ranks."""
    lr: float
    names: list[str]
    values: Tensor
    """(K,) float32, in the order of `names`: already summed over ranks and divided."""


@dataclass(slots=True, kw_only=True)
class MetricsLog:
    """Writes one JSON line per optimizer step and per evaluation, and feeds the trackers.

    Steps wait on the device and come over together, at most once in `min_interval_seconds`: a
    transfer makes the host wait for the device, so it never happens inside a step.
    """

    path: Path
    min_interval_seconds: float
    world: World
    """Whoever computes; rank 0 writes."""
    first_loss_tolerance: float | None = None
    """The first step's loss is that of two equal models: what is further from ln 2 is a mistake.
    None: it may be anything."""
    work: UsefulWork | None = None
    """Of a step; None where it is not known."""
    trackers: list[Tracker] = field(default_factory=list)
    records: list[Record] = field(default_factory=list)
    unwritten: list[str] = field(default_factory=list)
    """Lines that the file did not take; tried again where it is brought to the disk."""
    _is_refused: bool = False
    _pending: list[PendingStep] = field(default_factory=list)
    _last_flush: float = field(default_factory=time.perf_counter)

    def add_step(self, step: PendingStep) -> bool:
        """Remember a step; True if it is time to bring the waiting ones over."""
        self._pending.append(step)
        return time.perf_counter() - self._last_flush >= self.min_interval_seconds

    def flush(self) -> Record | None:
        """Bring the waiting steps to the host and write them; returns the last one's record.

        Ranks other than 0 forget them: the numbers are the same everywhere.
        """
        if not self._pending or not self.world.is_main:
            self._pending.clear()
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
        # what is shared is computed once, and padding is for nothing
        useful = sum(min(step.num_tokens, step.num_computed) for step in self._pending)
        scored = sum(step.num_scored for step in self._pending)
        return {"mfu": self.work.share(useful / seconds, scored / seconds)}

    def restart_clock(self) -> None:
        """Leave what happened until now (an evaluation, say) out of the step rates."""
        self._last_flush = time.perf_counter()

    def write(self, record: Record) -> None:
        """Append one record; a number that is not finite is written as null, as JSON has none.

        Raises:
            CheckpointError: the file cannot be written; said once, then lines are kept in memory
                until `bring_to_disk`.
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
        """All of them, or none."""
        if self._is_refused:
            return
        self._is_refused = True
        append_whole(self.path, "".join(self.unwritten))
        self.unwritten.clear()
        self._is_refused = False

    def forget_from(self, step: int) -> None:
        """Do not write the waiting steps from `step` on."""
        self._pending = [pending for pending in self._pending if pending.step < step]

    def bring_to_disk(self) -> None:
        """What was written survives a power failure; lines that the file did not take have another
        chance.

        Raises:
            CheckpointError: it cannot be brought there.
        """
        self._is_refused = False
        if self.unwritten:
            self._write_lines()
        if self.world.is_main and self.path.is_file():
            with writing(self.path), self.path.open("rb") as file:
                os.fsync(file.fileno())

    def close(self) -> None:
        """Write what waits, and end the trackers."""
        self.flush()
        for tracker in list(self.trackers):
            self._try(tracker, tracker.close)

    def _try(self, tracker: Tracker, act: Callable[[], None]) -> None:
        """Let a tracker act, and leave it out from then on if it fails: the run goes on."""
        try:
            act()
        # services and libraries fail in any way they like
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
    """How far from ln 2 the first loss of two equal models may be.

    Args:
        exact: Policy and reference run the same operations, so their log-ratios are exactly zero
            and ln 2 is rounded by its mean over the step alone; else 16 bits leave 0.01 at most.
    """
    return 5e-6 * math.log(2) if exact else 0.02


def check_first_loss(loss: float, tolerance: float) -> None:
    """Warn where a run of equal policy and reference does not start at ln 2.

    A wrong mask, wrong positions, random numbers or two unlike computations are seen nowhere else.

    Args:
        loss: Of the first step.
        tolerance: What rounding may leave of a difference, see `first_loss_tolerance`.
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
