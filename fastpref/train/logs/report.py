"""What a person sees: the closing table and `curves.png`."""

import io
import logging
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import harmonic_mean

from rich.console import Console
from rich.table import Table

from fastpref.errors import first_line
from fastpref.train.logs.metrics import Record, name_for_split

logger = logging.getLogger("fastpref")

MIN_WIDTH = 60
"""Columns of the closing table, at least."""

PANEL_WIDTH, PANEL_HEIGHT = 4.6, 3.2
"""Inches of a panel of the curves, its labels among them."""
INCHES_LEFT, INCHES_RIGHT, INCHES_BELOW, INCHES_ABOVE = 1.05, 0.2, 0.5, 0.35
"""Of those, what labels take beside its axes."""

PANELS = [
    # title, metrics (one line each), unit of the vertical axis
    ("loss", ["loss"], "mean over examples"),
    ("reward accuracy", ["rewards/accuracies"], "share of pairs"),
    ("reward margin", ["rewards/margins"], "chosen - rejected"),
    ("sequential KL", ["kl/chosen", "kl/rejected"], "nats per response"),
    ("log probability", ["logps/chosen", "logps/rejected"], "nats per response"),
]


def show_results(records: Sequence[Record], run_dir: Path, seconds: float) -> None:
    """`curves.png` and the closing table. The model is saved: neither of them may end the run.

    Args:
        records: Every line of metrics.jsonl.
        run_dir: The run folder.
        seconds: Wall time of the training, evaluations included.
    """
    try:
        plot_curves(records, run_dir / "curves.png")
    # matplotlib needs a font cache, space on the disk and much else
    except Exception as error:
        logger.warning("no curves.png: %s: %s", type(error).__name__, first_line(error))
    print_text(summarize(records, run_dir, seconds))


def print_text(text: str) -> None:
    """Print to stdout; that it takes no more is no reason for a finished run to fail."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        logger.warning("the closing table could not be printed: %s", error.strerror)


def summarize(records: Sequence[Record], run_dir: Path, seconds: float) -> str:
    """The closing table: held-out numbers before and after, and where the model is.

    Args: see `show_results`.
    """
    steps = [record for record in records if record["split"] == "train"]
    kind = "eval" if any(record["split"] == "eval" for record in records) else "train"
    table = Table(title=f"{run_dir.name}", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    for key, found in by_metric(records, kind).items():
        before = f"{found[0]:.4f}" if len(found) > 1 else ""
        table.add_row(key, before, f"{found[-1]:.4f}")
    if steps:
        rates = [record["tokens_per_second"] for record in steps]
        table.add_section()
        table.add_row("optimizer steps", "", str(steps[-1]["step"]))
        table.add_row("examples", "", str(steps[-1]["examples"]))
        table.add_row("tokens per second", "", f"{harmonic_mean(rates):,.0f}")
        table.add_row("peak memory", "", f"{steps[-1]['peak_memory_gib']:.2f} GiB")
    table.add_row("wall time", "", f"{seconds:.0f} s")
    return render(table, {"model": run_dir / "LATEST", "curves": run_dir / "curves.png"})


def by_metric(records: Sequence[Record], split: str) -> dict[str, list[float]]:
    """What the lines of a split say of each metric, in order; not every line tells all of them.

    Args:
        records: Lines of metrics.jsonl, with null or NaN for what is not finite.
        split: "train" or "eval".
    """
    found: dict[str, list[float]] = {}
    for record in records:
        for key, value in record.items():
            is_metric = key.split("/")[0].endswith(f"_{split}") or key == f"loss/{split}"
            if record["split"] == split and is_metric:
                found.setdefault(key, []).append(math.nan if value is None else value)
    return found


class Lines(io.StringIO):
    """Text in memory that is meant for a file of some encoding: ASCII has no lines for boxes."""

    encoding = "utf-8"


def render(table: Table, paths: Mapping[str, Path], *, width: int | None = None) -> str:
    """A closing table and below it the files that are there, as text.

    Args:
        table: The table.
        paths: By label.
        width: Columns of a text file; None: as stdout shows it, but never too narrow to read.
    """
    lines, stdout = Lines(), Console()
    if width is None:
        lines.encoding = stdout.encoding
        shown_width = max(stdout.width, MIN_WIDTH)
        console = Console(file=lines, width=shown_width, force_terminal=stdout.is_terminal)
    else:
        console = Console(file=lines, width=width)
    # names that users give are whole, however long, and their brackets are no marks
    title, table.title = table.title, None
    if title is not None:
        console.print(title, style="table.title", soft_wrap=True, highlight=False, markup=False)
    console.print(table)
    length = max(map(len, paths))
    for label, path in paths.items():
        if path.exists():
            line = f"{label:{length}}  {path}"
            console.print(line, soft_wrap=True, highlight=False, markup=False)
    return lines.getvalue()


def plot_curves(records: Sequence[Record], path: Path) -> None:
    """Training and held-out curves over examples seen, one panel a quantity.

    Args:
        records: Every line of metrics.jsonl; numbers that are not finite leave a gap.
        path: The PNG to write; not written if there is nothing to draw.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    known = {key for record in records for key, value in record.items() if is_finite(value)}
    panels = [
        panel
        for panel in PANELS
        if any(
            name_for_split(metric, split) in known
            for metric in panel[1]
            for split in ("train", "eval")
        )
    ]
    if not panels:
        return
    columns = min(3, len(panels))
    rows = -(-len(panels) // columns)
    width, height = PANEL_WIDTH * columns, PANEL_HEIGHT * rows
    figure, grid = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    # room for the labels: a layout that finds it out adds more than half to the drawing's time
    figure.subplots_adjust(
        left=INCHES_LEFT / width,
        right=1 - INCHES_RIGHT / width,
        bottom=INCHES_BELOW / height,
        top=1 - INCHES_ABOVE / height,
        wspace=(INCHES_LEFT + INCHES_RIGHT) / (PANEL_WIDTH - INCHES_LEFT - INCHES_RIGHT),
        hspace=(INCHES_BELOW + INCHES_ABOVE) / (PANEL_HEIGHT - INCHES_BELOW - INCHES_ABOVE),
    )
    for axes in grid.flat[len(panels) :]:
        axes.set_visible(False)
    for axes, (title, metrics, unit) in zip(grid.flat, panels, strict=False):
        for color, metric in zip(("tab:blue", "tab:orange"), metrics, strict=False):
            side = f" {metric.split('/')[-1]}" if len(metrics) > 1 else ""
            for split, style in (
                ("train", {"alpha": 0.35, "lw": 1}),
                ("eval", {"marker": "o", "ms": 3.5}),
            ):
                key = name_for_split(metric, split)
                points = [(r["examples"], r[key]) for r in records if is_finite(r.get(key))]
                if points:
                    label = ("held out" if split == "eval" else "train") + side
                    axes.plot(*zip(*points, strict=True), color=color, label=label, **style)
        axes.set_title(title)
        axes.set_xlabel("examples")
        axes.set_ylabel(unit)
        axes.grid(alpha=0.25)
        axes.legend(fontsize=7, frameon=False)
        for side_of_frame in ("top", "right"):
            axes.spines[side_of_frame].set_visible(False)
    figure.savefig(path, dpi=140)
    plt.close(figure)


def is_finite(value: object) -> bool:
    """Whether a metric is there and can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)
