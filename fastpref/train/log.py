"""A run's log: its metrics.jsonl, and the trackers that follow it."""

from pathlib import Path
from typing import Any

from fastpref.config import TrackerOptions
from fastpref.distributed import World
from fastpref.train.metrics import MetricsLog, first_loss_tolerance
from fastpref.train.trackers import build_trackers


def open_log(
    run_dir: Path,
    world: World,
    *,
    followers: TrackerOptions,
    options: dict[str, Any],
    min_interval_seconds: float,
    starts_at_log_two: bool,
    exactly: bool,
) -> MetricsLog:
    """The log of a new run.

    Args:
        run_dir: Of the run.
        world: Rank 0 writes.
        followers: Which trackers follow it.
        options: All options of the run, which trackers keep.
        min_interval_seconds: Between two training steps that are written.
        starts_at_log_two: Whether the first loss of two equal models is ln 2.
        exactly: Whether policy and reference then give the same bits.
    """
    return MetricsLog(
        path=run_dir / "metrics.jsonl",
        min_interval_seconds=min_interval_seconds,
        device=world.device,
        is_main=world.is_main,
        first_loss_tolerance=first_loss_tolerance(exact=exactly) if starts_at_log_two else None,
        trackers=build_trackers(followers, run_dir, options) if world.is_main else [],
    )
