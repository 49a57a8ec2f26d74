"""What a run folder tells of the steps before a checkpoint: each line once, and gaps are said."""

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from fastpref.complete_files import writing
from fastpref.errors import CheckpointError
from fastpref.train.resume.history import bring_history, read_records
from fastpref.train.state import RunState


def line(step: int, split: str, **numbers: float) -> str:
    return json.dumps({"step": step, "split": split, **numbers}) + "\n"


def brought(tmp_path: Path, lines: list[str], unwritten: list[str], **state: int) -> list[Any]:
    """(step, split) of what is brought from a folder's metrics; no lines: it has no such file."""
    if lines:
        (tmp_path / "metrics.jsonl").write_text("".join(lines))
    bring_history(tmp_path, tmp_path, RunState(**state), unwritten)
    return [(record["step"], record["split"]) for record in read_records(tmp_path)]


def test_an_evaluation_that_is_done_again_stands_there_once(tmp_path):
    steps = [line(1, "train"), line(2, "train")]
    refused = [line(2, "train"), line(2, "eval")]
    done, stopped = {"step": 2, "evaluated": 2}, {"step": 2, "evaluated": 0}
    expected = [(1, "train"), (2, "train")]
    assert brought(tmp_path, steps, refused, **stopped) == expected
    assert brought(tmp_path, steps, refused, **done) == [*expected, (2, "eval")]
    # nor does it stay where the file took it, or one that a kill cut short
    cut = line(2, "eval")[:-5]
    assert brought(tmp_path, [*steps, line(2, "eval"), cut], [], **stopped) == expected


def test_a_line_that_lacks_its_end_is_not_joined_to_the_next(tmp_path):
    cut = line(2, "train")[:-1]
    assert brought(tmp_path, [line(1, "train"), cut], [], step=2) == [(1, "train")]
    assert (tmp_path / "metrics.jsonl").read_text() == line(1, "train")


def test_lines_that_are_all_later_than_the_checkpoint_are_gone(tmp_path):
    (tmp_path / "samples.jsonl").write_text(line(3, "eval"))
    assert brought(tmp_path, [line(1, "train")], [], step=0) == []
    assert (tmp_path / "samples.jsonl").read_text() == ""


def test_lines_that_somebody_took_away_are_missed(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "fastpref")
    whole = [line(1, "train"), line(1, "eval"), line(2, "train"), line(3, "train")]
    assert len(brought(tmp_path, whole, [], step=2, evaluated=1)) == 3 and not caplog.text
    assert brought(tmp_path, whole[1:3], [], step=2, evaluated=1) == [(1, "eval"), (2, "train")]
    assert "has no line of 1 of the 2 steps that were done" in caplog.text
    (tmp_path / "metrics.jsonl").unlink()
    caplog.clear()
    assert brought(tmp_path, [], [line(2, "train")], step=2) == [(2, "train")]
    assert "has no line of 1 of the 2 steps" in caplog.text
    assert not (tmp_path / "samples.jsonl").exists()


def test_a_line_that_is_damaged_is_said_and_one_that_a_kill_cut_short_is_not(tmp_path, caplog):
    caplog.set_level(logging.WARNING, "fastpref")
    lines = [line(1, "train"), line(1, "eval"), line(1, "eval")[:-5]]
    assert len(brought(tmp_path, lines, [], step=1, evaluated=1)) == 2 and not caplog.text
    lines[1] = "k" + lines[1][1:]
    assert brought(tmp_path, lines[:2], [], step=1, evaluated=1) == [(1, "train")]
    assert 'metrics.jsonl: a damaged line is left out: \'k"step": 1' in caplog.text
    lines = [line(1, "train"), '{"step": "1"}\n', "[1]\n"]
    assert brought(tmp_path, lines, [], step=1, evaluated=1) == [(1, "train")]
    assert caplog.text.count("a line without a step is left out") == 2


def test_a_file_that_cannot_be_read_is_not_taken_for_a_folder_that_cannot_be_written(tmp_path):
    memory = Path("/proc/self/mem")
    if not memory.is_file():
        pytest.skip("needs a file whose reading fails, also for root")
    (tmp_path / "metrics.jsonl").symlink_to(memory)
    with (
        pytest.raises(CheckpointError, match=r"metrics\.jsonl: cannot be read: Input/output error"),
        writing(tmp_path),
    ):
        bring_history(tmp_path, tmp_path, RunState(step=1), [])
