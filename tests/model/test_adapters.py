"""Adapter folders as peft leaves them: one model with their base, or one sentence."""

import json
import shutil
import warnings

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import save_tiny_model
from transformers import AutoModelForCausalLM

from fastpref.config import ModelConfig
from fastpref.errors import CheckpointError
from fastpref.model.adapters.folders import adapt_config
from fastpref.model.files.identity import model_identity
from fastpref.model.files.paths import find_model
from fastpref.model.frozen import frozen_dtype
from fastpref.model.source import build_empty, build_meta, load_model, read_vocab_size

peft = pytest.importorskip("peft")

IDS = torch.arange(3, 15)[None]
LORA = {"r": 4, "target_modules": ["q_proj"]}


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    for name, tied in (("tied", True), ("untied", False)):
        save_tiny_model(folder / name, tie_word_embeddings=tied)
    return folder


def save_adapter(base, folder, config, rows=None):
    """An adapter as training leaves it; returns the model with it beside its base."""
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows)
    torch.manual_seed(1)
    adapted = peft.get_peft_model(model, config).eval()
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.normal_(std=0.2)
    adapted.save_pretrained(folder)
    return adapted


def edit(folder, **changes):
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


@pytest.fixture(scope="module")
def adapter(models):
    save_adapter(models / "tied", models / "adapter", peft.LoraConfig(**LORA))
    return models / "adapter"


TABLES = ["embed_tokens", "lm_head"]
CASES = {
    # name: base, adapter, rows of the resized embedding, whether embedding and head stay one
    "lora": ("tied", peft.LoraConfig(**LORA), None, True),
    "more rows, tied": ("tied", peft.LoraConfig(**LORA), 360, True),
    "more rows": ("untied", peft.LoraConfig(**LORA), 360, False),
    "fewer rows": ("untied", peft.LoraConfig(**LORA), 320, False),
    "tables saved whole": ("tied", peft.LoraConfig(**LORA, modules_to_save=TABLES), 360, False),
    "embedding saved whole": (
        "tied",
        peft.LoraConfig(**LORA, modules_to_save=["embed_tokens"]),
        None,
        False,
    ),
    "lora on tables": (
        "untied",
        peft.LoraConfig(r=4, target_modules=["q_proj", *TABLES]),
        360,
        False,
    ),
    "task": ("untied", peft.LoraConfig(**LORA, task_type="CAUSAL_LM"), None, False),
    "ia3": (
        "untied",
        peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
        None,
        False,
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_a_merged_adapter_is_what_was_trained(models, tmp_path, case):
    base, config, rows, tied = CASES[case]
    adapted = save_adapter(models / base, tmp_path / "adapter", config, rows)
    name = str(tmp_path / "adapter")
    model = load_model(find_model(name), dtype=torch.float32)
    torch.testing.assert_close(model(input_ids=IDS).logits, adapted(input_ids=IDS).logits)
    assert read_vocab_size(find_model(name)) == model.config.vocab_size == adapted.config.vocab_size
    assert (model.get_input_embeddings().weight is model.get_output_embeddings().weight) == tied
    # what the other ranks build
    shapes = [
        {key: p.shape for key, p in m.named_parameters()}
        for m in (model, build_empty(find_model(name), dtype=torch.float32))
    ]
    assert shapes[0] == shapes[1]
    # policy and reference are one model however each is stored
    half = load_model(find_model(name), dtype=torch.bfloat16)
    for narrow, wide in zip(half.parameters(), model.parameters(), strict=True):
        assert torch.equal(narrow, wide.to(torch.bfloat16))
    model.save_pretrained(tmp_path / "merged")
    again = AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    assert torch.equal(again(input_ids=IDS).logits, model(input_ids=IDS).logits)


def test_a_model_s_modules_are_not_walked_for_every_matrix_of_an_adapter(
    models, tmp_path, monkeypatch
):
    # in a mixture of experts both are tens of thousands
    model = build_meta(find_model(str(models / "tied")), dtype=torch.float32)
    walk, walks = type(model).named_modules, []
    monkeypatch.setattr(
        type(model), "named_modules", lambda *x, **y: walks.append(None) or walk(*x, **y)
    )
    numbers = set()
    for layers in (["q_proj"], ["q_proj", "k_proj", "v_proj", "o_proj"]):
        folder = tmp_path / str(len(layers))
        save_adapter(models / "tied", folder, peft.LoraConfig(r=4, target_modules=layers))
        walks.clear()
        adapt_config(model.config, model, str(folder))
        numbers.add(len(walks))
    assert len(numbers) == 1, numbers


def test_merging_warns_of_nothing_between_libraries(adapter):
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        load_model(find_model(str(adapter)), dtype=torch.float32)
    assert not [entry.message for entry in said if entry.category is FutureWarning]


def test_experts_adapters_of_transformers_4_are_merged(tmp_path):
    """There each expert's layers are layers of their own, with names of their own."""
    mixture = {"num_experts": 2, "num_experts_per_tok": 1, "moe_intermediate_size": 16}
    base = save_tiny_model(tmp_path / "base", model_type="qwen3_moe", head_dim=8, **mixture)
    expected = AutoModelForCausalLM.from_pretrained(base)
    ends = ["gate_proj", "up_proj", "down_proj"]
    saved = {}
    with torch.no_grad():
        for i, block in enumerate(expected.model.layers):
            experts = block.mlp.experts
            for j in range(2):
                matrices = *experts.gate_up_proj[j].chunk(2), experts.down_proj[j]
                for end, weight in zip(ends, matrices, strict=True):
                    A, B = torch.randn(2, weight.shape[1]), torch.randn(weight.shape[0], 2)
                    name = f"base_model.model.model.layers.{i}.mlp.experts.{j}.{end}"
                    saved |= {f"{name}.lora_A.weight": A, f"{name}.lora_B.weight": B}
                    weight += 2 * B @ A
    config = peft.LoraConfig(r=2, lora_alpha=4, target_modules=ends, task_type="CAUSAL_LM")
    config.base_model_name_or_path = str(base)
    config.save_pretrained(tmp_path / "adapter")
    save_file(saved, tmp_path / "adapter" / "adapter_model.safetensors")
    model = load_model(find_model(str(tmp_path / "adapter")), dtype=torch.float32)
    torch.testing.assert_close(model(input_ids=IDS).logits, expected(input_ids=IDS).logits)


def test_an_adapter_on_an_adapter_is_merged_after_it(models, adapter, tmp_path):
    save_adapter(adapter, tmp_path / "plain", peft.LoraConfig(r=2, target_modules=["v_proj"]))
    merged = load_model(find_model(str(adapter)), dtype=torch.float32)
    merged.save_pretrained(tmp_path / "merged")
    adapted = save_adapter(
        tmp_path / "merged", tmp_path / "second", peft.LoraConfig(r=2, target_modules=["v_proj"])
    )
    edit(tmp_path / "second", base_model_name_or_path=str(adapter))
    model = load_model(find_model(str(tmp_path / "second")), dtype=torch.float32)
    torch.testing.assert_close(model(input_ids=IDS).logits, adapted(input_ids=IDS).logits)


NOT_MERGEABLE = {
    "prompt": (
        peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3),
        r"\(PROMPT_TUNING\) cannot be merged .* adds tokens",
    ),
    "tied embedding": (
        peft.LoraConfig(r=4, target_modules=["q_proj", "embed_tokens"]),
        r"\(LORA\) cannot be merged .* logits are off",
    ),
    "activated": (
        peft.LoraConfig(**LORA, alora_invocation_tokens=[3], task_type="CAUSAL_LM"),
        r"\(LORA\) cannot be merged .*aLoRA",
    ),
    "other layers": (
        peft.LoraConfig(**LORA, layer_replication=[(0, 2), (1, 2)], task_type="CAUSAL_LM"),
        r"cannot be merged .*layer_replication=\[\[0, 2\], \[1, 2\]\]",
    ),
    "other task": (
        peft.LoraConfig(**LORA, task_type="FEATURE_EXTRACTION"),
        "for the task FEATURE_EXTRACTION, expected CAUSAL_LM",
    ),
}


@pytest.mark.parametrize("case", NOT_MERGEABLE)
def test_what_cannot_be_merged_is_refused_by_name(models, tmp_path, case):
    config, message = NOT_MERGEABLE[case]
    save_adapter(models / "tied", tmp_path / "adapter", config)
    with pytest.raises(CheckpointError, match=f"adapter .*{message}"):
        load_model(find_model(str(tmp_path / "adapter")), dtype=torch.float32)


def test_adapters_that_do_not_fit_their_base_are_refused(models, adapter, tmp_path):
    save_tiny_model(tmp_path / "wide", hidden_size=64)
    save_tiny_model(tmp_path / "deep", num_hidden_layers=3)
    save_tiny_model(tmp_path / "shallow", num_hidden_layers=1)
    save_tiny_model(tmp_path / "gpt2", model_type="gpt2")
    expected = {
        "wide": "size mismatch",
        "deep": r"missing .*layers\.2\.self_attn\.q_proj\.lora_A",
        "shallow": r"without a place .*layers\.1\.self_attn\.q_proj",
        "gpt2": "not found in the base model",
    }
    copy = tmp_path / "adapter"
    shutil.copytree(adapter, copy)
    for base, message in expected.items():
        edit(copy, base_model_name_or_path=str(tmp_path / base))
        with pytest.raises(CheckpointError, match=message):
            load_model(find_model(str(copy)), dtype=torch.float32)


def test_damaged_adapters_are_refused(adapter, tmp_path):
    def without_half(folder):
        weights = load_file(folder / "adapter_model.safetensors")
        half = {name: x for name, x in weights.items() if "lora_B" not in name}
        save_file(half, folder / "adapter_model.safetensors")

    cases = [
        (lambda f: (f / "adapter_model.safetensors").unlink(), "has no weights"),
        (lambda f: (f / "adapter_model.safetensors").write_bytes(b"x"), "are damaged"),
        (without_half, r"missing .*lora_B"),
        (lambda f: edit(f, peft_type="NOSUCH"), "KeyError: 'NOSUCH'"),
        (lambda f: edit(f, r="four"), "cannot load the adapter"),
        (lambda f: edit(f, base_model_name_or_path="no/where"), "base_model_name_or_path of"),
    ]
    for i, (damage, message) in enumerate(cases):
        folder = tmp_path / str(i)
        shutil.copytree(adapter, folder)
        damage(folder)
        with pytest.raises(CheckpointError, match=message):
            load_model(find_model(str(folder)), dtype=torch.float32)


def rename(folder, change):
    path = folder / "adapter_model.safetensors"
    save_file({change(name): x for name, x in load_file(path).items()}, path)


def raw(name):
    """A tensor's name in the state dict of peft's model."""
    for end in ("lora_A", "lora_B"):
        name = name.replace(f".{end}.weight", f".{end}.default.weight")
    return name.replace("lm_head.weight", "lm_head.modules_to_save.default.weight")


SPELLINGS = {
    "raw": raw,
    "without prefix": lambda name: name.removeprefix("base_model.model."),
    "both": lambda name: raw(name).removeprefix("base_model.model."),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
@pytest.mark.parametrize("more", [{}, {"modules_to_save": ["lm_head"]}])
def test_names_of_any_state_dict_of_peft_are_those_of_its_folders(models, tmp_path, spelling, more):
    save_adapter(models / "untied", tmp_path / "saved", peft.LoraConfig(**LORA, **more))
    expected = load_model(find_model(str(tmp_path / "saved")), dtype=torch.float32)
    rename(tmp_path / "saved", SPELLINGS[spelling])
    model = load_model(find_model(str(tmp_path / "saved")), dtype=torch.float32)
    assert torch.equal(*(x(input_ids=IDS).logits for x in (model, expected)))
    # before weights are read
    build_empty(find_model(str(tmp_path / "saved")), dtype=torch.float32)


def test_a_tensor_under_two_names_is_refused(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "twice")
    path = tmp_path / "twice" / "adapter_model.safetensors"
    weights = load_file(path)
    save_file(weights | {raw(name): x.clone() for name, x in weights.items()}, path)
    with pytest.raises(CheckpointError, match=r"has base_model\.model\..* under two names"):
        load_model(find_model(str(tmp_path / "twice")), dtype=torch.float32)


@pytest.mark.parametrize("number", [float("nan"), float("inf")])
@pytest.mark.parametrize("pickled", [False, True])
def test_an_adapter_that_is_not_finite_is_refused(adapter, tmp_path, number, pickled):
    shutil.copytree(adapter, tmp_path / "broken")
    path = tmp_path / "broken" / "adapter_model.safetensors"
    weights = load_file(path)
    name = min(weights)
    weights[name][-1, -1] = number
    save_file(weights, path)
    if pickled:
        path.unlink()
        path = path.with_suffix(".bin")
        torch.save(weights, path)
    message = f"broken is not finite: NaN or infinity in {name} of {path.name}$"
    with pytest.raises(CheckpointError, match=message):
        load_model(find_model(str(tmp_path / "broken")), dtype=torch.float32)


def test_weights_in_a_pickle_are_read(adapter, tmp_path):
    shutil.copytree(adapter, tmp_path / "pickled")
    path = tmp_path / "pickled" / "adapter_model.safetensors"
    torch.save(load_file(path), path.with_suffix(".bin"))
    path.unlink()
    models = [
        load_model(find_model(str(f)), dtype=torch.float32) for f in (adapter, tmp_path / "pickled")
    ]
    assert torch.equal(*(model(input_ids=IDS).logits for model in models))


def test_identity_and_storage_are_those_of_base_and_adapter(models, adapter, tmp_path):
    def identity(folder):
        return model_identity(ModelConfig(name_or_path=str(folder)))

    shutil.copytree(adapter, tmp_path / "copy")
    assert identity(adapter) == identity(tmp_path / "copy")
    assert identity(adapter) not in {identity(models / "tied"), identity(models / "untied")}
    edit(tmp_path / "copy", base_model_name_or_path=str(models / "untied"))
    assert identity(adapter) != identity(tmp_path / "copy")
    # of a base in 16 bits the sum with an adapter has more of them
    half = AutoModelForCausalLM.from_pretrained(models / "tied", dtype=torch.bfloat16)
    half.save_pretrained(tmp_path / "half")
    edit(tmp_path / "copy", base_model_name_or_path=str(tmp_path / "half"))
    options = {"name_or_path": str(tmp_path / "copy"), "fsdp_policy_mp": None}
    assert frozen_dtype(ModelConfig(**options)) == "float32"
