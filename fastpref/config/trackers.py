"""Schemas of the option groups `wandb` and `tensorboard`, the trackers of a run."""

from dataclasses import dataclass
from importlib.util import find_spec
from typing import NamedTuple


@dataclass(kw_only=True)
class WandbConfig:
    """Weights & Biases, in addition to metrics.jsonl."""

    enabled: bool = False
    """Send the metrics to Weights & Biases."""
    entity: str | None = None
    """User or team; null: the account's default."""
    project: str = "fastpref"
    """Project that the run belongs to."""


@dataclass(kw_only=True)
class TensorboardConfig:
    """TensorBoard, in addition to metrics.jsonl."""

    enabled: bool = False
    """Write event files into the run folder."""


class TrackerOptions(NamedTuple):
    """Options of the trackers of a run."""

    wandb: WandbConfig
    tensorboard: TensorboardConfig
    debug: bool
    """Disables all trackers."""

    @property
    def packages(self) -> list[str]:
        """Names of the packages of the enabled trackers."""
        asked = {"wandb": self.wandb.enabled, "tensorboard": self.tensorboard.enabled}
        return [name for name, is_asked in asked.items() if is_asked and not self.debug]

    def check_installed(self) -> None:
        """Refuse an enabled tracker whose package is not installed.

        Raises:
            ValueError: naming the option and the package.
        """
        for package in self.packages:
            if find_spec(package) is None:
                raise ValueError(
                    f"{package}.enabled=true needs the package {package}, which is not installed"
                )
