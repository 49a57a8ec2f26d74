"""A disk that is full, a folder that is gone or read-only: the run goes on, says so, and ends with
4, and what was saved before stays usable. Nothing is copied into memory that may not hold it."""

import shlex
import signal
import subprocess
from contextlib import suppress
from itertools import count
from pathlib import Path
from unittest.mock import Mock

import pytest
from tiny_models import read_metrics, save_tiny_model, text_rows, write_rows

import train
from fastpref.checkpoint import store
from fastpref.checkpoint.folders import find_newest
from fastpref.checkpoint.store import SaveReport
from fastpref.cli.command_line import main
from fastpref.errors import CheckpointError
from fastpref.train import checkpoints, ending, loop


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("disk")
    write_rows(base / "words", "train", text_rows(32, seed=1))
    write_rows(base / "words", "test", text_rows(4, seed=2))
    save_tiny_model(base / "model")
    return base


def run(base: Path, run_dir: Path, *options: str) -> int:
    arguments = [
        *("model=blank_model", f"model.name_or_path={base / 'model'}", "model.fsdp_policy_mp=null"),
        *("datasets=[words]", f"base_data_dir={base}", f"run_dir={run_dir}", "max_length=64"),
        *("max_prompt_length=32", "batch_size=4", "lr=1e-3", "warmup_steps=0", "loss=dpo"),
        *("n_eval_examples=0", "minimum_log_interval_secs=0", "checkpoint.every=2", *options),
    ]
    return main(arguments, train.compose_choices, train.CONFIG_DIR)


def test_a_disk_without_room_for_a_second_checkpoint_costs_no_step(base, small_disk, capsys):
    run_dir = small_disk / "run"
    assert run(base, run_dir, "checkpoint.keep=3") == 4
    said = capsys.readouterr().err
    assert "do not fit into" in said
    assert "NO CHECKPOINT: step 8 was not saved" in said
    assert len(read_metrics(run_dir, "train")) == 8
    # once there is room again, the run ends as it should
    newest = find_newest(run_dir / "checkpoints")
    assert newest is not None and newest.step < 8
    subprocess.run(["mount", "-o", "remount,size=16m", str(small_disk)], check=True)
    assert run(base, run_dir, "checkpoint.keep=3", "resume=auto") == 0
    assert len(read_metrics(run_dir, "train")) == 8


def fill(disk: Path) -> None:
    with suppress(OSError), (disk / "others").open("wb", buffering=0) as file:
        while file.write(bytes(4096)):
            pass


def test_what_ended_the_training_is_said_beside_the_model_that_cannot_be_written(
    base, small_disk, capsys, monkeypatch
):
    real = loop.train_step

    def train_step(run, batches, step):
        if step == 3:
            fill(small_disk)
        return real(run, batches, step)

    monkeypatch.setattr(loop, "train_step", train_step)
    assert run(base, small_disk / "run", "checkpoint.every=4", "n_epochs=8") == 4
    *before, last = capsys.readouterr().err.splitlines()
    saves = [line for line in before if "NO CHECKPOINT" in line]
    assert [line.endswith("; training goes on") for line in saves[-2:]] == [True, False]
    parts = "metrics.jsonl: cannot be written", "LATEST: cannot be written", "was not saved"
    places = [last.find(part) for part in parts]
    assert -1 < places[0] < places[1] < places[2], last


def test_a_model_that_cannot_be_written_takes_no_state_along(base, small_disk, capsys, monkeypatch):
    real = ending.export_model

    def export_model(*args):
        fill(small_disk)
        return real(*args)

    monkeypatch.setattr(ending, "export_model", export_model)
    run_dir = small_disk / "it's my run"
    assert run(base, run_dir, "checkpoint.every=0") == 4
    last = capsys.readouterr().err.splitlines()[-1]
    assert "LATEST: cannot be written" in last
    # as a shell takes it
    said = last.partition("the state is saved, ")[2].partition(" goes on after step 8")[0]
    assert shlex.split(said) == ["resume=auto", f"run_dir={run_dir}"]
    monkeypatch.undo()
    (small_disk / "others").unlink()
    assert run(base, run_dir, "checkpoint.every=0", "resume=auto") == 0
    assert (run_dir / "LATEST" / "model.safetensors").is_file()


def test_of_a_run_stopped_before_its_first_step_no_state_is_said_to_be_saved(
    base, tmp_path, capsys, monkeypatch
):
    real = loop.evaluate

    def evaluate(run, stop):
        signal.raise_signal(signal.SIGTERM)
        return real(run, stop)

    def export_model(*args):
        raise CheckpointError("LATEST: cannot be written")

    monkeypatch.setattr(loop, "evaluate", evaluate)
    monkeypatch.setattr(ending, "export_model", export_model)
    run_dir = tmp_path / "run"
    assert run(base, run_dir, "n_eval_examples=4", "sample_during_eval=false") == 4
    last = capsys.readouterr().err.splitlines()[-1]
    expected = f"LATEST: cannot be written; resume=auto run_dir={run_dir} goes on after step 0"
    assert last == f"fastpref: {expected}"


def put_file(folder: Path) -> None:
    """Put a file in a folder's place, also if a writer makes the folder anew meanwhile."""
    for number in count():
        folder.rename(folder.parent.with_name(f"away-{number}"))
        try:
            folder.write_text("")
            return
        except IsADirectoryError:
            pass


@pytest.mark.parametrize("asynchronous", ["sync", "async"])
def test_a_checkpoint_folder_that_is_a_file_meanwhile_costs_no_step(
    base, tmp_path, asynchronous, capsys, monkeypatch
):
    run_dir = tmp_path / "run"
    real = loop.train_step

    def train_step(run, batches, step):
        if step == 3:
            put_file(run_dir / "checkpoints")
        return real(run, batches, step)

    monkeypatch.setattr(loop, "train_step", train_step)
    assert run(base, run_dir, f"checkpoint.mode={asynchronous}") == 4
    said = capsys.readouterr().err
    assert said.count("NO CHECKPOINT") >= 3 and "LATEST has the model" in said
    assert (run_dir / "LATEST" / "model.safetensors").is_file()
    assert len(read_metrics(run_dir, "train")) == 8


@pytest.mark.parametrize("mode", ["sync", "async"])
def test_a_best_that_could_not_be_saved_leaves_its_place_to_the_next(
    base, tmp_path, monkeypatch, mode
):
    losses = {2: 0.5, 4: 0.6, 6: 0.7, 8: 0.8}
    evaluate, write = loop.evaluate, store.write_checkpoint

    def evaluated(run, stop):
        record = evaluate(run, stop)
        return record | {"loss/eval": losses[record["step"]]}

    def refused_once(folder, snapshot, agreement):
        if snapshot.step == 2:
            raise CheckpointError("step 2 was not saved: no space left")
        return write(folder, snapshot, agreement)

    monkeypatch.setattr(loop, "evaluate", evaluated)
    monkeypatch.setattr(store, "write_checkpoint", refused_once)
    options = ["n_eval_examples=4", "eval_every=8", "do_first_eval=false", "checkpoint.every=0"]
    options += ["sample_during_eval=false", "checkpoint.keep=1", "checkpoint.keep_best=loss/eval"]
    assert run(base, tmp_path / "run", *options, f"checkpoint.mode={mode}") == 0
    kept = {path.name for path in (tmp_path / "run" / "checkpoints").glob("step-*")}
    assert kept == {"step-00000004", "step-00000008"}


def test_a_copy_that_the_host_may_not_hold_is_not_made(monkeypatch):
    monkeypatch.setattr("fastpref.host.available_memory", lambda: 100)
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    # a GPU's copies may take twice their bytes
    for num_bytes, pinned, beside in [(24, False, True), (25, False, False), (24, True, False)]:
        assert checkpoints.writes_beside("auto", num_bytes, pinned=pinned) == beside
        assert checkpoints.writes_beside("async", num_bytes, pinned=pinned)
        assert not checkpoints.writes_beside("sync", num_bytes, pinned=pinned)
    assert checkpoints.writes_beside("auto", 12, pinned=True)


def test_a_deadline_is_told_once_of_a_save_that_training_waits_for():
    report = SaveReport(
        step=1, folder=Path("step"), num_bytes=0, standstill_seconds=6.0, write_seconds=5.0
    )
    for asynchronous, seconds in ((True, 22.0), (False, 12.0)):
        deadline = Mock()
        saves = Mock(_deadline=deadline)
        saves._run.world.is_main = False
        saves._store.asynchronous = asynchronous
        checkpoints.Checkpoints._hear(saves, [report])
        deadline.expect.assert_called_once_with(seconds)


@pytest.mark.parametrize("is_shortage", [False, True])
def test_a_last_state_that_memory_could_not_save_ends_with_the_code_of_that(is_shortage):
    report = SaveReport(
        step=1,
        folder=Path("step"),
        num_bytes=0,
        standstill_seconds=0.0,
        write_seconds=0.0,
        error="step 1 was not saved",
        is_shortage=is_shortage,
    )
    saves = Mock(_newest=report, _run=Mock(run_dir=Path("run")))
    with pytest.raises(CheckpointError, match="not saved; run/LATEST has the model") as caught:
        checkpoints.Checkpoints.raise_if_unsaved(saves)
    assert caught.value.exit_code == (6 if is_shortage else 4)
