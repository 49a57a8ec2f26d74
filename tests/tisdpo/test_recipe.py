"""All stages of TIS-DPO in one command: killed anywhere, it goes on and loses nothing finished."""

import errno
import json
import multiprocessing
import os
import shutil
import signal
import time
from collections.abc import Callable
from operator import attrgetter
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import pytest
import torch
from chat_templates import Tomorrow
from exhaustion import no_more_files
from ranks import run_on_ranks
from stopped_runs import stopping_after
from tiny_models import read_metrics, save_tiny_model, text_rows, write_rows
from transformers import AutoModelForCausalLM
from transformers.utils import chat_template_utils

import train
from fastpref.cli.command_line import main
from fastpref.cli.overrides import read_config
from fastpref.config import Config
from fastpref.errors import CheckpointError, ConfigError, MemoryExhaustedError
from fastpref.model import loading
from fastpref.tisdpo.closing_report import link_model
from fastpref.tisdpo.recipe import build_stages
from fastpref.tisdpo.recipe_folder import list_changes
from fastpref.tisdpo.stage_record import is_done, mark_done
from fastpref.tisdpo.stages import first_stage
from fastpref.train import data
from fastpref.train.run import Run

STAGES = ["positive", "negative", "weights", "policy"]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("recipe")
    write_rows(base / "words", "train", text_rows(64, seed=1))
    write_rows(base / "words", "test", text_rows(8, seed=2))
    save_tiny_model(base / "model")
    return base


def job(base: Path, recipe: str, **options: object) -> list[str]:
    values = {
        "recipe": recipe,
        "model": "blank_model",
        "model.name_or_path": base / "model",
        "model.fsdp_policy_mp": "null",
        "datasets": "[words]",
        "base_data_dir": base,
        "batch_size": 4,
        "lr": 1e-3,
        "warmup_steps": 2,
        "max_length": 64,
        "max_prompt_length": 32,
        "n_eval_examples": 8,
        "sample_during_eval": "false",
        "weights.batch_size": 1,
        "weights.shard_rows": 4,
    }
    return [f"{key}={value}" for key, value in (values | options).items()]


def run(arguments: list[str]) -> int:
    return main(arguments, train.compose_choices, train.CONFIG_DIR)


def read(arguments: list[str]) -> Config:
    return read_config(arguments, train.compose_choices, train.CONFIG_DIR)


def _enter(arguments: list[str], cache: str, out: Path) -> None:
    os.environ["HF_DATASETS_CACHE"] = cache
    with out.open("a") as file:
        os.dup2(file.fileno(), 1)
        os.dup2(file.fileno(), 2)
    raise SystemExit(run(arguments))


def start(arguments: list[str], tmp_path: Path) -> multiprocessing.Process:
    """The command in a process of its own, forked from one that has imported everything."""
    context = multiprocessing.get_context("forkserver")
    cache = os.environ["HF_DATASETS_CACHE"]
    process = context.Process(target=_enter, args=(arguments, cache, tmp_path / "log"))
    process.start()
    return process


def stop_when(
    process: multiprocessing.Process, is_time: Callable[[], bool], number: int
) -> int | None:
    """Send a signal once it is time; returns the exit code."""
    deadline = time.monotonic() + 120
    while not is_time():
        assert process.is_alive() and time.monotonic() < deadline, "it ended before its time"
        time.sleep(0.001)
    os.kill(process.pid, number)
    process.join(120)
    return process.exitcode


def done(run_dir: Path) -> list[str]:
    return [stage for stage in STAGES if (run_dir / stage / "stage.json").exists()]


def stamps(run_dir: Path) -> dict[Path, int]:
    """Every file of the finished stages with its time."""
    folders = [run_dir / stage for stage in done(run_dir)]
    return {
        path: path.stat().st_mtime_ns
        for folder in folders
        for path in folder.rglob("*")
        if path.is_file()
    }


def test_killed_in_every_stage_it_goes_on_and_ends_as_if_nothing_had_been(base, tmp_path):
    run_dir = tmp_path / "run"
    arguments = job(base, "tisdpo_d", run_dir=run_dir, **{"checkpoint.every": 2})
    is_in = {
        "positive": lambda: (run_dir / "positive" / "checkpoints" / "latest").exists(),
        "negative": lambda: (run_dir / "negative" / "checkpoints" / "latest").exists(),
        "weights": lambda: any((run_dir / "weights").glob("*/*.shards/*/*.npz")),
        "policy": lambda: (run_dir / "policy" / "checkpoints" / "latest").exists(),
    }
    for number, stage in enumerate(STAGES):
        before = stamps(run_dir)
        assert stop_when(start(arguments, tmp_path), is_in[stage], signal.SIGKILL) == -9
        assert done(run_dir) == STAGES[:number]
        assert stamps(run_dir).items() >= before.items()
    before = stamps(run_dir)
    assert run(arguments) == 0
    assert done(run_dir) == STAGES
    assert stamps(run_dir).items() >= before.items()
    log = (tmp_path / "log").read_text()
    assert log.count("stage 1 of 4, positive: DPO on the pairs") == 2
    assert log.count("stage 1 of 4, positive: done already") == 2
    # the third time the policy's training goes on in this process
    assert log.count("going on after step ") == 2
    assert not list(run_dir.glob("*/checkpoints"))

    whole = tmp_path / "whole"
    assert run(job(base, "tisdpo_d", run_dir=whole)) == 0
    weights = Path("weights") / "words" / "train.jsonl"
    assert (run_dir / weights).read_bytes() == (whole / weights).read_bytes()
    for stage in ("positive", "negative", "policy"):
        exported = Path(stage) / "LATEST" / "model.safetensors"
        assert (run_dir / exported).read_bytes() == (whole / exported).read_bytes()
    losses = [read_metrics(folder / "policy", "train") for folder in (run_dir, whole)]
    assert [r["loss/train"] for r in losses[0]] == [r["loss/train"] for r in losses[1]]
    # the run folder names the trained model as any other run's does
    AutoModelForCausalLM.from_pretrained(run_dir / "LATEST")
    summary = (run_dir / "summary.txt").read_text()
    assert all(stage in summary for stage in STAGES) and "LATEST" in summary
    # again: nothing is left to do
    before = stamps(run_dir)
    assert run(arguments) == 0
    assert stamps(run_dir) == before


def test_without_a_run_folder_the_newest_recipe_of_that_name_is_taken(base, tmp_path, capsys):
    options = {"output_dir": tmp_path, "exp_name": "mine", "resume": "auto", "n_examples": 16}
    command = job(base, "tisdpo_d", **options)
    # a run of the same name that is no recipe
    (tmp_path / "mine_2999-01-01_00-00-00" / "checkpoints").mkdir(parents=True)
    for _ in range(2):
        with stopping_after(1):
            assert run(command) == 75
        [run_dir] = [path.parent for path in tmp_path.glob("*/positive")]
        message = f"the same command with run_dir={run_dir} goes on after step"
        error = capsys.readouterr().err
        assert message in error and "resume=auto" not in error.splitlines()[-1]
    assert "going on after step 1" in error
    assert [r["step"] for r in read_metrics(run_dir / "positive", "train")] == [1, 2]


def test_what_is_left_is_done_beside_stages_of_the_same_data_and_model_alone(
    base, tmp_path, capsys, monkeypatch
):
    shutil.copytree(base, tmp_path, dirs_exist_ok=True)
    run_dir, rows, model = (tmp_path / name for name in ("run", "words", "model"))
    options = {"n_examples": 8, "n_eval_examples": 0}
    command = job(tmp_path, "tisdpo_d", run_dir=run_dir, **options)
    with monkeypatch.context() as patch, stopping_after(3):
        patch.setattr(Run, "seconds", lambda self: 1000.0)
        assert run(command) == 75
    assert done(run_dir) == ["positive"]

    def refused(arguments: list[str], code: int) -> str:
        capsys.readouterr()
        assert run(arguments) == code
        assert done(run_dir) == ["positive"]
        return capsys.readouterr().err

    weights, marker = model / "model.safetensors", run_dir / "positive" / "stage.json"
    for path, content, words in (
        (rows / "train.jsonl", (rows / "test.jsonl").read_bytes() * 8, "data was "),
        (weights, weights.read_bytes()[:-1] + b"\x01", "model was "),
        (marker, b"", f"{marker} is not the record of a stage"),
    ):
        before = path.read_bytes()
        path.write_bytes(content)
        error = refused(command, 4)
        assert words in error and "stage 2 of 4" not in error
        path.write_bytes(before)
    error = refused([*command, "checkpoint.deadline=00:00:01"], 75)
    assert f"is near; the same command with run_dir={run_dir} goes on" in error

    # of a version that had one option more
    with (run_dir / "config.yaml").open("a") as options_then:
        options_then.write("warmth: 1\n")
    assert "accept them with resume.allow=[warmth]" in refused(command, 2)
    command.append("resume.allow=[warmth]")

    # it was another day then
    record = json.loads(marker.read_text())
    record["fingerprints"]["chat date"] = "2001-02-03"
    marker.write_text(json.dumps(record))
    # killed between its record and its checkpoints
    left = run_dir / "positive" / "checkpoints" / "step-00000002"
    left.mkdir(parents=True)
    assert run(command) == 0
    assert not list(run_dir.glob("*/checkpoints"))
    records = [json.loads((run_dir / s / "stage.json").read_text()) for s in STAGES]
    assert [record["seconds"] > 1000 for record in records] == [False, True, False, False]
    assert {record["fingerprints"]["chat date"] for record in records} == {"2001-02-03"}
    # a copy that follows links
    shutil.copytree(run_dir, tmp_path / "copy")
    assert run([*command, f"run_dir={tmp_path / 'copy'}"]) == 0
    # nothing is left to do, and all of it belongs to other rows
    shutil.copy(rows / "test.jsonl", rows / "train.jsonl")
    assert run(command) == 4


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_signals_keep_their_exit_codes_and_say_how_to_go_on(base, tmp_path, number, code):
    run_dir = tmp_path / "run"
    process = start(job(base, "tisdpo_p", run_dir=run_dir), tmp_path)
    shards = run_dir / "weights"
    assert stop_when(process, lambda: any(shards.glob("*/*.shards/*/*.npz")), number) == code
    log = (tmp_path / "log").read_text()
    assert f"run_dir={run_dir} goes on" in log and "Traceback" not in log
    assert any(shards.glob("*/*.shards/*/*.npz"))


def test_the_three_estimators_train_what_they_are_named_for(base, tmp_path):
    losses = {}
    for recipe, trained in (("d", "dpo"), ("s", "sft"), ("p", None)):
        config = read(job(base, f"tisdpo_{recipe}"))
        stages = build_stages(config, tmp_path)
        assert [s.name for s in stages] == (STAGES if trained else STAGES[2:])
        assert first_stage(config.stages) == stages[0].name
        losses[recipe] = [s.config.loss.name for s in stages if s.config.task == "train"]
        *contrast, weights, policy = stages
        assert [s.config.reverse_dataset for s in contrast] == ([False, True] if trained else [])
        assert (weights.config.weights.positive == weights.config.weights.negative) == (not trained)
        assert policy.config.transform.method == "paper"
        assert policy.config.base_data_dir == weights.config.weights.output_dir
    assert losses == {"d": ["dpo", "dpo", "tisdpo"], "s": ["sft", "sft", "tisdpo"], "p": ["tisdpo"]}


def test_the_contrast_of_adapters_has_a_learning_rate_of_its_own(base, tmp_path):
    for options, lr, schedule in (
        ({}, 1e-3, "constant"),
        ({"adapter": "lora"}, 4e-3, "linear"),
        ({"adapter": "lora", "stages.contrast_lr": 2e-3}, 2e-3, "constant"),
        ({"adapter": "lora", "optim.schedule": "cosine"}, 4e-3, "cosine"),
    ):
        *contrast, _, policy = build_stages(read(job(base, "tisdpo_d", **options)), tmp_path)
        assert {(s.config.lr, s.config.optim.schedule) for s in contrast} == {(lr, schedule)}
        assert policy.config.lr == 1e-3
        assert policy.config.optim.schedule == options.get("optim.schedule", "constant")


def test_with_adapters_every_stage_stands_on_one_base(base, tmp_path, monkeypatch):
    loads: list[str] = []
    real = loading.load_model

    def load_model(source: Any, **options: Any) -> Any:
        loads.append(source.base)
        assert not source.adapters, "merged"
        return real(source, **options)

    monkeypatch.setattr(loading, "load_model", load_model)
    run_dir = tmp_path / "run"
    options = {"adapter": "lora", "stages.sft_first": "true", "run_dir": run_dir}
    assert run(job(base, "tisdpo_d", **options, **{"adapter.merge": "true"})) == 0
    assert f"merged   {run_dir / 'LATEST-merged'}" in (run_dir / "summary.txt").read_text()
    stages = ["sft", "positive", "negative", "policy"]
    # once a training stage, and once for both sides of the estimation
    assert loads == [str(base / "model")] * (len(stages) + 1)
    for stage in stages:
        config = json.loads((run_dir / stage / "LATEST" / "adapter_config.json").read_text())
        assert config["base_model_name_or_path"] == str(base / "model")
        first = read_metrics(run_dir / stage, "train")[0]
        if stage != "sft":
            assert first["loss/train"] == float(torch.tensor(2.0).log())
    rows = (run_dir / "weights" / "words" / "train.jsonl").read_text().splitlines()
    weights = [weight for row in rows for weight in json.loads(row)["chosen_weight"]]
    assert max(map(abs, weights)) > 1e-4


def test_an_sft_stage_comes_first_on_request_and_everything_starts_from_it(base, tmp_path):
    options = {"stages.sft_first": "true", "stages.sft_lr": 0.5, "stages.contrast_lr": 0.25}
    config = read(job(base, "tisdpo_d", reverse_dataset="true", **options))
    sft, positive, negative, weights, policy = build_stages(config, tmp_path)
    assert first_stage(config.stages) == sft.name
    assert (sft.config.loss.name, sft.config.model.name_or_path) == ("sft", str(base / "model"))
    assert [s.config.lr for s in (sft, positive, negative, policy)] == [0.5, 0.25, 0.25, 1e-3]
    for stage in (positive, negative, policy):
        assert stage.config.model.name_or_path == str(tmp_path / "sft")
    # the files' pairs decide what is positive; the loader turns weights and texts together
    assert [s.config.reverse_dataset for s in (positive, negative, policy)] == [False, True, True]
    assert weights.config.weights.positive == str(tmp_path / "positive")


def test_the_last_stage_has_the_options_of_the_run_and_the_others_those_of_stages(base, tmp_path):
    options = {"stages.sft_first": "true", "stages.sft_n_epochs": 2, "stages.contrast_n_epochs": 3}
    options |= {"n_epochs": 4, "stages.contrast_beta": 0.7, "loss.beta": 0.2, "exp_name": "mine"}
    options |= {"model.save_dtype": "checkpoint", "sample_during_eval": "true"}
    options |= {"adapter": "lora", "adapter.merge": "true", "resume": "auto"}
    stages = build_stages(read(job(base, "tisdpo_d", **options)), tmp_path)
    configs = {stage.name: stage.config for stage in stages}
    weights = configs.pop("weights")
    assert [c.n_epochs for c in configs.values()] == [2, 3, 3, 4]
    assert [c.loss.beta for c in list(configs.values())[1:]] == [0.7, 0.7, 0.2]
    assert [c.exp_name for c in configs.values()] == [f"mine_{name}" for name in configs]
    # rounded, merged and sampled is the last model alone
    saved = [None, None, None, "checkpoint"]
    assert [c.model.save_dtype for c in (*configs.values(), weights)] == [*saved, None]
    for last in ("sample_during_eval", "adapter.merge"):
        values = [attrgetter(last)(c) for c in configs.values()]
        assert values == [False, False, False, True]
    # the policy is trained on files of the names that the run's datasets have
    assert weights.weights.suffix == ""
    assert weights.model.name_or_path == str(tmp_path / "sft")


def test_stages_after_the_first_read_what_it_exported_and_go_on_by_themselves(base, tmp_path):
    archive = {"model.archive": tmp_path / "policy.pt"}
    weights, policy = build_stages(read(job(base, "tisdpo_p", **archive)), tmp_path)
    # without a first stage both start from the archive, and without a contrast it has both roles
    assert weights.config.weights.positive == weights.config.weights.negative
    assert weights.config.weights.positive == str(tmp_path / "policy.pt")
    assert policy.config.model.archive == str(tmp_path / "policy.pt")
    assert policy.config.resume.path == "auto"
    more = {"stages.sft_first": "true", "model.revision": "main"}
    sft, weights, policy = build_stages(read(job(base, "tisdpo_p", **archive, **more)), tmp_path)
    assert (sft.config.model.revision, policy.config.model.revision) == ("main", None)
    assert [c.config.model.archive for c in (sft, policy)] == [str(tmp_path / "policy.pt"), None]
    assert weights.config.weights.positive == str(tmp_path / "sft")


@pytest.mark.looks_at_pictures
def test_the_sft_recipe_runs_to_the_end(base, tmp_path, capsys):
    run_dir = tmp_path / "run"
    command = job(base, "tisdpo_s", run_dir=run_dir, n_examples=8)
    assert run(command) == 0
    weights = run_dir / "weights" / "words" / "train.jsonl"
    rows = weights.read_text().splitlines()
    assert len(rows) == 64 and any(json.loads(rows[0])["chosen_weight"])
    assert weights.with_name("weights.png").stat().st_size > 10_000
    # weights that are damaged after their stage: what to delete is said
    text = weights.read_text()
    weights.write_text(text.replace('"chosen_weight": [', '"chosen_weight": ["', 1))
    shutil.rmtree(run_dir / "policy")
    capsys.readouterr()
    assert run(command) == 3
    error = capsys.readouterr().err.splitlines()[-1]
    assert f"{weights}:1" in error
    assert error.endswith(f"; to have the weights estimated again, delete {run_dir / 'weights'}")
    # and so with a model
    shutil.rmtree(run_dir / "weights")
    os.truncate(run_dir / "positive" / "LATEST" / "model.safetensors", 1000)
    assert run(command) == 4
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.endswith(f"; to have the model trained again, delete {run_dir / 'positive'}")


def _run_on_rank(arguments: list[str]) -> None:
    assert run(arguments) == 0


def test_a_file_system_without_links_leaves_the_model_in_its_stage(tmp_path, monkeypatch, caplog):
    model = tmp_path / "policy" / "LATEST"
    model.mkdir(parents=True)
    no_links = Mock(side_effect=OSError(errno.EPERM, "Operation not permitted"))
    monkeypatch.setattr(os, "symlink", no_links)
    link_model(tmp_path, SimpleNamespace(name="policy"))
    said = f"{tmp_path / 'LATEST'} is no link to {model}: Operation not permitted"
    assert [record.getMessage() for record in caplog.records] == [said]


def test_a_record_that_cannot_be_written_for_want_of_files_is_told_as_that(tmp_path):
    record = {"what": "", "result": "", "seconds": 0}
    message = r"stage\.json: cannot be written: Too many open files"
    with pytest.raises(MemoryExhaustedError, match=message) as raised, no_more_files():
        mark_done(tmp_path, record, "")
    # where a file is dispensable it is caught like any other
    assert raised.value.exit_code == 6 and isinstance(raised.value, CheckpointError)
    assert not is_done(tmp_path)
    mark_done(tmp_path, record, "")
    assert is_done(tmp_path)


@pytest.mark.parametrize(
    "damage",
    [
        {"what": 1},
        {"result": ["loss"]},
        {"seconds": None},
        {"fingerprints": []},
        {"fingerprints": {"chat date": 3}},
    ],
)
def test_a_record_with_values_of_other_kinds_is_damaged(tmp_path, damage):
    record: dict[str, Any] = {"what": "", "result": "", "seconds": 0.5}
    mark_done(tmp_path, record | {"fingerprints": {"chat date": "2001-02-03"}}, "")
    assert is_done(tmp_path)
    mark_done(tmp_path, record | damage, "")
    with pytest.raises(CheckpointError, match="is not the record of a stage that is done"):
        is_done(tmp_path)


@pytest.mark.parametrize("missing", ["what", "result", "seconds"])
def test_a_record_without_one_of_its_values_is_damaged(tmp_path, missing):
    record: dict[str, Any] = {"what": "", "result": "", "seconds": 0.5}
    del record[missing]
    mark_done(tmp_path, record, "")
    with pytest.raises(CheckpointError, match="is not the record of a stage that is done"):
        is_done(tmp_path)


def test_two_ranks_share_every_stage(base, tmp_path):
    run_dir = tmp_path / "run"
    arguments = job(base, "tisdpo_p", run_dir=run_dir, n_examples=8, trainer="FSDPTrainer")
    run_on_ranks(_run_on_rank, 2, arguments)
    assert done(run_dir) == ["weights", "policy"]
    assert len(read_metrics(run_dir / "policy", "train")) == 2


def test_a_recipe_that_goes_on_on_another_day_tells_its_templates_the_first(
    base, tmp_path, monkeypatch
):
    rows = [
        row | {"prompt": [{"role": "user", "content": row["prompt"]}]} for row in text_rows(4, 1)
    ]
    write_rows(tmp_path / "words", "train", rows)
    template, run_dir = tmp_path / "dated.jinja", tmp_path / "run"
    template.write_text(
        "{{ strftime_now('%Y') }}{% for m in messages %}[{{ m.content }}]{% endfor %}"
    )
    options = {"base_data_dir": tmp_path, "n_eval_examples": 0, "data.chat_template": template}
    command = job(base, "tisdpo_s", run_dir=run_dir, n_epochs=1, **options)
    with stopping_after(1):
        assert run(command) == 75
    today = (run_dir / "chat-date").read_text()
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    monkeypatch.setattr(data, "today", lambda *_: pytest.fail("a stage asks for the day"))
    assert run(command) == 0
    records = [json.loads((run_dir / stage / "stage.json").read_text()) for stage in STAGES]
    assert {record["fingerprints"]["chat date"] for record in records} == {today}
    weights = json.loads((run_dir / "weights" / "words" / "train.weights.json").read_text())
    assert weights["chat_date"] == today


def test_other_options_or_another_run_are_refused_in_a_run_folder(base, tmp_path, capsys):
    run_dir = tmp_path / "run"
    arguments = job(base, "tisdpo_p", run_dir=run_dir, n_examples=4)
    assert run(arguments) == 0
    capsys.readouterr()
    assert run([*arguments, "lr=0.5", "loss.beta=0.2"]) == 2
    error = capsys.readouterr().err
    assert "lr was 0.001, is 0.5" in error and "loss.beta was 0.1, is 0.2" in error
    # what nothing is computed from may change
    assert run([*arguments, "minimum_log_interval_secs=9", "exp_name=other"]) == 0
    assert run(job(base, "tisdpo_p", run_dir=run_dir / "policy", n_examples=4)) == 2
    assert "holds another run" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.tex").write_text("")
    assert run(job(base, "tisdpo_p", run_dir=tmp_path / "full")) == 2
    assert "not empty" in capsys.readouterr().err


def test_where_nothing_was_computed_yet_other_options_are_taken(base, tmp_path, capsys):
    run_dir = tmp_path / "run"
    arguments = job(base, "tisdpo_p", run_dir=run_dir, n_examples=4)
    # the folder is there, and the first stage fails before its first row
    assert run([*arguments, "loss.beta=0.3", f"model.name_or_path={base / 'no-model'}"]) == 4
    assert sorted(path.name for path in run_dir.iterdir()) == [".lock", "config.yaml"]
    assert run(arguments) == 0
    assert "beta: 0.1" in (run_dir / "config.yaml").read_text()
    capsys.readouterr()
    assert run([*arguments, "loss.beta=0.3"]) == 2
    assert "loss.beta was 0.1, is 0.3" in capsys.readouterr().err


def test_a_best_checkpoint_is_one_of_the_policy_by_a_metric_that_it_has(base, tmp_path, capsys):
    options = {"run_dir": tmp_path / "run", "stages.sft_first": "true"}
    metric = "checkpoint.keep_best"
    assert run(job(base, "tisdpo_p", **options, **{metric: "loss/evil"})) == 2
    assert "must name a held-out metric" in capsys.readouterr().err
    assert run(job(base, "tisdpo_p", **options, **{metric: "loss/eval_of_another"})) == 2
    assert "checkpoint.keep_best with loss=tisdpo must be one of" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    config = read(job(base, "tisdpo_d", **options, **{metric: "rewards_eval/margins"}))
    best = {s.name: s.config.checkpoint.keep_best for s in build_stages(config, tmp_path / "run")}
    assert best.pop("policy") == "rewards_eval/margins"
    assert set(best) == {"sft", "positive", "negative", "weights"}
    assert [best[name] for name in ("sft", "positive", "negative")] == [None] * 3


def test_rows_that_cannot_be_scored_whole_are_told_before_anything_is_trained(
    base, tmp_path, capsys
):
    # training cuts at max_length
    model = save_tiny_model(tmp_path / "model", model_type="gpt2", max_position_embeddings=64)
    options = {"model.name_or_path": model, "run_dir": tmp_path / "run"}
    assert run(job(base, "tisdpo_d", **options)) == 3
    assert f"tokens, {model} has positions for 64; weights are estimated" in capsys.readouterr().err
    assert {path.name for path in (tmp_path / "run").iterdir()} <= {"config.yaml", ".lock"}


@pytest.mark.parametrize(
    ("option", "message"),
    [
        ("loss=dpo", "task=tisdpo needs loss=tisdpo"),
        ("stages.contrast=dop", "stages.contrast must be one of .*nearest: dpo"),
        ("stages.contrast_lr=0", "stages.contrast_lr must be > 0"),
        ("weights.positive_template=harmles", "nearest: harmless"),
        ("weights.positive_template=harmful", "templates? to differ|to differ"),
    ],
)
def test_options_of_the_stages_are_checked_before_anything_runs(base, option, message):
    with pytest.raises(ConfigError, match=message):
        read([*job(base, "tisdpo_p"), option])


def test_changes_are_listed_by_their_dotted_names():
    before = {"lr": 1, "run_dir": "a", "loss": {"beta": 1, "run_dir": 2}}
    now = {"lr": 2, "run_dir": "b", "loss": {"beta": 1, "run_dir": 3}, "new": 0}
    assert list(map(str, list_changes(before, now))) == [
        "loss.run_dir was 2, is 3",
        "lr was 1, is 2",
        "new was None, is 0",
    ]


def test_caches_may_be_moved_between_two_starts():
    before = {
        "data": {"cache_dir": "a", "num_proc": 1, "strict": False},
        "reference": {"cache_dir": None, "mode": "auto"},
    }
    now = {
        "data": {"cache_dir": "b", "num_proc": 2, "strict": True},
        "reference": {"cache_dir": "c", "mode": "cache"},
    }
    assert list(map(str, list_changes(before, now))) == [
        "data.strict was False, is True",
        "reference.mode was auto, is cache",
    ]
