"""The closing table and the curves take what a run may leave: every metric in every line or not."""

import itertools
import logging
import math
import sys

import pytest
from matplotlib import pyplot
from rich.table import Table

from fastpref.train.logs.report import (
    MIN_WIDTH,
    by_metric,
    plot_curves,
    render,
    show_results,
    summarize,
)

pytestmark = pytest.mark.looks_at_pictures


def line(split: str, step: int, **metrics: object) -> dict[str, object]:
    names = {"loss": f"loss/{split}", "kl": f"kl_{split}/chosen"}
    record = {"step": step, "examples": 8 * step, "split": split, "lr": 1e-6}
    record |= {"tokens_per_second": 1000.0, "peak_memory_gib": 0.5}
    return record | {names[name]: value for name, value in metrics.items()}


# as TDPO1 writes them: the KL stands in the first line and in every tenth one
SPARSE = [line("train", 1, loss=0.7, kl=0.0), line("train", 2, loss=0.6)]
SPARSE += [line("train", 11, loss=0.5, kl=2.0), line("train", 12, loss=0.4)]


def row(table: str, name: str) -> list[str]:
    """Cells of a table's row."""
    (found,) = [line for line in table.splitlines() if name in line]
    return [cell.strip() for cell in found.strip("│|").replace("|", "│").split("│")]


def test_a_metric_goes_from_the_first_to_the_last_line_that_has_it(tmp_path):
    table = summarize(SPARSE, tmp_path, 1.0)
    assert row(table, "loss/train") == ["loss/train", "0.7000", "0.4000"]
    assert row(table, "kl_train/chosen") == ["kl_train/chosen", "0.0000", "2.0000"]
    # held-out lines, where there are any, are what is shown; one of them has no before
    table = summarize([*SPARSE, line("eval", 12, loss=0.3)], tmp_path, 1.0)
    assert row(table, "loss/eval") == ["loss/eval", "", "0.3000"]
    assert "loss/train" not in table and row(table, "optimizer steps")[-1] == "12"


def test_held_out_numbers_stand_under_the_time_that_they_are_of(tmp_path):
    steps = [line("train", step, loss=0.6) for step in (1, 2, 3)]
    start, middle, end = (
        line("eval", step, loss=loss) for step, loss in ((0, 0.7), (2, 0.5), (3, 0.4))
    )
    # stopped before the second evaluation
    table = summarize([start, *steps], tmp_path, 1.0)
    assert row(table, "loss/eval") == ["loss/eval", "0.7000", ""]
    # and behind it, two steps of eight examples from the start
    table = summarize([start, *steps, middle], tmp_path, 1.0)
    assert (
        row(table, "loss/eval") == ["loss/eval", "0.7000", "0.5000"]
        and "after 16 examples" in table
    )
    # do_first_eval=false: nothing is known of before
    table = summarize([*steps, middle, end], tmp_path, 1.0)
    assert row(table, "loss/eval") == ["loss/eval", "", "0.4000"] and "after 16 " not in table


@pytest.mark.parametrize(
    ("records", "shown"),
    [
        ([], "wall time"),
        ([line("eval", 0, loss=0.7)], "loss/eval"),
        ([line("train", 1, loss=math.nan), line("train", 2, loss=None)], "nan"),
        ([line("train", 1, loss=math.inf), line("train", 2, loss=0.1)], "inf"),
    ],
)
def test_a_run_that_was_stopped_early_or_diverged_has_a_table_and_curves(tmp_path, records, shown):
    assert shown in summarize(records, tmp_path, 1.0)
    plot_curves(records, tmp_path / "curves.png")
    # a picture of nothing is none
    is_drawn = any(isinstance(r.get(f"loss/{r['split']}"), float) for r in records)
    is_finite = is_drawn and not math.isnan(by_metric(records, records[0]["split"]).popitem()[1][0])
    assert (tmp_path / "curves.png").exists() == is_finite


def test_a_small_metric_is_not_shown_as_zero_nor_zero_as_negative(tmp_path):
    values = (-0.0, -8.77e-7), (-4.9e-5, 5.1e-5)
    for (before, after), shown in zip(
        values, (["0.0000", "-8.8e-07"], ["-4.9e-05", "0.0001"]), strict=True
    ):
        records = [line("eval", 0, loss=before), line("eval", 1, loss=after)]
        assert row(summarize(records, tmp_path, 1.0), "loss/eval")[1:] == shown


def test_four_panels_fill_the_picture(tmp_path, monkeypatch):
    dpo = ("loss/eval", "rewards_eval/accuracies", "rewards_eval/margins", "logps_eval/chosen")
    records = [line("eval", step) | dict.fromkeys(dpo, 0.5) for step in (0, 1)]
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    plot_curves(records, tmp_path / "curves.png")
    assert [axes.get_visible() for axes in figures[0].axes] == [True] * 4


@pytest.mark.parametrize("size", [1e-7, 2.5e-4, 0.7, 123.4, 98_765.4, 1e12])
@pytest.mark.parametrize("metrics", [["loss"], ["loss", "kl"]])
def test_no_label_leaves_its_panel(tmp_path, monkeypatch, size, metrics):
    records = [
        line("train", step, **dict.fromkeys(metrics, value))
        for step, value in ((1, -size), (50_000, 1.0001 * size), (200_000, -0.9999 * size))
    ]
    figures = []
    monkeypatch.setattr(pyplot, "close", figures.append)
    plot_curves(records, tmp_path / "curves.png")
    [figure] = figures
    panels = [axes for axes in figure.axes if axes.get_visible()]
    assert len(panels) == len(metrics)
    boxes = [axes.get_tightbbox() for axes in panels]
    for box in boxes:
        assert figure.bbox.containsx(box.x0) and figure.bbox.containsx(box.x1), box
        assert figure.bbox.containsy(box.y0) and figure.bbox.containsy(box.y1), box
    assert all(one.x1 <= other.x0 for one, other in itertools.pairwise(boxes))


def test_the_table_names_the_files_that_are_there(tmp_path):
    # of a name that is wider than the table, with what looks like a mark of rich
    run_dir = tmp_path / f"{'long ' * 20}[b]name"
    (run_dir / "LATEST").mkdir(parents=True)
    table = summarize(SPARSE, run_dir, 1.0)
    assert table.splitlines()[0] == run_dir.name
    assert str(run_dir / "LATEST") in table and "curves.png" not in table
    assert "merged" not in table
    (run_dir / "LATEST-merged").mkdir()
    assert f"merged  {run_dir / 'LATEST-merged'}" in summarize(SPARSE, run_dir, 1.0).splitlines()


def test_lines_that_are_none_of_ours_do_not_end_a_run(tmp_path, caplog):
    odd: list[dict[str, object]] = [{"step": 3, "note": "x"}, {"split": "train"}]
    odd += [{"step": 4, "split": "train", "loss/train": "low", "tokens_per_second": None}]
    caplog.set_level(logging.WARNING)
    show_results([*odd, *SPARSE, *odd], tmp_path, 1.0)
    assert (tmp_path / "curves.png").exists() and not caplog.text
    table = summarize([*SPARSE, *odd], tmp_path, 1.0)
    assert row(table, "loss/train")[-1] == "0.4000"
    assert row(table, "tokens per second")[-1] == "1,000"


def test_neither_a_plot_nor_a_table_that_fails_ends_a_run(tmp_path, monkeypatch, caplog):
    (tmp_path / "curves.png").mkdir()
    caplog.set_level(logging.WARNING)
    with open("/dev/full", "w", encoding="ascii") as full:
        monkeypatch.setattr(sys, "stdout", full)
        show_results(SPARSE, tmp_path, 1.0)
        monkeypatch.undo()
        # what is still buffered cannot be written on closing either
        with pytest.raises(OSError, match="No space left"):
            full.close()
    no_curves, no_table = caplog.messages
    assert no_curves.startswith("no curves.png: IsADirectoryError")
    assert no_table == "the closing table could not be printed: No space left on device"


@pytest.mark.parametrize("columns", ["1", "10", "200"])
def test_no_terminal_is_too_narrow_and_no_encoding_too_poor_for_the_table(
    tmp_path, monkeypatch, columns
):
    monkeypatch.setenv("COLUMNS", columns)
    table = Table()
    table.add_column("metric", no_wrap=False)
    table.add_row("x" * (MIN_WIDTH - 10))
    with (tmp_path / "out").open("w", encoding="ascii") as out:
        monkeypatch.setattr(sys, "stdout", out)
        text = render(table, {"model": tmp_path})
        monkeypatch.undo()
    assert text.isascii() and "x" * (MIN_WIDTH - 10) in text
