"""What a model option may name, and what is refused."""

import json

import pytest
import torch
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref.errors import CheckpointError
from fastpref.model.paths import resolve_model
from fastpref.model.source import (
    build_empty,
    load_model,
    load_tokenizer,
    read_vocab_size,
    switch_off_dropout,
)


@pytest.fixture(scope="module")
def model_dir(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("models") / "base", tie_word_embeddings=True)


def test_folders_runs_and_archives_of_runs_are_found(model_dir, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.mkdir()
    (run_dir / "LATEST").symlink_to(model_dir)
    latest = str(run_dir / "LATEST")
    assert resolve_model(str(model_dir)) == str(model_dir)
    assert resolve_model(str(run_dir)) == latest
    assert resolve_model(f"{latest}/policy.pt") == latest


def test_the_readmes_organisation_in_a_path_is_left_out(model_dir):
    assert resolve_model(str(model_dir.parent / "Qwen" / "base")) == str(model_dir)


@pytest.mark.parametrize("name", ["gpt2-large", "EleutherAI/pythia-2.8b"])
def test_hub_names_pass(name, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert resolve_model(name) == name


def test_a_missing_folder_is_named_with_its_neighbour(model_dir, tmp_path):
    with pytest.raises(CheckpointError, match="nearest: base"):
        resolve_model(str(model_dir.parent / "bsae"))
    with pytest.raises(CheckpointError, match="holds no model"):
        resolve_model(str(tmp_path))


def test_weights_that_do_not_fill_the_model_are_refused(model_dir, tmp_path):
    folder = tmp_path / "short"
    model = AutoModelForCausalLM.from_pretrained(model_dir)
    state = model.state_dict()
    del state["model.layers.1.mlp.up_proj.weight"]
    model.save_pretrained(folder, state_dict=state)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(folder), dtype=torch.float32)
    with pytest.raises(CheckpointError, match=r"layers\.1\.mlp\.up_proj\.weight"):
        load_model(str(model_dir), dtype=torch.float32, archive=str(folder))
    other = save_tiny_model(tmp_path / "other", hidden_size=64)
    with pytest.raises(CheckpointError, match=r"model\.archive.*wrong shape"):
        load_model(str(model_dir), dtype=torch.float32, archive=str(other))


def test_an_empty_model_has_the_shape_and_the_ties_of_the_full_one(model_dir):
    full = load_model(str(model_dir), dtype=torch.float32)
    empty = build_empty(str(model_dir), dtype=torch.float32)
    shapes = [{name: p.shape for name, p in m.named_parameters()} for m in (full, empty)]
    assert shapes[0] == shapes[1]
    assert empty.get_input_embeddings().weight is empty.get_output_embeddings().weight


def test_dropout_is_off_in_training_mode_and_the_config_keeps_it(tmp_path):
    folder = save_tiny_model(tmp_path / "m", attention_dropout=0.5)
    model = load_model(str(folder), dtype=torch.float32).train()
    ids = torch.arange(8)[None]
    assert torch.equal(model(input_ids=ids).logits, model(input_ids=ids).logits)
    assert model.config.attention_dropout == 0.5
    noisy = AutoModelForCausalLM.from_pretrained(folder).train()
    assert not torch.equal(noisy(input_ids=ids).logits, noisy(input_ids=ids).logits)
    switch_off_dropout(noisy)
    assert torch.equal(noisy(input_ids=ids).logits, noisy(input_ids=ids).logits)


def test_an_adapter_folder_is_its_base_with_the_adapter_merged(model_dir, tmp_path):
    peft = pytest.importorskip("peft")
    base = AutoModelForCausalLM.from_pretrained(model_dir)
    config = peft.LoraConfig(r=4, target_modules=["q_proj", "up_proj"], init_lora_weights=False)
    adapted = peft.get_peft_model(base, config)
    adapted.save_pretrained(tmp_path / "adapter")
    AutoTokenizer.from_pretrained(model_dir).save_pretrained(tmp_path / "adapter")
    saved = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert saved["base_model_name_or_path"] == str(model_dir)

    name = resolve_model(str(tmp_path / "adapter"))
    model = load_model(name, dtype=torch.float32)
    ids = torch.arange(12)[None]
    torch.testing.assert_close(model(input_ids=ids).logits, adapted(input_ids=ids).logits)
    assert read_vocab_size(name) == base.config.vocab_size
    assert load_tokenizer(name).eos_token_id == base.config.eos_token_id
