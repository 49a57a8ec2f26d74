"""What a person sees: the closing table and `curves.png`."""

from collections.abc import Sequence
from pathlib import Path
from statistics import harmonic_mean

from rich.console import Console
from rich.table import Table

from fastpref.metrics import Record, name_for_split

PANELS = [
    # title, metrics (one line each), unit of the vertical axis
    ("loss", ["loss"], "nats per pair"),
    ("reward accuracy", ["rewards/accuracies"], "share of pairs"),
    ("reward margin", ["rewards/margins"], "chosen - rejected"),
    ("sequential KL", ["kl/chosen", "kl/rejected"], "nats per response"),
    ("log probability", ["logps/chosen", "logps/rejected"], "nats per response"),
]


def print_summary(records: Sequence[Record], run_dir: Path, seconds: float) -> None:
    """The closing table: held-out numbers before and after, and where the model is.

    Args:
        records: Every line of metrics.jsonl.
        run_dir: The run folder.
        seconds: Wall time of the training, evaluations included.
    """
    evals = [record for record in records if record["split"] == "eval"]
    steps = [record for record in records if record["split"] == "train"]
    table = Table(title=f"{run_dir.name}", title_justify="left")
    for column in ("", "before", "after"):
        table.add_column(column, justify="left" if not column else "right")
    kind, rows = ("eval", evals) if evals else ("train", steps)
    if rows:
        for key, first in rows[0].items():
            if key.split("/")[0].endswith(f"_{kind}") or key == f"loss/{kind}":
                table.add_row(key, f"{first:.4f}", f"{rows[-1][key]:.4f}")
    if steps:
        rate = harmonic_mean([record["tokens_per_second"] for record in steps])
        table.add_section()
        table.add_row("optimizer steps", "", str(steps[-1]["step"]))
        table.add_row("examples", "", str(steps[-1]["examples"]))
        table.add_row("tokens per second", "", f"{rate:,.0f}")
        table.add_row("peak memory", "", f"{steps[-1]['peak_memory_gib']:.2f} GiB")
    table.add_row("wall time", "", f"{seconds:.0f} s")
    console = Console()
    console.print(table)
    for label, name in (("model ", "LATEST"), ("curves", "curves.png")):
        console.print(f"{label}  {run_dir / name}", soft_wrap=True, highlight=False)


def plot_curves(records: Sequence[Record], path: Path) -> None:
    """Training and held-out curves over examples seen, one panel a quantity.

    Args:
        records: Every line of metrics.jsonl.
        path: The PNG to write.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    known = {key for record in records for key in record}
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
    figure, grid = plt.subplots(
        rows, columns, figsize=(4.6 * columns, 3.2 * rows), squeeze=False, layout="constrained"
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
                points = [(r["examples"], r[key]) for r in records if key in r]
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
