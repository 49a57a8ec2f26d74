"""Run folders: what a start without a step leaves stands in nobody's way, anything else does."""

import json
import os
import shutil
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import save_dataset, save_tiny_model

import train
from fastpref.checkpoint.folders import CHECKPOINTS
from fastpref.cli.command_line import main
from fastpref.config import Config, DPOConfig, ModelConfig
from fastpref.errors import ConfigError
from fastpref.train.opening import keep_options, read_options
from fastpref.train.resume.origin import keep_origin, origin_of, run_of
from fastpref.train.run_folder import (
    OPTIONS,
    check_cache,
    clear_start,
    keeping_locks,
    run_place,
    took_no_step,
)

EVAL, TRAIN = ({"step": 0, "examples": 0, "split": split} for split in ("eval", "train"))


def fill(folder: Path, names: list[str], records: list[dict[str, object]]) -> Path:
    folder.mkdir()
    for name in names:
        path = folder / name
        path.mkdir() if name in ("LATEST", "wandb", "notes") else path.write_text("")
    if records:
        lines = "".join(json.dumps(record) + "\n" for record in records)
        (folder / "metrics.jsonl").write_text(lines)
    return folder


def make_config(**options: object) -> Config:
    return Config(model=ModelConfig(name_or_path="tiny"), loss=DPOConfig(), **options)


@pytest.mark.parametrize(
    ("names", "records", "may_be_replaced"),
    [
        ([], [], True),
        (["config.yaml"], [], True),
        (["config.yaml", "wandb", "samples.jsonl", "wandb-id.partial"], [EVAL], True),
        (["config.yaml", "LATEST", "curves.png"], [EVAL], True),
        (["config.yaml"], [EVAL, TRAIN], False),
        # whose numbers are gone: the model may be all that somebody kept
        (["config.yaml", "LATEST"], [], False),
        (["config.yaml", "notes"], [EVAL], False),
        (["samples.jsonl"], [], False),
    ],
)
def test_only_what_a_run_leaves_before_its_first_step_may_be_replaced(
    tmp_path, names, records, may_be_replaced
):
    run_dir = fill(tmp_path / "run", names, records)
    assert took_no_step(run_dir) == (may_be_replaced and bool(names))
    config = make_config(run_dir=str(run_dir))
    if may_be_replaced:
        run_place(config).check()
        return
    with pytest.raises(ConfigError, match=r"run_dir: .* is not empty; name a new folder"):
        run_place(config).check()


def test_a_checkpoint_is_a_step_whatever_the_metrics_say(tmp_path):
    run_dir = fill(tmp_path / "run", ["config.yaml"], [EVAL])
    (run_dir / CHECKPOINTS / "step-00000004").mkdir(parents=True)
    assert not took_no_step(run_dir)
    with pytest.raises(ConfigError, match="set resume=auto to go on with the run"):
        run_place(make_config(run_dir=str(run_dir))).check()


def test_what_another_start_has_done_meanwhile_is_not_replaced(tmp_path):
    run_dir = tmp_path / "run"
    place = run_place(make_config(run_dir=str(run_dir)))
    place.check()
    # it came, trained and ended while this one loaded its models
    fill(run_dir, ["config.yaml", "LATEST"], [EVAL, TRAIN])
    before = {path: path.read_bytes() for path in run_dir.iterdir() if path.is_file()}
    with keeping_locks(), pytest.raises(ConfigError, match="set resume=auto to go on with the run"):
        place.create("")
    assert {path: path.read_bytes() for path in before} == before
    assert (run_dir / "LATEST").is_dir()


@pytest.mark.parametrize("keep_model", [False, True])
def test_killed_while_it_is_cleared_a_run_folder_is_one_of_a_run(tmp_path, monkeypatch, keep_model):
    names = ["config.yaml", "LATEST", "wandb", "samples.jsonl", "curves.png"]
    removed: list[Path] = []

    def until(number: int, remove: Callable[..., None]) -> Callable[..., None]:
        def act(path: Path, **options: Any) -> None:
            removed.extend([path] * path.exists())
            if len(removed) > number:
                raise KeyboardInterrupt
            remove(path, **options)

        return act

    for number in range(len(names) + 1):
        run_dir = fill(tmp_path / f"run-{number}", names, [EVAL, TRAIN] if keep_model else [EVAL])
        removed.clear()
        with monkeypatch.context() as patch, suppress(KeyboardInterrupt):
            patch.setattr(Path, "unlink", until(number, Path.unlink))
            patch.setattr(shutil, "rmtree", until(number, shutil.rmtree))
            clear_start(run_dir, keep_model=keep_model)
        run_place(make_config(run_dir=str(run_dir))).check(may_go_on=True)
    assert len(removed) == len(names) + (-1 if keep_model else 1)


def test_a_run_without_its_options_is_known_by_its_checkpoints(tmp_path):
    run_dir = fill(tmp_path / "run", ["samples.jsonl"], [EVAL, TRAIN])
    (run_dir / "checkpoints" / "step-00000001").mkdir(parents=True)
    run_place(make_config(run_dir=str(run_dir))).check(may_go_on=True)
    keep_options(run_dir, "lr: 1\n", 1)
    # damaged, they stay as they are
    (run_dir / "config.yaml").write_bytes(b"\xff{[")
    assert read_options(run_dir / "config.yaml") == {}
    keep_options(run_dir, "lr: 1\n", 2)
    assert (run_dir / "config-until-step-2.yaml").read_bytes() == b"\xff{["
    assert read_options(run_dir / "config.yaml") == {"lr": 1}
    (run_dir / "config.yaml").write_bytes(b"1\n")
    assert read_options(run_dir / "config.yaml") == {}


def test_where_a_branch_began_is_told_whatever_its_bytes(tmp_path):
    checkpoint = tmp_path / os.fsdecode(b"caf\xe9") / "step-00000001"
    keep_origin(tmp_path, checkpoint)
    assert origin_of(tmp_path) == checkpoint
    # also if it was given relative to the working directory of that start
    keep_origin(tmp_path, Path(os.path.relpath(checkpoint)))
    assert origin_of(tmp_path).is_absolute() and origin_of(tmp_path) == checkpoint
    # damaged, it names what is not there
    (tmp_path / "branched-off-from").write_bytes(b"/run\xff\x00s")
    damaged = origin_of(tmp_path)
    assert damaged is not None and not damaged.exists()


def test_a_folder_on_a_disk_that_is_not_there_is_refused_before_anything_is_loaded(tmp_path):
    (tmp_path / "runs").symlink_to(tmp_path / "unmounted")
    for name in ("runs", "runs/mine"):
        with pytest.raises(ConfigError, match=r"runs is a link to .*unmounted, which is not there"):
            run_place(make_config(run_dir=str(tmp_path / name))).check()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run_dir": "/proc/fastpref"}, "run_dir: /proc is not writable"),
        ({"run_dir": "/tmp/" + "n" * 300}, "run_dir: .*: File name too long"),
        ({"exp_name": "n" * 300}, "exp_name: .*: File name too long"),
        ({"exp_name": "new/" + "n" * 300}, "exp_name: .*: File name too long"),
        ({"exp_name": "/dev/null/x"}, "exp_name: /dev/null is a file"),
        ({"exp_name": "new/../../x"}, "exp_name must stay in output_dir .*; run_dir names a"),
        ({"exp_name": "/tmp/x"}, "exp_name must stay in output_dir"),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(
    tmp_path, options, message
):
    with pytest.raises(ConfigError, match=message):
        run_place(make_config(output_dir=str(tmp_path), **options)).check()
    assert not list(tmp_path.iterdir())


def test_a_cache_folder_that_is_neither_writable_nor_filled_is_refused():
    for name, existing in (("sys", "/proc/sys"), ("fastpref", "/proc")):
        with pytest.raises(
            ConfigError, match=rf"^reference\.cache_dir: {existing} is not writable: "
        ):
            check_cache(Path("/proc") / name)


def test_local_dirs_are_the_first_that_is_there_or_the_last(tmp_path, monkeypatch):
    monkeypatch.setenv("LOGNAME", "me")
    folders = [tmp_path / name for name in "abc"]
    place = run_place(make_config(local_dirs=[str(folder) for folder in folders]))
    assert place.root == tmp_path / "c" / "me"
    folders[1].mkdir()
    place = run_place(make_config(local_dirs=[str(folder) for folder in folders]))
    assert place.root == tmp_path / "b" / "me"
    # beside the run folders, for all of them
    assert place.references(None) == tmp_path / "b" / "me" / "reference-logps"


def test_a_run_that_fails_at_its_first_step_does_not_block_the_same_command(tmp_path, capsys):
    save_dataset(tmp_path, "words")
    model = save_tiny_model(tmp_path / "model")
    weights = load_file(model / "model.safetensors")
    run_dir = tmp_path / "run"
    options = ["loss=sft", "model=blank_model", f"model.name_or_path={model}", "datasets=[words]"]
    options += [f"base_data_dir={tmp_path}", f"run_dir={run_dir}", "sample_during_eval=false"]
    options += ["max_length=64", "max_prompt_length=32", "batch_size=8", "packing.enabled=false"]

    def run(scale: float) -> int:
        scaled = weights | {"lm_head.weight": scale * weights["lm_head.weight"]}
        save_file(scaled, model / "model.safetensors", metadata={"format": "pt"})
        return main(options, train.compose_choices, train.CONFIG_DIR)

    for _ in range(2):
        # gradients too large for any number
        assert run(1e30) == 5
        assert (run_dir / "metrics.jsonl").exists()
    assert run(1.0) == 0
    records = [json.loads(line) for line in (run_dir / "metrics.jsonl").open()]
    # nothing of the starts before is left
    assert [record["step"] for record in records] == [0, 1, 2, 3, 3]
    capsys.readouterr()
    assert run(1.0) == 2
    assert "is not empty" in capsys.readouterr().err


def test_a_checkpoint_belongs_to_its_run_by_the_path_as_given_or_by_where_it_leads(tmp_path):
    run, disk, link = (tmp_path / name for name in ("run", "disk", "link"))
    run.mkdir()
    (run / OPTIONS).touch()
    (disk / "step-00000001").mkdir(parents=True)
    (run / CHECKPOINTS).symlink_to(disk)
    assert run_of(run / CHECKPOINTS / "step-00000001") == run
    (run / CHECKPOINTS).unlink()
    (run / CHECKPOINTS / "step-00000001").mkdir(parents=True)
    link.symlink_to(run / CHECKPOINTS / "step-00000001")
    assert run_of(link) == run.resolve()
    assert run_of(disk) is None
