"""Runs on datasets mixed by shares with held-out prompts: stopped, on two ranks, gone on with."""

import json
from pathlib import Path

import pytest
from ranks import run_on_ranks
from stopped_runs import assert_same_end, lines_of, run, run_in_starts, small_command
from tiny_models import save_tiny_model, text_rows, write_rows

STEPS = 10


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("mixed")
    # no test split in either
    write_rows(base / "large", "train", text_rows(60, seed=1))
    write_rows(base / "small", "train", text_rows(12, seed=2))
    save_tiny_model(base / "model")
    return base


def arguments(base: Path, run_dir: Path, *options: str) -> list[str]:
    mix = ("datasets=[large,small]", "data.shares=[0.4,0.6]", "data.test_fraction=0.2")
    length = (f"n_examples={8 * STEPS}", "warmup_steps=3", "eval_every=1000")
    return small_command(base, run_dir, *mix, *length, *options)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run(arguments(base, run_dir)) == 0
    return run_dir


def test_stopped_again_and_again_a_mixed_run_ends_bitwise_the_same(base, whole, tmp_path):
    codes = run_in_starts(arguments(base, tmp_path / "cut"), 3)
    assert codes == [75, 75, 75, 0]
    assert_same_end(tmp_path / "cut", whole, files=["LATEST/model.safetensors"])


def train_here(base: Path, run_dir: Path) -> None:
    assert run(arguments(base, run_dir)) == 0


def test_two_ranks_take_the_same_rows_in_the_same_order(base, whole, tmp_path):
    run_on_ranks(train_here, 2, base, tmp_path / "two")
    ours, expected = lines_of(tmp_path / "two"), lines_of(whole)
    assert len(ours) == len(expected) == STEPS + 2
    for one, other in zip(ours, expected, strict=True):
        assert one["examples"] == other["examples"]
        name = f"logps_{one['split']}/chosen"
        assert one[name] == pytest.approx(other[name], rel=1e-4)


@pytest.mark.parametrize(
    ("option", "named"),
    [
        ("data.test_fraction=0.4", "data was"),
        ("data.shares=[0.5,0.5]", "data.shares was [0.4, 0.6], is [0.5, 0.5]"),
    ],
)
def test_another_fraction_or_share_is_another_run(base, whole, tmp_path, option, named, capsys):
    before = json.dumps(lines_of(whole))
    assert run([*arguments(base, whole), "resume=auto", option]) == 4
    message = capsys.readouterr().err
    assert named in message and "CHANGES THE NUMBERS" in message
    assert json.dumps(lines_of(whole)) == before


def test_the_log_says_shares_and_passes(base, tmp_path, capsys):
    assert run(arguments(base, tmp_path / "run", "n_eval_examples=0", "n_examples=8")) == 0
    log = capsys.readouterr().err
    assert "data.test_fraction=0.2: small has no test split" in log
    assert "share 0.6, passed" in log and "the run 8" in log
