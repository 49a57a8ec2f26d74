"""Trackers are checked before anything is loaded, and may fail later without ending the run."""

import logging
from pathlib import Path

import pytest
from ranks import ALONE
from tiny_models import read_metrics

import train
from fastpref.cli.command_line import main
from fastpref.config.trackers import WandbConfig
from fastpref.errors import CheckpointError
from fastpref.train.logs.metrics import MetricsLog
from fastpref.train.logs.trackers import WandbTracker

# stands in for the service's package, which tests neither install nor reach
WANDB = """
class UsageError(Exception):
    pass

def login():
    raise UsageError("No API key configured.")

class Run:
    lines = 0

    def log(self, values, step):
        self.lines += 1
        is_held_out = "loss/eval" in values
        assert is_held_out != ("tokens_per_second" in values) and is_held_out != ("lr" in values)
        if self.lines == 3:
            raise ConnectionError("the service does not answer")

    def finish(self):
        raise AssertionError("one that failed is not asked again")

def init(**options):
    return Run()
"""


@pytest.fixture
def packages(tmp_path, monkeypatch) -> Path:
    """A folder of packages that come before all others; gone with the test."""
    folder = tmp_path / "packages"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    for name in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        monkeypatch.delitem(train.sys.modules, name, raising=False)
    yield folder
    for name in ("wandb", "tensorboard", "torch.utils.tensorboard"):
        train.sys.modules.pop(name, None)


def run(run_dir: Path, *options: str) -> int:
    arguments = ["n_examples=96", "n_eval_examples=8", "eval_batch_size=8", "warmup_steps=0"]
    arguments += ["sample_during_eval=false", "minimum_log_interval_secs=0", f"run_dir={run_dir}"]
    return main([*arguments, *options], train.compose_choices, train.CONFIG_DIR)


def test_without_a_login_nothing_is_loaded_and_the_same_command_works_later(
    tmp_path, packages, monkeypatch, capsys
):
    (packages / "wandb.py").write_text(WANDB)
    run_dir = tmp_path / "run"
    monkeypatch.delenv("WANDB_MODE", raising=False)
    assert run(run_dir, "wandb.enabled=true") == 2
    error = capsys.readouterr().err
    assert "wandb.enabled=true: No API key configured; log in with `wandb login`" in error
    assert "WANDB_MODE=offline" in error and "TDPO2 of tiny" not in error
    assert not run_dir.exists()
    # in a trial run nothing is sent, so nobody has to be logged in
    assert run(run_dir, "wandb.enabled=true", "debug=true") == 0

    run_dir = tmp_path / "later"
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert run(run_dir, "wandb.enabled=true") == 0
    error = capsys.readouterr().err
    (line,) = [line for line in error.splitlines() if "follows the run no longer" in line]
    assert line.startswith("Weights & Biases failed") and "the service does not answer" in line
    assert len(read_metrics(run_dir, "train")) == 3 and (run_dir / "LATEST").exists()


@pytest.mark.parametrize("tracker", ["wandb", "tensorboard"])
def test_a_package_that_cannot_be_imported_is_refused_first(tmp_path, packages, capsys, tracker):
    (packages / f"{tracker}.py").write_text("import a_package_that_is_missing\n")
    assert run(tmp_path / "run", f"{tracker}.enabled=true") == 2
    error = capsys.readouterr().err
    assert f"{tracker}.enabled=true" in error and "a_package_that_is_missing" in error
    assert "TDPO2 of tiny" not in error and not (tmp_path / "run").exists()


def test_a_tracker_that_does_not_start_is_left_out_with_a_warning(
    tmp_path, packages, monkeypatch, capsys
):
    (packages / "wandb.py").write_text("def init(**options):\n    raise TimeoutError('busy')\n")
    monkeypatch.setenv("WANDB_MODE", "offline")
    assert run(tmp_path / "run", "wandb.enabled=true") == 0
    assert "Weights & Biases does not follow this run: busy" in capsys.readouterr().err


def test_a_run_is_one_there_though_it_was_killed_before_it_had_a_name(tmp_path, packages):
    (packages / "wandb.py").write_text("def init(**options):\n    return options\n")
    (tmp_path / "wandb-id").touch()
    before = (tmp_path / "wandb-id").stat().st_ino
    names = [WandbTracker(WandbConfig(), tmp_path, {})._run["id"] for _ in range(2)]
    assert names[0] and names[0] == names[1]
    # not written in its place, where a kill would leave half of it
    assert (tmp_path / "wandb-id").stat().st_ino != before


def test_a_file_of_numbers_that_cannot_be_written_is_said_once(caplog):
    class Follower:
        name = "follower"

        def __init__(self) -> None:
            self.steps: list[int] = []

        def log(self, record: dict[str, int]) -> None:
            self.steps.append(record["step"])

        def close(self) -> None:
            raise OSError("gone")

    follower = Follower()
    log = MetricsLog(
        path=Path("/dev/full"),
        min_interval_seconds=0,
        world=ALONE,
        trackers=[follower],
    )
    with pytest.raises(CheckpointError, match="/dev/full: cannot be written: No space left"):
        log.write({"step": 1, "examples": 8, "split": "train"})
    log.write({"step": 2, "examples": 16, "split": "train"})
    assert follower.steps == [1, 2] and [record["step"] for record in log.records] == [1, 2]
    with caplog.at_level(logging.WARNING):
        log.close()
    assert caplog.messages == [
        "follower failed and follows the run no longer: gone; /dev/full has all numbers"
    ]
