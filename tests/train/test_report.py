"""The closing table and the curves, of whatever lines a run has left."""

import math

import pytest

from fastpref.train.report import by_metric, plot_curves, show_results, summarize

STEP = {"split": "train", "tokens_per_second": 100.0, "peak_memory_gib": 1.0}


def step(number, **metrics):
    return STEP | {"step": number, "examples": 8 * number} | metrics


# TDPO1: what the loss does not need stands in every tenth line
SPARSE = [
    step(1, **{"loss/train": 0.7, "kl_train/chosen": 0.0}),
    step(2, **{"loss/train": 0.6}),
    step(3, **{"loss/train": 0.5}),
]


def test_a_metric_of_some_lines_has_its_first_and_its_last_value(tmp_path):
    assert by_metric(SPARSE, "train") == {"loss/train": [0.7, 0.6, 0.5], "kl_train/chosen": [0.0]}
    text = summarize(SPARSE, tmp_path, 1.0)
    assert "0.7000" in text and "0.5000" in text and "kl_train/chosen" in text


@pytest.mark.parametrize(
    "records",
    [
        [],
        SPARSE,
        [{"split": "eval", "step": 0, "examples": 0, "loss/eval": math.nan}],
        [step(1, **{"loss/train": None}), step(2, **{"loss/train": 0.5})],
    ],
    ids=["no step", "sparse", "not finite", "null"],
)
def test_no_run_ends_at_its_closing_table(tmp_path, capsys, caplog, records):
    show_results(records, tmp_path, 1.0)
    assert "wall time" in capsys.readouterr().out
    assert not caplog.messages


def test_curves_that_cannot_be_drawn_are_a_warning(tmp_path, capsys, caplog):
    (tmp_path / "curves.png").mkdir()
    show_results(SPARSE, tmp_path, 1.0)
    assert "no curves.png" in caplog.text and "wall time" in capsys.readouterr().out
    with pytest.raises(OSError):
        plot_curves(SPARSE, tmp_path / "curves.png")
