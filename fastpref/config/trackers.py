"""Schemas of the option groups `wandb tensorboard`: who follows a run."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple


def _check_installed(key: str, enabled: bool, package: str) -> None:
    if enabled and find_spec(package) is None:
        raise ValueError(f"{key}=true needs the package {package}, which is not installed")


@dataclass(kw_only=True)
class WandbConfig:
    """Weights & Biases, beside metrics.jsonl."""

    enabled: bool = False
    """Send the metrics to Weights & Biases."""
    entity: str | None = None
    """User or team; null: the account's default."""
    project: str = "fastpref"
    """Project that the run belongs to."""

    def __post_init__(self) -> None:
        _check_installed("wandb.enabled", self.enabled, "wandb")


@dataclass(kw_only=True)
class TensorboardConfig:
    """TensorBoard, beside metrics.jsonl."""

    enabled: bool = False
    """Write event files into the run folder."""

    def __post_init__(self) -> None:
        _check_installed("tensorboard.enabled", self.enabled, "tensorboard")


class TrackerOptions(NamedTuple):
    """Which trackers follow a run."""

    wandb: WandbConfig
    tensorboard: TensorboardConfig
    debug: bool
    """None of them."""
