"""The results of a run for people: the closing table and `curves.png`."""

import io
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path
from statistics import harmonic_mean
from typing import TypeGuard

from rich.console import Console
from rich.table import Table

from fastpref.errors import in_a_line
from fastpref.train.logs.metrics import Record, name_for_split

logger = logging.getLogger("fastpref")

MIN_WIDTH = 60
"""Least width of the closing table, in characters."""

PANEL_WIDTH, PANEL_HEIGHT = 4.6, 3.2
"""Size of a panel of curves including its labels, in inches."""
INCHES_LEFT, INCHES_RIGHT, INCHES_BELOW, INCHES_ABOVE = 1.05, 0.2, 0.5, 0.35
"""Margins of a panel for the labels around its axes, in inches."""

PANELS = [
    # title, metrics (one line each), unit of the vertical axis
    ("loss", ["loss"], "mean over examples"),
    ("reward accuracy", ["rewards/accuracies"], "share of pairs"),
    ("reward margin", ["rewards/margins"], "chosen - rejected"),
    ("sequential KL", ["kl/chosen", "kl/rejected"], "nats per response"),
    ("log probability", ["logps/chosen", "logps/rejected"], "nats per response"),
]


def show_results(records: Sequence[Record], run_dir: Path, seconds: float) -> None:
    """Write `curves.png` and print the closing table; a failure of either only logs a warning, as
    the model is already saved.

    Args:
        records: All records of metrics.jsonl.
        run_dir: The run folder.
        seconds: Wall time of the training in seconds, evaluations included.
    """
    drawn = [record for record in records if is_finite(record.get("examples"))]
    try_to_draw(partial(plot_curves, drawn), run_dir / "curves.png")
    print_text(summarize(records, run_dir, seconds))


def try_to_draw(plot: Callable[[Path], None], path: Path) -> bool:
    """Whether a picture could be drawn at `path`; if not, a warning says why."""
    try:
        plot(path)
    # matplotlib may fail in many ways: it needs a font cache, disk space and more
    except Exception as error:
        logger.warning("no %s: %s", path.name, in_a_line(error))
        return False
    return True


def print_text(text: str) -> None:
    """Print to stdout; a closed stdout only logs a warning, as the run has finished."""
    try:
        print(text, end="", flush=True)
    except OSError as error:
        logger.warning("the closing table could not be printed: %s", error.strerror)


def summarize(records: Sequence[Record], run_dir: Path, seconds: float) -> str:
    """The closing table as text: metrics before and after training, and the path of the model.

    Args: see `show_results`.
    """
    records = [record for record in records if _tells_of_a_run(record)]
    steps = [record for record in records if record["split"] == "train"]
    kind = kind_shown(records)
    starts, ends, after = True, True, "after"
    if kind == "eval":
        lines = [record for record in records if record["split"] == "eval"]
        # with do_first_eval=false there is none at step 0; a stopped run may have only that one
        starts, ends = lines[0]["step"] == 0, lines[-1]["step"] > 0
        if ends and steps and lines[-1]["step"] < steps[-1]["step"]:
            after = f"after {lines[-1]['examples']:,} examples"
    table = Table(title=run_dir.name, title_justify="left")
    for column in ("", "before", after):
        table.add_column(column, justify="left" if not column else "right")
    for key, found in by_metric(records, kind).items():
        before = short_number(found[0]) if starts and (len(found) > 1 or not ends) else ""
        table.add_row(key, before, short_number(found[-1]) if ends else "")
    if steps:
        given = (record.get("tokens_per_second") for record in steps)
        rates = [rate for rate in given if is_finite(rate) and rate > 0]
        peak = steps[-1].get("peak_memory_gib")
        table.add_section()
        table.add_row("optimizer steps", "", str(steps[-1]["step"]))
        table.add_row("examples", "", str(steps[-1]["examples"]))
        table.add_row("tokens per second", "", f"{harmonic_mean(rates or [0]):,.0f}")
        table.add_row("peak memory", "", f"{peak if is_finite(peak) else math.nan:.2f} GiB")
    table.add_row("wall time", "", f"{seconds:.0f} s")
    paths = {"model": "LATEST", "merged": "LATEST-merged", "curves": "curves.png"}
    return render(table, {label: run_dir / name for label, name in paths.items()})


def short_number(value: float) -> str:
    """A number with four decimals, or with two significant digits if all four would be zeros."""
    # adding 0.0 drops the sign of a negative zero
    return f"{value:.1e}" if 0 < abs(value) < 5e-5 else f"{value + 0.0:.4f}"


def _tells_of_a_run(record: Record) -> bool:
    """Whether a record has what each of ours has: split, step and examples."""
    numbers = (record.get("step"), record.get("examples"))
    return record.get("split") in ("train", "eval") and all(map(is_finite, numbers))


def kind_shown(records: Sequence[Record]) -> str:
    """The split whose metrics are shown: eval if there are any evaluations, else train."""
    return "eval" if any(record.get("split") == "eval" for record in records) else "train"


def by_metric(records: Sequence[Record], split: str) -> dict[str, list[float]]:
    """Values of each metric of a split, in the order of the records, some of which may lack it.

    Args:
        records: Records of metrics.jsonl, with null or NaN for non-finite values.
        split: "train" or "eval".
    """
    found: dict[str, list[float]] = {}
    for record in records:
        for key, value in record.items():
            is_metric = key.split("/")[0].endswith(f"_{split}") or key == f"loss/{split}"
            is_number = value is None or isinstance(value, int | float)
            if record.get("split") == split and is_metric and is_number:
                found.setdefault(key, []).append(math.nan if value is None else value)
    return found


class Lines(io.StringIO):
    """In-memory text with the encoding of its target: rich draws boxes in ASCII if it must."""

    encoding = "utf-8"


def render(table: Table, paths: Mapping[str, Path], *, width: int | None = None) -> str:
    """A table, and below it the paths of existing files, as text.

    Args:
        table: The table.
        paths: Paths by label; missing files are left out.
        width: Width in characters; None: that of stdout, but at least `MIN_WIDTH`.
    """
    lines, stdout = Lines(), Console()
    if width is None:
        lines.encoding = stdout.encoding
        shown_width = max(stdout.width, MIN_WIDTH)
        console = Console(file=lines, width=shown_width, force_terminal=stdout.is_terminal)
    else:
        console = Console(file=lines, width=width)
    # the user's names are neither wrapped nor read as rich markup
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
    """Plot training and held-out curves over examples seen, one panel per quantity.

    Args:
        records: All records of metrics.jsonl; non-finite values are left out.
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
    columns = 2 if len(panels) == 4 else min(3, len(panels))
    rows = -(-len(panels) // columns)
    width, height = PANEL_WIDTH * columns, PANEL_HEIGHT * rows
    figure, grid = plt.subplots(rows, columns, figsize=(width, height), squeeze=False)
    # fixed margins: computing them by a layout engine adds more than half to the drawing's time
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


def is_finite(value: object) -> TypeGuard[float]:
    """Whether a value is a finite number, which can be drawn."""
    return isinstance(value, int | float) and math.isfinite(value)
