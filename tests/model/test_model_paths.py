"""What the names of models and tokenizers mean, and what is said of those that mean nothing."""

import itertools
import json
import shutil
from functools import partial

import huggingface_hub
import pytest
from tiny_models import save_tiny_model

from fastpref.config import ModelConfig
from fastpref.errors import CheckpointError
from fastpref.model.files.paths import find_archive, find_model, resolve_model, resolve_tokenizer
from fastpref.model.source import load_model_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base", tie_word_embeddings=True)


@pytest.fixture(scope="module")
def tokenizer_dir(model_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizers") / "alone"
    folder.mkdir()
    for path in model_dir.glob("tokenizer*"):
        shutil.copy(path, folder)
    return folder


def write_adapter(folder, base):
    folder.mkdir(parents=True, exist_ok=True)
    fields = {"peft_type": "LORA", "base_model_name_or_path": base}
    (folder / "adapter_config.json").write_text(json.dumps(fields))
    return folder


def test_folders_runs_and_archives_of_runs_are_found(model_dir, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "LATEST").symlink_to(model_dir)
    latest = str(run_dir / "LATEST")
    for resolve in (resolve_model, resolve_tokenizer):
        assert resolve(str(model_dir)) == str(model_dir)
        assert resolve(str(run_dir)) == latest
        assert resolve(f"{latest}/policy.pt") == latest


def test_a_link_that_was_copied_without_what_it_names_is_said(tmp_path):
    (tmp_path / "LATEST").symlink_to("policy/LATEST")
    finders = resolve_model, resolve_tokenizer, partial(find_archive, trust_remote_code=False)
    for resolve, name in itertools.product(finders, ("", "LATEST")):
        with pytest.raises(CheckpointError, match="LATEST is a link to policy/LATEST, which is"):
            resolve(str(tmp_path / name))


def test_the_home_of_nobody_is_a_missing_folder():
    for find in (resolve_model, lambda path: find_archive(path, trust_remote_code=False)):
        with pytest.raises(CheckpointError, match="no folder ~nobody-of-this-name/model"):
            find("~nobody-of-this-name/model")


def test_the_readmes_organisation_in_a_path_is_left_out_and_that_said_once(model_dir, caplog):
    for resolve in (resolve_model, resolve_model, resolve_tokenizer):
        assert resolve(str(model_dir.parent / "Qwen" / "base")) == str(model_dir)
    assert caplog.text.count("model.name_or_path: no folder") == 1


@pytest.mark.parametrize("name", ["gpt2-large", "EleutherAI/pythia-2.8b"])
def test_hub_names_pass(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_model(name) == resolve_tokenizer(name) == name


def test_a_missing_folder_is_named_with_its_neighbour(model_dir):
    for resolve in (resolve_model, resolve_tokenizer):
        with pytest.raises(CheckpointError, match="nearest: base"):
            resolve(str(model_dir.parent / "bsae"))


def test_what_a_folder_or_file_is_instead_of_a_model_is_said(model_dir, tokenizer_dir, tmp_path):
    with pytest.raises(CheckpointError, match=r"holds no model; .* found \[\]"):
        resolve_model(str(tmp_path))
    with pytest.raises(CheckpointError, match=r"which model\.tokenizer_name_or_path names"):
        resolve_model(str(tokenizer_dir))
    # as peft saves several adapters, and trainers their checkpoints
    write_adapter(tmp_path / "policy", str(model_dir))
    with pytest.raises(CheckpointError, match=r"models lie in it, name one of them: .*/policy$"):
        resolve_model(str(tmp_path))
    archive = tmp_path / "seed" / "LATEST" / "policy.pt"
    archive.parent.mkdir(parents=True)
    archive.touch()
    for folder in (archive.parent, archive.parent.parent):
        with pytest.raises(CheckpointError, match=f"set model.archive={archive}$"):
            resolve_model(str(folder), key="model.archive")
    # a run that was killed, its folder of checkpoints, and one of them
    state = tmp_path / "killed" / "checkpoints" / "step-00000200"
    state.mkdir(parents=True)
    (state.parent / "step-00000100").mkdir()
    for folder in (state, state.parent, state.parent.parent):
        with pytest.raises(CheckpointError, match=f"; {state} is the state of a training:"):
            resolve_model(str(folder))
    (tmp_path / "model-Q4_K_M.gguf").write_bytes(b"GGUF")
    for name in (tmp_path, tmp_path / "model-Q4_K_M.gguf"):
        with pytest.raises(CheckpointError, match="GGUF files are quantized"):
            resolve_model(str(name))


def test_a_folder_with_a_tokenizer_alone_names_a_tokenizer(model_dir, tokenizer_dir, tmp_path):
    assert resolve_tokenizer(str(tokenizer_dir)) == str(tokenizer_dir)
    bare = tmp_path / "bare"
    shutil.copytree(model_dir, bare, ignore=shutil.ignore_patterns("tokenizer*"))
    with pytest.raises(CheckpointError, match=r"model\.name_or_path: .*bare holds no tokenizer"):
        load_model_tokenizer(ModelConfig(name_or_path=str(bare)))
    options = ModelConfig(name_or_path=str(bare), tokenizer_name_or_path=str(tokenizer_dir))
    assert load_model_tokenizer(options).name_or_path == str(tokenizer_dir)
    # a revision is a commit of the model, not of the tokenizer
    options.revision = "0" * 40
    assert load_model_tokenizer(options).eos_token_id is not None


def test_an_adapter_has_its_base_s_tokenizer_unless_it_has_one(model_dir, tokenizer_dir, tmp_path):
    adapter = write_adapter(tmp_path / "adapter", str(model_dir))
    assert resolve_tokenizer(str(adapter)) == str(model_dir)
    on_top = write_adapter(tmp_path / "on_top", str(adapter))
    assert resolve_tokenizer(str(on_top)) == str(model_dir)
    for path in tokenizer_dir.iterdir():
        shutil.copy(path, adapter)
    assert resolve_tokenizer(str(adapter)) == resolve_tokenizer(str(on_top)) == str(adapter)


def test_a_base_is_looked_for_from_the_working_folder_and_from_the_adapter(
    model_dir, tmp_path, monkeypatch
):
    monkeypatch.chdir(model_dir.parent)
    assert find_model(str(write_adapter(tmp_path / "a", "base"))).base == "base"
    monkeypatch.chdir(tmp_path)
    shutil.copytree(model_dir, tmp_path / "elsewhere" / "base")
    layers = find_model(str(write_adapter(tmp_path / "elsewhere" / "b", "../base")))
    assert resolve_model(layers.base) == layers.base
    assert (tmp_path / "elsewhere" / "base").samefile(layers.base)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ("{", "cannot be read as JSON"),
        ("[]", "must hold a JSON object, got list"),
        ('{"peft_type": "LORA"}', "in base_model_name_or_path, got None"),
        (
            '{"base_model_name_or_path": "/gone"}',
            "^base_model_name_or_path of .*no folder /gone; .* write there where it lies now$",
        ),
        ('{"base_model_name_or_path": "."}', "is its own base_model_name_or_path"),
    ],
)
def test_an_adapter_without_a_base_is_refused_by_the_field(tmp_path, monkeypatch, config, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "adapter_config.json").write_text(config)
    for resolve in (find_model, resolve_tokenizer):
        with pytest.raises(CheckpointError, match=message):
            resolve(".")


def test_adapters_that_name_each_other_are_refused(tmp_path):
    first = write_adapter(tmp_path / "first", "../second")
    write_adapter(tmp_path / "second", "../first")
    with pytest.raises(CheckpointError, match="is its own base_model_name_or_path"):
        find_model(str(first))


def test_an_adapter_on_the_hub_is_one_as_in_a_folder(model_dir, tmp_path, monkeypatch):
    cached = tmp_path / "models--someone--adapter"
    write_adapter(cached / "snapshots" / ("0" * 40), str(model_dir))
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text("0" * 40)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    layers = find_model("someone/adapter")
    assert layers.base == str(model_dir)
    assert layers.adapters == (str(cached / "snapshots" / ("0" * 40)),)
    assert resolve_tokenizer("someone/adapter") == str(model_dir)


def test_an_unrelated_folder_does_not_hide_the_embedded_model(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    embedded = resolve_model("tiny")
    own = tmp_path / "tiny"
    own.mkdir()
    (own / "notes.txt").write_text("")
    assert resolve_model("tiny") == embedded
    # one that holds a model is taken, as before
    (own / "config.json").write_text("{}")
    assert resolve_model("tiny") == "tiny"
