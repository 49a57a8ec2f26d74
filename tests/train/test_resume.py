"""Stopped after any step, on any number of ranks, a run ends as the one that never stopped."""

import fcntl
import os
import re
import shutil
import signal
import time
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from safetensors.torch import load_file
from stopped_runs import assert_same_end, lines_of, run, run_in_starts, stopping_after
from tiny_models import read_metrics, save_dataset, save_tiny_model, text_rows, write_rows
from torch._inductor.exc import InductorError

from fastpref import deadline
from fastpref.checkpoint import writer
from fastpref.checkpoint.folders import CHECKPOINTS, MARK
from fastpref.checkpoint.manifest import read_manifest
from fastpref.train import ending, evaluation, loop
from fastpref.train import step as train_step

STEPS = 12
JOBS = {
    # across the ends of two epochs and a held-out pass
    "dpo": ["loss=dpo", "n_examples=48"],
    "tdpo2": ["loss=tdpo", "model.fsdp_policy_mp=bfloat16"],
    "sft": ["loss=sft", "gradient_accumulation_steps=4", "optim.schedule=cosine"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("resume")
    save_dataset(base, "words")
    write_rows(base / "other", "train", text_rows(32, seed=5))
    write_rows(base / "other", "test", text_rows(8, seed=2))
    save_tiny_model(base / "model")
    return base


def arguments(base: Path, run_dir: Path, *options: str) -> list[str]:
    return [
        *("model=blank_model", f"model.name_or_path={base / 'model'}", "model.fsdp_policy_mp=null"),
        *("datasets=[words]", f"base_data_dir={base}", f"run_dir={run_dir}", "max_length=64"),
        *("max_prompt_length=32", "batch_size=8", f"n_examples={8 * STEPS}", "n_epochs=null"),
        *("lr=1e-3", "warmup_steps=3", "eval_every=32", "n_eval_examples=8", "eval_batch_size=8"),
        *("sample_during_eval=true", "n_eval_model_samples=2", "minimum_log_interval_secs=0"),
        *("checkpoint.every=0", *options),
    ]


def train_whole_and_in_starts(base: Path, out: Path, steps_of_starts: dict[str, int]) -> None:
    """A run, and one that is stopped again and again, after as many steps each time."""
    for name, num_steps in steps_of_starts.items():
        assert run(arguments(base, out / name / "whole", *JOBS[name])) == 0
        codes = run_in_starts(arguments(base, out / name / "cut", *JOBS[name]), num_steps)
        # the last signal comes in the last step, when everything is saved
        starts = len(read_metrics(out / name / "whole", "train")) // num_steps
        assert codes == [75] * starts + [0] * (len(codes) - starts) and codes[-1] == 0, codes


@pytest.mark.parametrize(("name", "num_steps"), [("dpo", 1), ("tdpo2", 2), ("sft", 3)])
def test_stopped_again_and_again_a_run_ends_bitwise_the_same(base, tmp_path, name, num_steps):
    train_whole_and_in_starts(base, tmp_path, {name: num_steps})
    assert_same_end(tmp_path / name / "cut", tmp_path / name / "whole")


def test_stopped_again_and_again_two_ranks_end_bitwise_the_same(base, tmp_path):
    jobs = {"tdpo2": 6, "sft": 6}
    run_on_ranks(train_whole_and_in_starts, 2, base, tmp_path, jobs)
    for name in jobs:
        assert_same_end(tmp_path / name / "cut", tmp_path / name / "whole")


def train_some_steps(command: list[str], num_steps: int) -> None:
    with stopping_after(num_steps):
        code = run(command)
    assert code == 75, code


def test_on_two_three_ranks_and_one_the_same_rows_and_nearly_the_same_weights(base, tmp_path):
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    assert run(arguments(base, whole, "loss=dpo")) == 0
    command = arguments(base, cut, "loss=dpo", "resume=auto")
    for num_ranks in (2, 3):
        run_on_ranks(train_some_steps, num_ranks, command, 3)
    assert run(command) == 0
    ours, expected = read_metrics(cut, "train"), read_metrics(whole, "train")
    for a, b in zip(ours, expected, strict=True):
        assert (a["step"], a["examples"]) == (b["step"], b["examples"])
        # of other rows it would be another loss
        assert a["loss/train"] == pytest.approx(b["loss/train"], abs=1e-5)
        assert a["logps_train/chosen"] == pytest.approx(b["logps_train/chosen"], rel=1e-5)
    trained = load_file(cut / "LATEST" / "model.safetensors")
    for name, weight in load_file(whole / "LATEST" / "model.safetensors").items():
        assert (trained[name] - weight).norm() <= 1e-5 * weight.norm(), name


@pytest.fixture(scope="module")
def stopped(base, tmp_path_factory) -> Path:
    """A run folder with checkpoints of steps 2, 4 and 5 of 12."""
    run_dir = tmp_path_factory.mktemp("stopped") / "run"
    options = ("loss=dpo", "checkpoint.every=2", "checkpoint.keep=3")
    with stopping_after(5):
        assert run(arguments(base, run_dir, *options)) == 75
    return run_dir


@pytest.fixture(scope="module")
def whole(base, tmp_path_factory) -> Path:
    run_dir = tmp_path_factory.mktemp("whole") / "run"
    assert run(arguments(base, run_dir, "loss=dpo")) == 0
    return run_dir


def truncate(folder: Path) -> None:
    [file] = folder.glob("__0_*")
    os.truncate(file, file.stat().st_size // 2)


def flip(folder: Path) -> None:
    [file] = folder.glob("__0_*")
    data = bytearray(file.read_bytes())
    data[len(data) // 2] ^= 1
    file.write_bytes(data)


DAMAGES = {
    "truncated": (truncate, "truncated"),
    "one bit": (flip, "altered"),
    "no optimizer table": (lambda folder: (folder / "state.json").unlink(), "is missing"),
    "no manifest": (lambda folder: (folder / "manifest.json").unlink(), "is missing"),
    "stale pointer": (
        lambda folder: (folder.parent / "latest").write_text("step-00000099\n"),
        "going on after step 5",
    ),
}


@pytest.mark.parametrize("name", list(DAMAGES))
def test_a_damaged_checkpoint_is_named_and_the_one_before_it_taken(
    base, stopped, whole, tmp_path, name, capsys
):
    damage, message = DAMAGES[name]
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    damage(run_dir / "checkpoints" / "step-00000005")
    capsys.readouterr()
    assert run(arguments(base, run_dir, "loss=dpo", "resume=auto")) == 0
    assert message in capsys.readouterr().err
    assert_same_end(run_dir, whole)


def test_without_a_whole_checkpoint_a_run_with_steps_does_not_begin_anew(
    base, stopped, tmp_path, capsys
):
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    for folder in (run_dir / "checkpoints").glob("step-*"):
        truncate(folder)
    assert run(arguments(base, run_dir, "loss=dpo", "resume=auto")) == 4
    assert "no whole checkpoint in" in capsys.readouterr().err


def test_from_an_earlier_checkpoint_in_another_folder_history_comes_along(
    base, stopped, whole, tmp_path
):
    checkpoint, branch = stopped / "checkpoints" / "step-00000002", tmp_path / "branch"
    before = lines_of(stopped)
    assert run(arguments(base, branch, "loss=dpo", f"resume={checkpoint}")) == 0
    assert_same_end(branch, whole)
    assert lines_of(stopped) == before


@pytest.mark.parametrize(
    ("options", "refused"),
    [
        (["lr=2e-3"], "lr was 0.001, is 0.002: CHANGES THE NUMBERS"),
        (["loss.beta=0.2", "seed=1"], "resume.allow=[loss.beta,seed]"),
        (["batch_size=4"], "batch_size was 8, is 4"),
        (["datasets=[other]"], "datasets was ['words'], is ['other']: judged by the rows"),
        (["datasets=[other]"], "resume.allow=[data]"),
        (["max_length=16", "max_prompt_length=8"], "resume.allow=[data]"),
        (["optim.schedule=linear", "n_examples=160"], "resume.allow=[n_examples,optim.schedule]"),
        (["model=tiny", "model.name_or_path=tiny"], "model was "),
        # what no leave makes possible, before models are loaded
        (
            ["optimizer=RMSprop", "resume.allow=[optimizer]"],
            "nothing goes on with another optimizer\n",
        ),
        (
            ["adapter=lora", "model.policy_dtype=bfloat16", "resume.allow=[adapter,model]"],
            "nothing goes on with another adapter.kind\n",
        ),
    ],
)
def test_what_changes_the_numbers_is_refused_by_name(base, stopped, capsys, options, refused):
    before = {path: path.stat().st_mtime_ns for path in stopped.rglob("*") if path.is_file()}
    capsys.readouterr()
    command = arguments(base, stopped, "loss=dpo", "resume=auto", "n_eval_examples=8")
    assert run([*command, *options]) == 4
    said = capsys.readouterr().err
    assert refused in said
    # no rows are read but where they decide
    assert ("train: " in said) == options[0].startswith(("datasets", "max_length", "model"))
    after = {path: path.stat().st_mtime_ns for path in stopped.rglob("*") if path.is_file()}
    assert after == before


def test_a_folder_of_another_run_without_a_checkpoint_is_refused_before_rows_are_read(
    base, stopped, tmp_path, capsys
):
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    shutil.rmtree(run_dir / CHECKPOINTS)
    (run_dir / CHECKPOINTS).mkdir()
    (run_dir / MARK).unlink()
    capsys.readouterr()
    assert run(arguments(base, run_dir, "loss=dpo", "resume=auto", "lr=2e-3")) == 2
    said = capsys.readouterr().err
    assert "holds another run, without a checkpoint to go on from: lr was" in said
    assert "begin anew in this one with resume.allow=[lr]" in said
    assert "train: " not in said
    allowed = arguments(base, run_dir, "loss=dpo", "resume=auto", "lr=2e-3", "resume.allow=[lr]")
    assert run(allowed) == 0
    assert "ended before its first checkpoint and begins anew" in capsys.readouterr().err
    assert read_metrics(run_dir, "train")[0]["step"] == 1


def test_what_does_not_change_the_numbers_goes_on_and_is_said(
    base, stopped, whole, tmp_path, capsys
):
    run_dir, moved = tmp_path / "run", tmp_path / "moved"
    shutil.copytree(stopped, run_dir)
    # the same rows and weights elsewhere, and a longer run
    shutil.copytree(base, moved)
    options = [
        *("loss=dpo", "resume=auto", "n_examples=104", "n_eval_examples=4", "checkpoint.every=5"),
        *("gradient_accumulation_steps=2", "sample_during_eval=false", "exp_name=other"),
        "plan.num_gpus=8",
    ]
    capsys.readouterr()
    assert run(arguments(moved, run_dir, *options)) == 0
    said = capsys.readouterr().err
    for part in (
        "n_examples was 96, is 104: the run ends elsewhere",
        "gradient_accumulation_steps was 1, is 2: the same numbers up to rounding",
        "n_eval_examples was 8, is 4: no effect on the updates",
        "judged by the rows and weights themselves",
    ):
        assert part in said
    ours, expected = read_metrics(run_dir, "train"), read_metrics(whole, "train")
    assert len(ours) == STEPS + 1
    for a, b in zip(ours, expected, strict=False):
        assert a["loss/train"] == pytest.approx(b["loss/train"], abs=1e-6)
    assert (run_dir / "config-until-step-5.yaml").is_file()


def test_what_is_allowed_by_name_goes_on(base, stopped, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    options = ["lr=2e-3", "datasets=[other]", "resume.allow=[lr,data]"]
    capsys.readouterr()
    assert run(arguments(base, run_dir, "loss=dpo", "resume=auto", *options)) == 0
    said = capsys.readouterr().err
    assert said.count("lr was 0.001, is 0.002: allowed") == 1
    assert re.search(r"data was \w{12}, is \w{12}: allowed", said)
    assert [r["lr"] for r in read_metrics(run_dir, "train")][-1] == pytest.approx(2e-3)
    assert run(arguments(base, run_dir, "loss=dpo", "resume.allow=[learning]")) == 2
    assert "resume.allow: there is no option learning" in capsys.readouterr().err


def test_a_run_folder_is_gone_on_with_only_where_it_is_asked_for(base, stopped, tmp_path, capsys):
    assert run(arguments(base, stopped, "loss=dpo")) == 2
    assert "name a new folder or set resume=auto" in capsys.readouterr().err
    assert run(arguments(base, tmp_path / "new", "loss=dpo", "resume=/nowhere")) == 4
    assert "resume: /nowhere is not there" in capsys.readouterr().err
    assert not (tmp_path / "new").exists()
    # a path for a task that goes on by itself
    assert run(["recipe=tisdpo_p", "resume=/nowhere"]) == 2
    error = capsys.readouterr().err
    assert "resume.path: task=tisdpo goes on by itself" in error
    assert "got '/nowhere'; name that with run_dir" in error


def test_without_a_run_folder_the_newest_one_of_that_name_is_taken(base, tmp_path):
    command = [part for part in arguments(base, tmp_path, "loss=dpo") if "run_dir" not in part]
    command += [f"output_dir={tmp_path}", "exp_name=mine", "resume=auto"]
    train_some_steps(command, 3)
    train_some_steps(command, 3)
    assert run(command) == 0
    [run_dir] = tmp_path.iterdir()
    assert len(read_metrics(run_dir, "train")) == STEPS


def test_one_process_at_a_time_writes_to_a_run_folder(base, stopped, tmp_path, capsys):
    run_dir = tmp_path / "run"
    shutil.copytree(stopped, run_dir)
    (run_dir / "metrics.jsonl").open("a").write("what the other process writes just now")
    files = ("metrics.jsonl", "config.yaml")
    before = [(run_dir / name).read_bytes() for name in files]
    with (run_dir / ".lock").open("w") as other:
        fcntl.flock(other, fcntl.LOCK_EX)
        assert run(arguments(base, run_dir, "loss=dpo", "resume=auto", "exp_name=other")) == 2
    assert "another process is writing to" in capsys.readouterr().err
    assert [(run_dir / name).read_bytes() for name in files] == before


def test_a_finished_run_is_not_trained_again_and_a_longer_one_goes_on(base, whole, tmp_path):
    run_dir = tmp_path / "run"
    shutil.copytree(whole, run_dir)
    assert run(arguments(base, run_dir, "loss=dpo", "resume=auto")) == 0
    assert_same_end(run_dir, whole)
    options = ["loss=dpo", "resume=auto", f"n_examples={8 * STEPS + 16}"]
    assert run(arguments(base, run_dir, *options)) == 0
    assert len(read_metrics(run_dir, "train")) == STEPS + 2
    assert run(arguments(base, run_dir, "loss=dpo", "resume=auto")) == 4


def test_the_best_checkpoint_stays_by_its_held_out_metric(base, tmp_path):
    run_dir = tmp_path / "run"
    options = ["loss=dpo", "checkpoint.keep=1", "checkpoint.keep_best=rewards_eval/margins"]
    assert run(arguments(base, run_dir, *options, "lr=0.01")) == 0
    held_out = {r["step"]: r["rewards_eval/margins"] for r in read_metrics(run_dir, "eval")}
    del held_out[0]
    best = max(held_out, key=held_out.__getitem__)
    kept = {path.name for path in (run_dir / "checkpoints").glob("step-*")}
    assert kept == {f"step-{best:08d}", f"step-{STEPS:08d}"}
    options = ["loss=dpo", "checkpoint.keep_best=rewards_eval/margin"]
    assert run(arguments(base, tmp_path / "misspelt", *options)) == 2


SEAMS = {
    "evaluating": (evaluation, "sum_over_examples", 2),
    "sampling": (evaluation, "sample_responses", 3),
    "saving": (writer, "write_manifest", 1),
    "exporting": (ending, "export_model", 1),
}
"""By what a run is doing: a function of ours that it calls then, and the first call after a step.
"""


@pytest.mark.parametrize(
    ("doing", "number"),
    [
        ("evaluating", signal.SIGTERM),
        ("sampling", signal.SIGUSR1),
        ("saving", signal.SIGINT),
        ("exporting", signal.SIGTERM),
    ],
)
def test_a_signal_at_any_time_is_answered_when_everything_is_saved(
    base, whole, tmp_path, monkeypatch, doing, number
):
    module, name, first = SEAMS[doing]
    real, calls = getattr(module, name), []

    def interrupted(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        if len(calls) == first:
            signal.raise_signal(number)
        return real(*args, **kwargs)

    monkeypatch.setattr(module, name, interrupted)
    run_dir = tmp_path / "run"
    # written by the main thread: Python's handlers run there alone
    options = ["checkpoint.mode=sync", "checkpoint.keep=9", "checkpoint.keep_best=loss/eval"]
    command = arguments(base, run_dir, "loss=dpo", "checkpoint.every=4", *options)
    assert run([*command, "resume=auto"]) == (130 if number == signal.SIGINT else 75)
    assert (run_dir / "checkpoints" / "latest").is_file()
    monkeypatch.undo()
    assert run([*command, "resume=auto"]) == 0
    assert_same_end(run_dir, whole)
    # whenever they were measured, the numbers that the best one is chosen by stand beside it
    for step in (4, 8, 12):
        manifest = read_manifest(run_dir / "checkpoints" / f"step-{step:08d}")
        assert "loss/eval" in manifest.metrics


@pytest.mark.parametrize(
    ("module", "name"), [(train_step, "accumulate_gradients"), (loop, "evaluate")]
)
def test_a_signal_that_ends_the_compiler_too_is_answered_with_all_steps_before_it_saved(
    base, whole, tmp_path, monkeypatch, capsys, module, name
):
    real, calls = getattr(module, name), []

    def compiled(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        result = real(*args, **kwargs)
        if len(calls) in (2, 3):
            if len(calls) == 3:
                signal.raise_signal(signal.SIGTERM)
            raise InductorError(RuntimeError("g++: fatal error: Terminated signal"), None)
        return result

    monkeypatch.setattr(module, name, compiled)
    run_dir = tmp_path / "run"
    command = arguments(base, run_dir, "loss=dpo", "checkpoint.every=1", "resume=auto")
    # without a signal it is an error as any other
    with pytest.raises(InductorError, match="Terminated signal"):
        run(command)
    capsys.readouterr()
    assert run(command) == 75
    assert "stopping in the middle of a step: RuntimeError: g++: fatal" in capsys.readouterr().err
    monkeypatch.undo()
    assert run(command) == 0
    assert_same_end(run_dir, whole)


def test_the_end_of_a_job_ends_the_run_in_time_with_everything_saved(
    base, tmp_path, capsys, monkeypatch
):
    run_dir, evaluated = tmp_path / "run", []
    held_out_metrics = evaluation.held_out_metrics

    def evaluating(run, batches):
        evaluated.append(run.state.step)
        return held_out_metrics(run, batches)

    # it comes in the first of four batches after step 4
    monkeypatch.setattr(deadline, "seconds_since_start", lambda: 100.0 * (4 in evaluated))
    monkeypatch.setattr(evaluation, "held_out_metrics", evaluating)
    monkeypatch.setenv(deadline.JOB_END, f"{time.time() + 100 + deadline.JOB_MARGIN:.0f}")
    assert run(arguments(base, run_dir, "loss=dpo", "eval_batch_size=2")) == 75
    error = capsys.readouterr().err
    assert "at the end, which comes by 20" in error and "checkpoint.deadline is near" in error
    assert (run_dir / "checkpoints" / "latest").is_file()
    assert evaluated == [0, 0, 0, 0, 4]


@pytest.fixture(autouse=True)
def no_group_is_left():
    yield
    assert not dist.is_initialized()
    torch.set_default_dtype(torch.float32)
