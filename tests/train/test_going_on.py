"""Which checkpoint, in which folder: nothing that a run has left is taken for nothing."""

import errno
import fcntl
import io
import json
import re
import resource
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from chat_templates import Tomorrow
from stopped_runs import (
    assert_same_end,
    lines_of,
    run,
    run_in_starts,
    small_command,
    stopping_after,
)
from tiny_models import read_metrics, save_dataset, save_tiny_model, text_rows, write_rows
from transformers.utils import chat_template_utils

from fastpref.checkpoint.manifest import digest_files, read_manifest, write_manifest
from fastpref.complete_files import append_whole
from fastpref.errors import CheckpointError
from fastpref.train import assembly, evaluation, loop, opening
from fastpref.train.logs import metrics
from fastpref.train.resume import start
from fastpref.train.resume.origin import run_to_go_on_with
from fastpref.train.run import Run
from fastpref.train.run_folder import RunPlace


class MachineIsGone(BaseException):
    """What a run does not get to answer."""


FILES = ("LATEST/model.safetensors",)


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("going_on")
    save_dataset(base, "words")
    save_tiny_model(base / "model")
    return base


def arguments(base: Path, run_dir: Path, *options: str) -> list[str]:
    return small_command(base, run_dir, "n_examples=32", "eval_every=16", *options)


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run(arguments(base, run_dir)) == 0
    return run_dir


@pytest.fixture(scope="module")
def stopped(base, tmp_path_factory) -> Path:
    """After one step of four."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    with stopping_after(1):
        assert run(arguments(base, run_dir)) == 75
    return run_dir


def test_a_branch_without_a_checkpoint_goes_on_from_where_it_branched_off(
    base, stopped, whole, tmp_path, monkeypatch, capsys
):
    branch, before = tmp_path / "branch", lines_of(stopped)
    command = arguments(base, branch, f"resume={stopped}")
    real = loop.train_step

    def killed(run: Any, *args: Any) -> Any:
        if run.state.step == 2:
            raise MachineIsGone
        return real(run, *args)

    def gone(*_: Any, **__: Any) -> Any:
        raise MachineIsGone

    # without the history, then before its first step, then before its first checkpoint
    for module, name, dies in (
        (opening, "bring_history", gone),
        (assembly, "open_log", gone),
        (loop, "train_step", killed),
    ):
        monkeypatch.setattr(module, name, dies)
        with pytest.raises(MachineIsGone):
            run(command)
        monkeypatch.undo()
    assert [line["step"] for line in lines_of(branch)][-1] == 2
    assert not list((branch / "checkpoints").glob("step-*"))
    # what means the same checkpoints, or goes on wherever there is something
    with stopping_after(1):
        assert run(arguments(base, branch, "resume=auto")) == 75
    assert run(arguments(base, branch, f"resume={stopped / 'checkpoints' / 'latest'}")) == 0
    assert_same_end(branch, whole, files=FILES)
    assert lines_of(stopped) == before
    capsys.readouterr()
    # another checkpoint's branch is not this one, which is known before rows are read
    assert run(arguments(base, branch, f"resume={whole}")) == 2
    assert "train: " not in capsys.readouterr().err


def test_the_wall_time_is_that_of_all_starts(base, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Run, "seconds", lambda self: 100.0)
    assert run_in_starts(arguments(base, tmp_path / "run"), 2) == [75, 75, 0]
    said = capsys.readouterr().out
    assert re.findall(r"wall time\D+(\d+) s", said) == ["100", "200", "300"]


def test_checkpoints_that_were_there_are_missed(base, stopped, tmp_path, capsys):
    run_dir, disk = tmp_path / "run", tmp_path / "disk"
    shutil.copytree(stopped, run_dir)
    (run_dir / "checkpoints").rename(disk)
    before = lines_of(run_dir)
    assert run(arguments(base, run_dir, "resume=auto")) == 4
    assert f"{run_dir / 'checkpoints'} is gone, and" in capsys.readouterr().err
    (run_dir / "checkpoints").symlink_to(tmp_path / "unmounted")
    assert run(arguments(base, run_dir, "resume=auto")) == 4
    assert "unmounted, which is not there, and" in capsys.readouterr().err
    # an empty place where that disk is to be
    (tmp_path / "unmounted").mkdir()
    assert run(arguments(base, run_dir, "resume=auto")) == 4
    assert f"{run_dir / 'checkpoints'} is empty, and" in capsys.readouterr().err
    assert lines_of(run_dir) == before


@pytest.mark.parametrize("left", [[], ["config.yaml"]])
def test_a_folder_of_no_step_has_lost_no_checkpoints(base, stopped, whole, tmp_path, left, capsys):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    for name in left:
        shutil.copy(stopped / name, run_dir)
    capsys.readouterr()
    assert run(arguments(base, run_dir, "resume=auto")) == 0
    assert f"resume=auto: no checkpoint in {run_dir}, a new start" in capsys.readouterr().err
    assert_same_end(run_dir, whole, files=FILES)


@pytest.mark.parametrize("linked", ["checkpoints", "checkpoints/step-00000001"])
def test_checkpoints_may_lie_on_another_disk(base, stopped, whole, tmp_path, linked):
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    shutil.move(run_dir / linked, tmp_path / "disk")
    (run_dir / linked).symlink_to(tmp_path / "disk")
    assert run(arguments(base, run_dir, "resume=auto")) == 0
    assert_same_end(run_dir, whole, files=FILES)
    assert (run_dir / "checkpoints" / "step-00000001").is_dir()


def test_a_checkpoint_that_was_set_aside_is_saved_again_under_its_step(base, stopped, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    folder = run_dir / "checkpoints"
    aside = (folder / "step-00000001").rename(folder / "step-00000001.abandoned")
    link = tmp_path / "link"
    link.symlink_to(run_dir)
    with stopping_after(1):
        assert run(arguments(base, link, f"resume={aside}")) == 75
    assert sorted(path.name for path in folder.glob("step-*"))[-1] == "step-00000002"
    assert [line["step"] for line in lines_of(run_dir) if line["split"] == "train"] == [1, 2]


def test_a_folder_is_locked_before_anything_is_looked_for_in_it(
    base, stopped, tmp_path, monkeypatch, capsys
):
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    for name in ("find_newest", "find_named"):
        monkeypatch.setattr(start, name, lambda *_: pytest.fail("looked for"))
    with (run_dir / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        for resume in ("auto", run_dir):
            assert run(arguments(base, run_dir, f"resume={resume}")) == 2
            assert "another process is writing to" in capsys.readouterr().err


def test_the_newest_run_of_a_name_is_of_that_name(tmp_path):
    def make(name: str) -> Path:
        (tmp_path / name / "checkpoints").mkdir(parents=True)
        return tmp_path / name

    def newest(name: str) -> Path | None:
        return RunPlace(run_dir=None, root=tmp_path, name=name).newest_with("checkpoints")

    run = make("mine_2026-01-02_00-00-00_10")
    make("mine_2026-01-02_00-00-00_9")
    make("mine_2026-01-01_00-00-00")
    make("mine_reverse_2026-02-01_00-00-00")
    make("mine_2026-02-01_00-00-00.copy")
    (tmp_path / "mine_2026-03-01_00-00-00").mkdir()
    assert newest("mine") == run
    assert newest("min?") is None and newest("m") is None and newest("no/such") is None
    run = make("a[1]/b*_2026-01-01_00-00-00")
    assert newest("a[1]/b*") == run
    # of a clock that was set back since
    make("late_2999-01-01_00-00-00")
    run = RunPlace(run_dir=None, root=tmp_path, name="late").create("")
    (run / "checkpoints").mkdir()
    assert newest("late") == run
    place = RunPlace(run_dir=None, root=tmp_path, name="late")
    assert run_to_go_on_with("auto", place) == run


def test_a_line_that_the_disk_did_not_take_is_written_with_the_checkpoint(
    base, whole, tmp_path, monkeypatch
):
    run_dir, real = tmp_path / "run", metrics.MetricsLog._write_lines
    calls = []

    def refused(log: metrics.MetricsLog) -> None:
        calls.append(log)
        # of the first step, and again where the checkpoint is saved
        if 2 <= len(calls) <= num_refused:
            raise CheckpointError("metrics.jsonl: no space left")
        real(log)

    monkeypatch.setattr(metrics.MetricsLog, "_write_lines", refused)
    for num_refused in (2, 3):
        calls.clear()
        shutil.rmtree(run_dir, ignore_errors=True)
        assert run(arguments(base, run_dir, "resume=auto")) == 4
        steps = [line["step"] for line in lines_of(run_dir)]
        assert steps == ([0, 1] if num_refused == 2 else [0])
        assert run(arguments(base, run_dir, "resume=auto")) == 0
        assert_same_end(run_dir, whole, files=FILES)


def test_samples_that_the_disk_did_not_take_are_drawn_again(base, tmp_path, monkeypatch):
    run_dir, real = tmp_path / "run", evaluation.write_samples

    def refused(path: Path, step: int, *rest: Any) -> None:
        if step:
            raise CheckpointError("samples.jsonl: no space left")
        real(path, step, *rest)

    monkeypatch.setattr(evaluation, "write_samples", refused)
    options = ["n_examples=16", "sample_during_eval=true", "n_eval_model_samples=2", "resume=auto"]
    assert run(arguments(base, run_dir, *options)) == 4
    monkeypatch.undo()
    assert run(arguments(base, run_dir, *options)) == 0
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").read_text().splitlines()]
    assert [sample["step"] for sample in samples] == [0, 0, 2, 2]
    assert [record["step"] for record in read_metrics(run_dir, "eval")] == [0, 2]


def test_of_a_text_that_does_not_fit_nothing_is_added(tmp_path):
    path = tmp_path / "lines"
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    append_whole(path, "of before\n")
    resource.setrlimit(resource.RLIMIT_FSIZE, (15, before[1]))
    try:
        with pytest.raises(CheckpointError, match=r"lines: cannot be written: File too large"):
            append_whole(path, "longer than that\n")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    append_whole(path, "after\n")
    assert path.read_text() == "of before\nafter\n"


def test_lines_that_a_file_refuses_as_it_is_closed_are_not_in_it(tmp_path, monkeypatch):
    class Remote(io.FileIO):
        def close(self) -> None:
            was_open = not self.closed
            super().close()
            if was_open:
                raise OSError(errno.EIO, "Input/output error")

    path = tmp_path / "metrics.jsonl"
    append_whole(path, "of before\n")
    with monkeypatch.context() as patch:
        patch.setattr(Path, "open", lambda path, mode, buffering: Remote(path, mode))
        with pytest.raises(CheckpointError, match="cannot be written: Input/output error"):
            append_whole(path, "refused\n")
    append_whole(path, "after\n")
    assert path.read_text() == "of before\nafter\n"


def test_other_held_out_rows_are_said_and_begin_another_best(base, stopped, tmp_path, capsys):
    run_dir, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(stopped, run_dir)
    shutil.copytree(base, moved)
    write_rows(moved / "words", "test", text_rows(10, seed=7))
    with stopping_after(1):
        options = ["resume=auto", "checkpoint.keep_best=loss/eval"]
        assert run(arguments(moved, run_dir, *options)) == 75
    assert "held-out data was" in capsys.readouterr().err
    bests = []
    for metric in ("loss/eval", "rewards_eval/margins"):
        options = ["resume=auto", f"checkpoint.keep_best={metric}"]
        with stopping_after(1 if metric == "loss/eval" else 9):
            run(arguments(moved, run_dir, *options))
        newest = max((run_dir / "checkpoints").glob("step-*"))
        state = json.loads((newest / "state.json").read_text())["record"]["state"]
        bests.append((state["best_of"].split(" of ")[0], state["best"]))
        held_out = [record[metric] for record in read_metrics(run_dir, "eval")]
        assert state["best"] in held_out
    assert [name for name, _ in bests] == ["loss/eval", "rewards_eval/margins"]


@pytest.mark.parametrize("others", ["rows", "fewer"])
def test_the_best_on_other_held_out_rows_stays(base, tmp_path, monkeypatch, others):
    run_dir, moved, evaluate = tmp_path / "run", tmp_path / "moved", loop.evaluate
    shutil.copytree(base, moved)
    if others == "rows":
        write_rows(moved / "words", "test", text_rows(10, seed=7))
    losses = {1: 0.1, 2: 0.5, 3: 0.6, 4: 0.7, 5: 0.8, 6: 0.9}

    def evaluated(run, stop):
        record = evaluate(run, stop)
        return record and record | {"loss/eval": losses[record["step"]]}

    monkeypatch.setattr(loop, "evaluate", evaluated)
    options = ["resume=auto", "checkpoint.keep=1", "checkpoint.keep_best=loss/eval", "eval_every=8"]
    options += ["do_first_eval=false", "n_examples=48"]
    with stopping_after(2):
        assert run(arguments(base, run_dir, *options)) == 75
    options += ["n_eval_examples=2"] if others == "fewer" else []
    # in two starts: what is compared is not forgotten
    with stopping_after(2):
        assert run(arguments(moved, run_dir, *options)) == 75
    assert run(arguments(moved, run_dir, *options)) == 0
    kept = {path.name for path in (run_dir / "checkpoints").glob("step-*")}
    assert kept == {"step-00000002", "step-00000004", "step-00000006"}


def test_a_chat_template_that_prints_the_date_prints_that_of_the_first_start(
    base, tmp_path, monkeypatch
):
    for split in ("train", "test"):
        rows = text_rows(8, seed=3)
        asked = [row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in rows]
        write_rows(tmp_path / "words", split, asked)
    template = tmp_path / "dated.jinja"
    template.write_text(
        "{{ strftime_now('%Y') }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    )
    options = [f"base_data_dir={tmp_path}", f"data.chat_template={template}", "n_examples=16"]
    with stopping_after(1):
        assert run(arguments(base, tmp_path / "run", *options)) == 75
    assert run(arguments(base, tmp_path / "whole", *options)) == 0
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert run(arguments(base, tmp_path / "run", *options, "resume=auto")) == 0
    assert_same_end(tmp_path / "run", tmp_path / "whole", files=FILES)
    # a run that begins then begins with it
    assert run(arguments(base, tmp_path / "later", *options)) == 0
    assert lines_of(tmp_path / "later")[0] != lines_of(tmp_path / "whole")[0]


def give_option(run_dir: Path, text: str, **option: Any) -> None:
    """Have a run folder, and the newest checkpoint in it, be of a version with one option more."""
    folder = max((run_dir / "checkpoints").glob("step-*"))
    state = json.loads((folder / "state.json").read_text())
    state["record"]["options"]["loss"] |= option
    (folder / "state.json").write_text(json.dumps(state))
    manifest = read_manifest(folder)
    files = manifest.files | digest_files([folder / "state.json"])
    write_manifest(folder, replace(manifest, files=files))
    options = (run_dir / "config.yaml").read_text()
    (run_dir / "config.yaml").write_text(options.replace("\nloss:\n", f"\nloss:\n  {text}\n"))


def test_an_option_that_only_an_earlier_version_has_can_be_allowed_at_every_start(
    base, stopped, tmp_path, capsys
):
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    give_option(run_dir, "warmth: 0.3", warmth=0.3)
    command = arguments(base, run_dir, "resume=auto")
    assert run(command) == 4
    said = capsys.readouterr().err
    assert "loss.warmth was 0.3, is no option of this run: CHANGES THE NUMBERS" in said
    assert "go on with the version that has them, name a new run_dir" in said
    assert "accept them with resume.allow=[loss.warmth]" in said
    command.append("resume.allow=[loss.warmth]")
    assert run([*command, "resume.allow=[loss.warm]"]) == 2
    assert "there is no option loss.warm" in capsys.readouterr().err
    assert run(command) == 0
    assert "loss.warmth was 0.3, is no option of this run: allowed" in capsys.readouterr().err
    # the newest checkpoint does not know of it any more
    assert run(command) == 0
