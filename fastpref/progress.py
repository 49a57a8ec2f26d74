"""Progress of a loop: a bar on a terminal, log lines elsewhere."""

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.progress import Progress as RichProgress


class Progress:
    """Display of the steps done, the time left and the latest metrics.

    Args:
        total: Number of steps of the loop.
        visible: False on every rank but 0.
        label: Name of the loop, left of the bar.
    """

    def __init__(self, *, total: int, visible: bool, label: str = "training") -> None:
        console = Console(stderr=True)
        self.on_terminal = visible and console.is_terminal
        """Whether a bar is shown; if not, callers write log lines."""
        self._bar = RichProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[numbers]}"),
            console=console,
            disable=not self.on_terminal,
        )
        self._task = self._bar.add_task(label, total=total, numbers="")

    def __enter__(self) -> "Progress":
        self._bar.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._bar.stop()

    def advance(self, steps: int = 1, numbers: str | None = None) -> None:
        """Count `steps` as done, and show `numbers`, if given, beside the bar."""
        self._bar.advance(self._task, steps)
        if numbers is not None:
            self.show(numbers)

    def show(self, numbers: str) -> None:
        """Show the latest numbers beside the bar."""
        self._bar.update(self._task, numbers=numbers)
