"""Models and tokenizers by name, for every task."""

import json
import shutil
from types import SimpleNamespace

import pytest
import torch
from ranks import ALONE
from safetensors.torch import load_file, save_file
from tiny_models import save_dataset, save_tiny_model
from tiny_wrappers import save_wrapper
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from fastpref.batches.loader import pad_token_id
from fastpref.cli.run import main
from fastpref.config import AdapterConfig, Config, ModelConfig, SFTConfig, WeightsConfig
from fastpref.errors import CheckpointError
from fastpref.model.adapters.tied_head import is_tied
from fastpref.model.files.paths import find_model, resolve_model
from fastpref.model.loading import load_causal_lm
from fastpref.model.source import build_empty, load_model, load_tokenizer


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base", tie_word_embeddings=True)


def test_weights_that_do_not_fill_the_model_are_refused(model_dir, tmp_path):
    folder = tmp_path / "short"
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_model(find_model(str(folder)), dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_model(find_model(str(model_dir)), dtype=torch.float32, archive=str(folder))
    other = save_tiny_model(tmp_path / "other", hidden_size=64)
    with pytest.raises(CheckpointError, match=r"model\.archive.*wrong shape"):
        load_model(find_model(str(model_dir)), dtype=torch.float32, archive=str(other))


@pytest.mark.parametrize("archive", ["none", "none/policy.pt", ".", "organisation/name"])
def test_an_archive_that_is_not_there_is_named_before_rows_become_tokens(
    tmp_path, monkeypatch, capfd, archive
):
    monkeypatch.chdir(tmp_path)
    model = ModelConfig(name_or_path="tiny", archive=archive)
    assert main(Config(model=model, loss=SFTConfig(), datasets=["planted"])) == 4
    said = capfd.readouterr().err
    assert "fastpref: model.archive: " in said and "rows of planted" not in said, said


def test_an_attention_that_a_family_has_not_is_named_before_rows_become_tokens(tmp_path, capfd):
    folder = save_tiny_model(tmp_path, model_type="bloom")
    model = ModelConfig(name_or_path=str(folder), attention="sdpa")
    assert main(Config(model=model, loss=SFTConfig(), datasets=["planted"])) == 2
    said = capfd.readouterr().err
    assert "model.attention=sdpa: BloomForCausalLM" in said and "rows of planted" not in said, said


def test_an_adapter_that_can_only_be_merged_is_refused_before_rows_become_tokens(tmp_path, capfd):
    base = str(resolve_model("tiny"))
    fields = {"peft_type": "LORA", "base_model_name_or_path": base, "target_modules": ["q_proj"]}
    (tmp_path / "adapter_config.json").write_text(json.dumps(fields | {"bias": "all"}))
    (tmp_path / "adapter_model.safetensors").touch()
    model = ModelConfig(name_or_path=str(tmp_path))
    options = {"loss": SFTConfig(), "datasets": ["planted"], "adapter": AdapterConfig(kind="lora")}
    assert main(Config(model=model, **options)) == 4
    said = capfd.readouterr().err
    assert "has bias=all" in said and "rows of planted" not in said, said


def test_an_empty_model_has_the_shape_and_the_ties_of_the_full_one(model_dir):
    full = load_model(find_model(str(model_dir)), dtype=torch.float32)
    empty = build_empty(find_model(str(model_dir)), dtype=torch.float32)
    shapes = [{name: p.shape for name, p in m.named_parameters()} for m in (full, empty)]
    assert shapes[0] == shapes[1]
    assert empty.get_input_embeddings().weight is empty.get_output_embeddings().weight


def test_what_a_family_freezes_is_frozen_where_its_weights_are_loaded(tmp_path):
    sizes = {"num_experts": 4, "moe_intermediate_size": 16, "head_dim": 8, "num_dense_layers": 1}
    folder = save_tiny_model(tmp_path / "afmoe", model_type="afmoe", **sizes)
    model = load_causal_lm(ModelConfig(name_or_path=str(folder)), ALONE, trainable=True)
    frozen = {name for name, p in model.named_parameters() if not p.requires_grad}
    assert frozen == {"model.layers.1.mlp.expert_bias"}


def test_two_tables_that_a_config_calls_one_are_two_everywhere(tmp_path):
    folder = save_tiny_model(tmp_path / "base", tie_word_embeddings=False)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    full = load_model(find_model(str(folder)), dtype=torch.float32)
    assert not torch.equal(full.get_input_embeddings().weight, full.get_output_embeddings().weight)
    # an export says so too, whatever it started from
    archived = load_model(find_model(str(folder)), dtype=torch.float32, archive=str(folder))
    assert not full.config.tie_word_embeddings and not archived.config.tie_word_embeddings
    # what other ranks and the plan build
    empty = build_empty(find_model(str(folder)), dtype=torch.float32)
    shapes = [{name: p.shape for name, p in m.named_parameters()} for m in (full, empty)]
    assert shapes[0] == shapes[1]
    # two that are the same are one
    weights = load_file(folder / "model.safetensors")
    weights["lm_head.weight"] = weights["model.embed_tokens.weight"].clone()
    save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for build in (load_model, build_empty):
        model = build(find_model(str(folder)), dtype=torch.float32)
        assert is_tied(model) and model.config.tie_word_embeddings


@pytest.mark.parametrize("files", ["of a body without its prefix", "pickles", "with old names"])
def test_two_tables_are_found_under_any_name_and_in_pickles(tmp_path, files):
    folder = tmp_path / "base"
    if files == "with old names":
        weights = save_wrapper(folder, "gemma3", old_names=True)
        table = weights["language_model.model.embed_tokens.weight"]
        weights["language_model.lm_head.weight"] = table + 1
    else:
        save_tiny_model(folder, tie_word_embeddings=False)
        weights = load_file(folder / "model.safetensors")
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"tie_word_embeddings": True}))
    if files == "of a body without its prefix":
        weights = {name.removeprefix("model."): x for name, x in weights.items()}
    if files == "pickles":
        (folder / "model.safetensors").unlink()
        torch.save(weights, folder / "pytorch_model.bin")
    else:
        save_file(weights, folder / "model.safetensors", {"format": "pt"})
    for build in (load_model, build_empty):
        model = build(find_model(str(folder)), dtype=torch.float32)
        assert not is_tied(model) and not model.config.tie_word_embeddings


def test_two_tables_of_a_wrapper_that_calls_them_one_in_its_outer_config_are_two(tmp_path):
    # Mistral 3's says so where it says nothing, and its text part's says the opposite
    weights = save_wrapper(tmp_path, "mistral3")
    config = json.loads((tmp_path / "config.json").read_text())
    for part in (config, config["text_config"]):
        part.pop("tie_word_embeddings", None)
    (tmp_path / "config.json").write_text(json.dumps(config))
    weights["lm_head.weight"] = weights["model.language_model.embed_tokens.weight"] + 1
    save_file(weights, tmp_path / "model.safetensors", {"format": "pt"})
    for build in (load_model, build_empty):
        model = build(find_model(str(tmp_path)), dtype=torch.float32)
        assert not is_tied(model) and not model.config.tie_word_embeddings


def test_padding_has_a_row_in_the_embedding():
    def tokenizer(pad, eos):
        return SimpleNamespace(pad_token_id=pad, eos_token_id=eos)

    assert pad_token_id(tokenizer(7, 2), 8) == 7
    assert pad_token_id(tokenizer(None, 2), 8) == 2
    # added to the tokenizer alone
    assert pad_token_id(tokenizer(8, 2), 8) == 2
    assert pad_token_id(tokenizer(9, 8), 8) == 0
    assert pad_token_id(tokenizer(0, 2), 8) == 0


def test_a_tokenizer_of_a_folder_of_its_own_serves_every_task(model_dir, tmp_path):
    save_dataset(tmp_path, "words", num_train=12, num_test=4)
    bare = tmp_path / "bare"
    shutil.copytree(model_dir, bare, ignore=shutil.ignore_patterns("*token*"))
    (tmp_path / "tokenizer").mkdir()
    for path in model_dir.glob("*token*"):
        shutil.copy(path, tmp_path / "tokenizer")
    options = {
        "model": ModelConfig(
            name_or_path=str(bare), tokenizer_name_or_path=str(tmp_path / "tokenizer")
        ),
        "loss": SFTConfig(),
        "datasets": ["words"],
        "base_data_dir": str(tmp_path),
        "n_eval_examples": 0,
    }
    for task, run_dir in (("audit", tmp_path / "audit"), ("train", tmp_path / "run")):
        assert main(Config(task=task, run_dir=str(run_dir), **options)) == 0
    weights = WeightsConfig(
        positive=str(tmp_path / "run"), negative=str(bare), output_dir=str(tmp_path / "weights")
    )
    assert main(Config(task="estimate_weights", weights=weights, **options)) == 0
    assert AutoTokenizer.from_pretrained(tmp_path / "run" / "LATEST").eos_token_id is not None


@pytest.mark.parametrize("task", ["audit", "train", "estimate_weights"])
def test_files_that_cannot_be_used_end_every_task_with_exit_4(model_dir, tmp_path, task, capsys):
    save_dataset(tmp_path, "words", num_train=12, num_test=4)
    broken = tmp_path / "broken"
    shutil.copytree(model_dir, broken)
    (broken / "adapter_config.json").write_text('{"base_model_name_or_path": "/gone"}')
    weights = WeightsConfig(
        positive=str(broken), negative=str(model_dir), output_dir=str(tmp_path / "weights")
    )
    options = {"datasets": ["words"], "base_data_dir": str(tmp_path), "n_eval_examples": 0}
    config = Config(
        task=task,
        model=ModelConfig(name_or_path=str(broken)),
        loss=SFTConfig(),
        weights=weights,
        **options,
    )
    assert main(config) == 4
    message = "fastpref: base_model_name_or_path of"
    assert capsys.readouterr().err.splitlines()[-1].startswith(message)


def test_a_tokenizer_is_the_one_that_was_saved_whatever_the_models_type(tmp_path):
    save_tiny_model(tmp_path, model_type="qwen2")
    words = Tokenizer(models.WordLevel({"</s>": 0, "red": 1, "cat": 2}, unk_token="</s>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    PreTrainedTokenizerFast(tokenizer_object=words, eos_token="</s>").save_pretrained(tmp_path)
    assert load_tokenizer(str(tmp_path))("cat red")["input_ids"] == [2, 1]
