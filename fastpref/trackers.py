"""Optional followers of a run, beside metrics.jsonl: Weights & Biases and TensorBoard."""

import dataclasses
from pathlib import Path
from typing import Any

from fastpref.config import Config
from fastpref.metrics import Record, Tracker


def build_trackers(config: Config, run_dir: Path) -> list[Tracker]:
    """The trackers that the config asks for, which checked their packages; none in `debug`."""
    trackers: list[Tracker] = []
    if config.wandb.enabled and not config.debug:
        trackers.append(WandbTracker(config, run_dir))
    if config.tensorboard.enabled and not config.debug:
        trackers.append(TensorboardTracker(run_dir))
    return trackers


class WandbTracker:
    """Scalars over examples seen, as the seed repositories log them."""

    def __init__(self, config: Config, run_dir: Path) -> None:
        import wandb

        self._run = wandb.init(
            entity=config.wandb.entity,
            project=config.wandb.project,
            name=run_dir.name,
            dir=str(run_dir),
            config=dataclasses.asdict(config),
        )

    def log(self, record: Record) -> None:
        self._run.log(_scalars(record), step=record["examples"])

    def close(self) -> None:
        self._run.finish()


class TensorboardTracker:
    """Scalars over examples seen, in the run folder's `tensorboard/`."""

    def __init__(self, run_dir: Path) -> None:
        from torch.utils.tensorboard import SummaryWriter

        self._writer: Any = SummaryWriter(str(run_dir / "tensorboard"))

    def log(self, record: Record) -> None:
        for name, value in _scalars(record).items():
            self._writer.add_scalar(name, value, record["examples"])

    def close(self) -> None:
        self._writer.close()


def _scalars(record: Record) -> dict[str, float]:
    return {key: value for key, value in record.items() if isinstance(value, int | float)}
