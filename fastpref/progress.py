"""Progress of a loop: a bar on a terminal, log lines elsewhere."""

import logging

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress

from fastpref.train.metrics import Record, format_metrics

logger = logging.getLogger("fastpref")


class Progress:
    """Steps done, time left and the latest numbers.

    Args:
        total: Steps of the loop.
        visible: False on every rank but 0.
        label: What is being done, left of the bar.
    """

    def __init__(self, *, total: int, visible: bool, label: str = "training") -> None:
        console = Console(stderr=True)
        self._visible = visible
        self._terminal = visible and console.is_terminal
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not self._terminal,
        )
        self._task = self._bar.add_task(label, total=total, numbers="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    @property
    def on_terminal(self) -> bool:
        """Whether there is a bar; elsewhere log lines must do."""
        return self._terminal

    def advance(self, steps: int = 1, numbers: str | None = None) -> None:
        """Steps are done; `numbers` are shown beside the bar."""
        self._bar.advance(self._task, steps)
        if numbers is not None:
            self._bar.update(self._task, numbers=numbers)

    def show(self, record: Record | None) -> None:
        """The latest training record: beside the bar in short, or as a log line in full."""
        if record is None or not self._visible:
            return
        if not self._terminal:
            logger.info(
                "train stats after %d examples: %s", record["examples"], format_metrics(record)
            )
            return
        numbers = f"loss {record['loss/train']:.3f}"
        if "rewards_train/accuracies" in record:
            numbers += f"  accuracy {record['rewards_train/accuracies']:.2f}"
        numbers += f"  {record['tokens_per_second']:,.0f} tokens/s"
        self._bar.update(self._task, numbers=numbers)
