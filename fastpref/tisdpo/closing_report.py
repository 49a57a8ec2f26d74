"""Results of `task=tisdpo`: that of each stage in words, and the closing report."""

import logging
from pathlib import Path

from rich.table import Table

from fastpref.complete_files import writing
from fastpref.model.files.paths import EXPORT_FOLDER, MERGED_FOLDER
from fastpref.tisdpo.report import WeightsReport
from fastpref.tisdpo.stage_record import read_record
from fastpref.tisdpo.stages import Stage
from fastpref.train.logs.report import by_metric, kind_shown, print_text, render
from fastpref.train.resume.history import read_records

logger = logging.getLogger("fastpref")


def describe_training(folder: Path) -> str:
    """The last held-out metrics of a training stage in words; without any, those of training."""
    records = read_records(folder)
    kind = kind_shown(records)
    where = "held-out " if kind == "eval" else ""
    last = {key: values[-1] for key, values in by_metric(records, kind).items()}
    words = {
        f"loss/{kind}": f"{where}loss",
        f"rewards_{kind}/accuracies": "accuracy",
        f"rewards_{kind}/margins": "margin",
    }
    return ", ".join(f"{word} {last[key]:.3f}" for key, word in words.items() if key in last)


def describe_weights(reports: list[WeightsReport]) -> str:
    """The estimated weights of the first dataset in words."""
    report = reports[0]
    words = f"{len(report.chosen) + len(report.rejected):,} tokens"
    if report.auc is not None:
        return f"{words}, planted tokens: ROC-AUC {report.auc:.3f}"
    return f"{words}, mean {report.chosen.mean():+.3f}, {report.rejected.mean():+.3f}"


def link_model(run_dir: Path, last: Stage) -> None:
    """Link `LATEST` and `LATEST-merged` of the last stage into the run folder, so that it can be
    used like any other's; a file system without symbolic links gets only a warning."""
    for name in (EXPORT_FOLDER, MERGED_FOLDER):
        link = run_dir / name
        if link.is_dir() and not link.is_symlink():
            logger.info("%s stays: a copy that followed links has the model itself there", link)
            continue
        model = Path(last.name, name)
        try:
            link.unlink(missing_ok=True)
            if (run_dir / model).is_dir():
                link.symlink_to(model)
        except OSError as error:
            logger.warning("%s is no link to %s: %s", link, run_dir / model, error.strerror)


def print_report(run_dir: Path, stages: list[Stage]) -> None:
    """Print the closing report, and write it to `summary.txt`."""
    table = Table(title=f"{run_dir.name}", title_justify="left")
    for column in ("stage", "what", "result", "seconds"):
        table.add_column(column, justify="right" if column == "seconds" else "left")
    total = 0.0
    for stage in stages:
        record = read_record(run_dir / stage.name)
        total += record["seconds"]
        table.add_row(stage.name, record["what"], record["result"], f"{record['seconds']:.0f}")
    table.add_section()
    table.add_row("all", "", "", f"{total:.0f}")
    paths = {
        "model": _linked(run_dir, stages[-1], EXPORT_FOLDER),
        "merged": _linked(run_dir, stages[-1], MERGED_FOLDER),
        "curves": run_dir / stages[-1].name / "curves.png",
        "weights": run_dir / "weights" / stages[-1].config.datasets[0] / "weights.html",
    }
    with writing(run_dir / "summary.txt"):
        (run_dir / "summary.txt").write_text(render(table, paths, width=120), encoding="utf-8")
    print_text(render(table, paths))


def _linked(run_dir: Path, last: Stage, name: str) -> Path:
    """A folder of the last stage, by its link in the run folder if there is one."""
    link = run_dir / name
    return link if link.is_dir() else run_dir / last.name / name
