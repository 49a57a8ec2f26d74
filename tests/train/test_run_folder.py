"""Run folders: what a start without a step leaves stands in nobody's way, anything else does."""

import json
from pathlib import Path

import pytest
from safetensors.torch import load_file, save_file
from tiny_models import save_dataset, save_tiny_model

import train
from fastpref.cli.command_line import main
from fastpref.config import Config, DPOConfig, ModelConfig
from fastpref.errors import ConfigError
from fastpref.train.run_folder import run_place, took_no_step

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
        (["config.yaml", "wandb", "samples.jsonl"], [EVAL], True),
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


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"run_dir": "/proc/fastpref"}, "run_dir: /proc is not writable"),
        ({"run_dir": "/tmp/" + "n" * 300}, "run_dir: .*: File name too long"),
        ({"exp_name": "n" * 300}, "exp_name: .*: File name too long"),
        ({"exp_name": "/dev/null/x"}, "exp_name: /dev/null is a file"),
    ],
)
def test_a_folder_that_cannot_be_made_is_refused_before_anything_is_loaded(
    tmp_path, options, message
):
    with pytest.raises(ConfigError, match=message):
        run_place(make_config(output_dir=str(tmp_path), **options)).check()
    assert not list(tmp_path.iterdir())


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
