"""Frozen models stored in 16 bits compute what they compute in float32, to the last bit."""

import huggingface_hub
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, build_model, random_rows
from transformers import AutoConfig, AutoModelForCausalLM

from fastpref.batches.padded import pad_rows
from fastpref.config import ModelConfig
from fastpref.errors import ConfigError
from fastpref.model.exact_arithmetic import cast_in_forward as compute_in
from fastpref.model.files.paths import find_model
from fastpref.model.frozen import (
    checkpoint_dtypes,
    frozen_dtype,
    is_stored_exactly,
)
from fastpref.model.scorer import TokenScorer
from fastpref.model.source import load_model

ROUNDED_BUFFERS = {"gemma2"}
"""Families with a buffer, the embedding's scale, that is rounded as the parameters are."""


def save_checkpoint(folder, family, dtype):
    model = build_model(family)
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)
    model.save_pretrained(folder)
    return str(folder)


def in_float32(name, **options):
    return ModelConfig(name_or_path=name, fsdp_policy_mp=None, **options)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_stored_in_16_bits_scores_as_in_float32(tmp_path, family, dtype):
    name = save_checkpoint(tmp_path / "model", family, dtype)
    stored = frozen_dtype(in_float32(name))
    assert stored == ("float32" if family in ROUNDED_BUFFERS else str(dtype)[len("torch.") :])
    narrow = load_model(find_model(name), dtype=getattr(torch, stored)).requires_grad_(False)
    compute_in(narrow, torch.float32)
    batch = pad_rows(random_rows(), pad_token_id=0)
    with torch.no_grad():
        expected_N = TokenScorer(load_model(find_model(name), dtype=torch.float32))(batch)
        logps_N = TokenScorer(narrow)(batch)
    assert logps_N.dtype == torch.float32
    assert torch.equal(logps_N, expected_N)
    assert {parameter.dtype for parameter in narrow.parameters()} == {getattr(torch, stored)}


def test_parameters_are_narrow_again_after_a_forward_that_failed(tmp_path):
    name = save_checkpoint(tmp_path / "model", "llama", torch.bfloat16)
    model = load_model(find_model(name), dtype=torch.bfloat16).requires_grad_(False)
    compute_in(model, torch.float32)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(IndexError):
        model(input_ids=torch.tensor([[1, 500]]))
    after = model.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())


def test_at_most_one_block_is_wide_at_a_time(tmp_path):
    name = save_checkpoint(tmp_path / "model", "llama", torch.bfloat16)
    model = load_model(find_model(name), dtype=torch.bfloat16).requires_grad_(False)
    compute_in(model, torch.float32)
    num_wide = []
    for block in model.model.layers:
        block.self_attn.register_forward_hook(
            lambda *_: num_wide.append(
                sum(p.dtype == torch.float32 for p in model.model.layers.parameters())
            )
        )
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 5]]))
    per_block = len(list(model.model.layers[0].parameters()))
    assert num_wide == [per_block, per_block]


def test_a_model_that_names_no_blocks_is_cast_module_by_module(tmp_path):
    name = save_checkpoint(tmp_path / "model", "llama", torch.bfloat16)
    model = load_model(find_model(name), dtype=torch.bfloat16).requires_grad_(False)
    model._no_split_modules = None
    compute_in(model, torch.float32)
    batch = pad_rows(random_rows(), pad_token_id=0)
    with torch.no_grad():
        expected_N = TokenScorer(load_model(find_model(name), dtype=torch.float32))(batch)
        assert torch.equal(TokenScorer(model)(batch), expected_N)


def test_a_block_name_that_is_not_there_is_refused():
    with pytest.raises(ConfigError, match="no module of class NoSuchBlock"):
        compute_in(build_model("llama"), torch.float32, "NoSuchBlock")


def test_what_would_be_rounded_is_stored_in_the_compute_dtype(tmp_path):
    half = save_checkpoint(tmp_path / "half", "llama", torch.bfloat16)
    full = save_checkpoint(tmp_path / "full", "llama", torch.float32)
    assert frozen_dtype(in_float32(half)) == "bfloat16"
    assert frozen_dtype(in_float32(full)) == "float32"
    # other weights than the checkpoint's own
    assert frozen_dtype(in_float32(half, archive=full)) == "float32"
    # what the user says counts
    assert frozen_dtype(in_float32(half, reference_dtype="float32")) == "float32"
    assert frozen_dtype(ModelConfig(name_or_path=full)) == "bfloat16"


def test_one_wide_weight_among_narrow_ones_keeps_its_value(tmp_path):
    name = save_checkpoint(tmp_path / "model", "llama", torch.bfloat16)
    path = tmp_path / "model" / "model.safetensors"
    weights = load_file(path)
    weights["model.norm.weight"] = weights["model.norm.weight"].float() + 1e-6
    save_file(weights, path, metadata={"format": "pt"})
    assert frozen_dtype(in_float32(name)) == "float32"


def test_a_family_that_keeps_some_parameters_in_float32_is_stored_in_it():
    config = AutoConfig.for_model(
        "deepseek_v3", num_hidden_layers=2, hidden_size=32, vocab_size=97, n_routed_experts=8
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    assert not is_stored_exactly(model)


def test_a_variant_that_is_not_loaded_does_not_count(tmp_path):
    name = save_checkpoint(tmp_path / "model", "llama", torch.float16)
    assert checkpoint_dtypes(find_model(name)) == {"F16"}
    path = tmp_path / "model" / "model.safetensors"
    path.rename(path.with_name("model.fp16.safetensors"))
    assert checkpoint_dtypes(find_model(name)) == set()


def test_a_hub_model_counts_by_its_files_in_the_cache(tmp_path, monkeypatch):
    commit = "0" * 40
    cached = tmp_path / "models--someone--llama"
    save_checkpoint(cached / "snapshots" / commit, "llama", torch.bfloat16)
    (cached / "refs").mkdir()
    (cached / "refs" / "main").write_text(commit)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path))
    assert checkpoint_dtypes(find_model("someone/llama")) == {"BF16"}
    assert checkpoint_dtypes(find_model("someone/unknown")) == set()


def test_a_damaged_checkpoint_is_left_to_the_load(tmp_path):
    name = save_checkpoint(tmp_path / "model", "llama", torch.bfloat16)
    (tmp_path / "model" / "model.safetensors").write_bytes(b"no weights")
    assert frozen_dtype(in_float32(name)) == "float32"


def test_a_norm_whose_dtype_is_read_before_it_runs_rounds_nothing(tmp_path):
    name = save_checkpoint(tmp_path / "model", "llama", torch.bfloat16)
    models = [
        load_model(find_model(name), dtype=dtype) for dtype in (torch.float32, torch.bfloat16)
    ]
    for model in models:
        # as Zaya does before its final norm
        norm = model.model.norm
        model.model.layers[1].register_forward_hook(
            lambda _, __, output, norm=norm: output.to(norm.weight.dtype)
        )
    compute_in(models[1].requires_grad_(False), torch.float32)
    batch = pad_rows(random_rows(), pad_token_id=0)
    with torch.no_grad():
        expected_N, logps_N = (TokenScorer(model)(batch) for model in models)
    assert torch.equal(logps_N, expected_N)


def test_an_embedding_is_wide_no_longer_than_it_runs(tmp_path):
    name = save_checkpoint(tmp_path / "model", "llama", torch.bfloat16)
    model = load_model(find_model(name), dtype=torch.bfloat16).requires_grad_(False)
    compute_in(model, torch.float32)
    dtypes = []
    embedding = model.model.embed_tokens
    embedding.register_forward_pre_hook(lambda *_: dtypes.append(embedding.weight.dtype))
    model.model.norm.register_forward_hook(lambda *_: dtypes.append(embedding.weight.dtype))
    with torch.no_grad():
        model(input_ids=torch.tensor([[1, 5]]))
    assert dtypes == [torch.float32, torch.bfloat16]
