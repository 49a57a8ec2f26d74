"""A model is the content of its files, wherever it lies."""

import shutil

import pytest
import torch
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

from fastpref.config import ModelConfig
from fastpref.errors import CheckpointError
from fastpref.model.files.identity import model_identity, side_model


def identity(name, **options) -> str:
    return model_identity(ModelConfig(name_or_path=str(name), **options))


def test_a_copy_is_the_same_model_and_other_weights_are_another(tmp_path):
    folder = save_tiny_model(tmp_path / "a")
    shutil.copytree(folder, tmp_path / "run" / "LATEST")
    other = save_tiny_model(tmp_path / "b", seed=1)
    assert identity(folder) == identity(tmp_path / "run") != identity(other)
    # the tokenizer has a digest of its own
    (folder / "tokenizer_config.json").write_text("{}")
    assert identity(folder) == identity(tmp_path / "run")
    archive = tmp_path / "policy.pt"
    state = AutoModelForCausalLM.from_pretrained(other).state_dict()
    torch.save({"step_idx": 1, "state": state}, archive)
    assert identity(folder, archive=str(archive)) not in {identity(folder), identity(other)}


def test_a_model_that_is_nowhere_is_one_message():
    with pytest.raises(CheckpointError, match="cannot load Config from nobody/nothing"):
        identity("nobody/nothing")


def test_a_side_keeps_the_precision_and_drops_what_belongs_to_the_run_s_model(tmp_path):
    model = ModelConfig(name_or_path="base", archive="run", revision="v1", attention="sdpa")
    other = side_model(model, "org/name")
    assert (other.name_or_path, other.archive, other.revision) == ("org/name", None, None)
    assert (other.attention, side_model(model, "base").revision) == ("sdpa", "v1")
    archive = tmp_path / "policy.pt"
    archive.write_bytes(b"")
    side = side_model(model, str(archive))
    assert (side.name_or_path, side.archive, side.revision) == ("base", str(archive), "v1")
