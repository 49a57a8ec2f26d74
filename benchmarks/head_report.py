"""Table and plot of the LM-head benchmark."""

from pathlib import Path
from typing import Any

COLUMNS = {
    "milliseconds": ("ms", "{:.1f}"),
    "ratio": ("x ours", "{:.2f}"),
    "extra_mib": ("extra MiB", "{:.0f}"),
    "logp_error": ("logp error", "{:.1e}"),
    "value_error": ("value error", "{:.1e}"),
    "kl_error": ("KL error", "{:.1e}"),
    "input_grad_error": ("dH error", "{:.1e}"),
    "weight_grad_error": ("dW error", "{:.1e}"),
}
COLORS = {"fastpref": "#d1495b", "fastpref half": "#dd7480", "fastpref large": "#e99aa6"}
OTHER = "#7d8ca3"


def table(results: list[dict], *, markdown: bool = False) -> str:
    """One line per result; ratios are relative to fastpref with its small workspace."""
    heads = ["case", "job", "contender", *(title for title, _ in COLUMNS.values()), "remark"]
    body = [
        [f"{row['shape']} N={row['rows']}", row["job"], row["contender"], *_cells(row, results)]
        for row in results
    ]
    if markdown:
        lines = [heads, ["---"] * len(heads), *body]
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)
    widths = [max(len(line[i]) for line in [heads, *body]) for i in range(len(heads))]
    return "\n".join(
        "  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)).rstrip()
        for line in [heads, *body]
    )


def write_plot(record: dict[str, Any], path: Path) -> None:
    """Bar charts of time and memory, one panel per case and job that was timed."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot as plt

    panels: dict[tuple[str, int, str], list[dict]] = {}
    for row in record["results"]:
        if row.get("milliseconds") is not None:
            panels.setdefault((row["shape"], row["rows"], row["job"]), []).append(row)
    if not panels:
        return
    height = max(len(rows) for rows in panels.values()) * 0.26 + 0.7
    figure, axes = plt.subplots(
        len(panels), 2, figsize=(11, height * len(panels) + 0.6), squeeze=False
    )
    fields = [("milliseconds", "milliseconds"), ("extra_mib", "extra MiB at the peak")]
    for (key, rows), pair in zip(panels.items(), axes, strict=True):
        for axis, (field, label) in zip(pair, fields, strict=True):
            _bars(axis, rows, field)
            axis.set_xlabel(label)
        shape, num_rows, job = key
        pair[0].set_title(f"{shape}, {num_rows} tokens: {job}", loc="left", fontsize=10)
    figure.suptitle(f"{record['device']}, {record['date']}, torch {record['torch']}", fontsize=11)
    figure.tight_layout()
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _bars(axis: Any, rows: list[dict], field: str) -> None:
    ordered = sorted(rows, key=lambda row: -row[field])
    names = [row["contender"] for row in ordered]
    values = [row[field] for row in ordered]
    axis.barh(names, values, color=[COLORS.get(name, OTHER) for name in names])
    for i, value in enumerate(values):
        axis.text(value, i, f" {value:.3g}", va="center", fontsize=8)
    axis.set_xlim(0, max(values) * 1.15 or 1)
    axis.tick_params(labelsize=8)
    axis.spines[["top", "right"]].set_visible(False)


def _cells(row: dict, results: list[dict]) -> list[str]:
    values = dict(row)
    ours = [
        other["milliseconds"]
        for other in results
        if other["contender"] == "fastpref"
        and [other[key] for key in ("shape", "rows", "job")]
        == [row[key] for key in ("shape", "rows", "job")]
        and other.get("milliseconds")
    ]
    if ours and row.get("milliseconds"):
        values["ratio"] = row["milliseconds"] / ours[0]
    numbers = [
        form.format(values[name]) if values.get(name) is not None else ""
        for name, (_, form) in COLUMNS.items()
    ]
    remark = row.get("failure") or (f"did not run: {row['absent']}" if "absent" in row else "")
    return [*numbers, remark or row["note"]]
