"""Checkpoints and archives fill a model whole, by the names of their files, or are refused."""

import json
import logging
import pickle

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, NEOX, SMALL, build_model, save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from fastpref.config import ModelConfig
from fastpref.errors import CheckpointError
from fastpref.model.files.paths import find_model
from fastpref.model.files.source_weights import open_weights
from fastpref.model.filling import check_files
from fastpref.model.source import load_model

IDS = torch.arange(3, 15)[None]
EXPERTS = SMALL | {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
RENAMED = {
    # family: config, a weight by its name on the disk
    "gpt_neox": (NEOX, "embed_out.weight"),
    "mixtral": (
        SMALL | {"num_local_experts": 4},
        "model.layers.1.block_sparse_moe.experts.3.w3.weight",
    ),
    "qwen2_moe": (
        EXPERTS | {"shared_expert_intermediate_size": 16},
        "model.layers.1.mlp.experts.2.up_proj.weight",
    ),
    "qwen3_moe": (EXPERTS | {"head_dim": 8}, "model.layers.0.mlp.experts.1.down_proj.weight"),
}


def save_random(model, folder):
    torch.manual_seed(5)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.normal_(std=0.1)
    model.eval().save_pretrained(folder)
    return model


@pytest.fixture(scope="module")
def renamed(tmp_path_factory):
    """Models of families whose weights transformers renames: their folder, then other weights."""
    base = tmp_path_factory.mktemp("renamed")
    models = {}
    for family, (config, _) in RENAMED.items():
        special = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
        model = AutoModelForCausalLM.from_config(AutoConfig.for_model(family, **(special | config)))
        model.save_pretrained(base / family / "base")
        models[family] = save_random(model, base / family / "trained")
    return base, models


def save_policy(folder, state, **options):
    torch.save({"step_idx": 1, "state": state, "metrics": {}}, folder / "policy.pt", **options)
    return str(folder / "policy.pt")


def from_archive(base, archive, dtype=torch.float32):
    return load_model(find_model(str(base)), dtype=dtype, archive=str(archive))


@pytest.mark.parametrize("family", RENAMED)
def test_a_seed_archive_loads_by_the_names_on_the_disk_and_in_memory(renamed, tmp_path, family):
    base, models = renamed
    on_disk = load_file(base / family / "trained" / "model.safetensors")
    assert RENAMED[family][1] in on_disk and RENAMED[family][1] not in models[family].state_dict()
    states = {
        "disk": on_disk,
        "memory": models[family].state_dict(),
        "wrapped": {f"module._fsdp_wrapped_module.{key}": x for key, x in on_disk.items()},
    }
    expected = models[family](input_ids=IDS).logits
    for name, state in states.items():
        model = from_archive(base / family / "base", save_policy(tmp_path, state)).eval()
        assert torch.equal(model(input_ids=IDS).logits, expected), name
    folder = from_archive(base / family / "base", base / family / "trained").eval()
    assert torch.equal(folder(input_ids=IDS).logits, expected)
    # and its own weights have the names of the hub again
    folder.save_pretrained(tmp_path / "again")
    assert load_file(tmp_path / "again" / "model.safetensors").keys() == on_disk.keys()


@pytest.mark.parametrize("family", RENAMED)
def test_a_weight_that_is_missing_or_of_another_shape_has_its_name_on_the_disk(
    renamed, tmp_path, family
):
    base, _ = renamed
    name = RENAMED[family][1]
    weights = load_file(base / family / "trained" / "model.safetensors")
    weight = weights.pop(name)
    broken = {
        f"missing {name}, wrong shape none": weights,
        f"missing none, wrong shape {name} ": weights | {name: weight[:, :3].contiguous()},
    }
    for message, state in broken.items():
        with pytest.raises(CheckpointError, match=f"model.archive: .*{message}"):
            from_archive(base / family / "base", save_policy(tmp_path, state))
        (tmp_path / "config.json").write_bytes((base / family / "base/config.json").read_bytes())
        save_file(state, tmp_path / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(CheckpointError, match=f"do not fill the model: {message}"):
            load_model(find_model(str(tmp_path)), dtype=torch.float32)


def test_a_body_that_was_saved_without_its_head_lacks_the_head_alone(tmp_path):
    save_random(build_model("llama"), tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    del weights["lm_head.weight"]
    body = {name.removeprefix("model."): weight for name, weight in weights.items()}
    save_file(body, tmp_path / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(CheckpointError, match=r"model: missing lm_head\.weight, wrong shape none"):
        load_model(find_model(str(tmp_path)), dtype=torch.float32)


def test_tables_of_older_versions_and_second_names_may_come_along(tmp_path, caplog):
    model = save_random(build_model("gpt2"), tmp_path)
    state = model.state_dict() | {
        "transformer.h.0.attn.bias": torch.ones(1, 1, 8, 8),
        "transformer.h.0.attn.masked_bias": torch.tensor(-1e4),
        "transformer.h.0.attn.rotary_emb.inv_freq": torch.ones(4),
    }
    assert "lm_head.weight" in state
    with caplog.at_level(logging.WARNING, logger="fastpref"):
        loaded = from_archive(tmp_path, save_policy(tmp_path, state)).eval()
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
    assert loaded.get_input_embeddings().weight is loaded.get_output_embeddings().weight
    assert not [record for record in caplog.records if record.name == "fastpref"]
    state["transformer.h.7.ln_1.weight"] = torch.ones(32)
    with caplog.at_level(logging.WARNING, logger="fastpref"):
        from_archive(tmp_path, save_policy(tmp_path, state))
    assert "has no place for: transformer.h.7.ln_1.weight" in caplog.text


def test_training_on_an_archive_leaves_its_file_alone(tmp_path):
    model = save_random(build_model("llama"), tmp_path)
    archive = save_policy(tmp_path, model.state_dict())
    before = torch.load(archive)["state"]["lm_head.weight"]
    loaded = from_archive(tmp_path, archive)
    with torch.no_grad():
        loaded.lm_head.weight.zero_()
    # the file may be overwritten while the model lives
    save_policy(tmp_path, {name: x + 1 for name, x in model.state_dict().items()})
    assert not loaded.lm_head.weight.any()
    assert torch.equal(loaded.model.norm.weight, model.model.norm.weight)
    assert before.any()


def test_an_archive_in_the_format_before_zip_files_is_read(tmp_path):
    model = save_random(build_model("llama"), tmp_path)
    archive = save_policy(tmp_path, model.state_dict(), _use_new_zipfile_serialization=False)
    assert torch.equal(from_archive(tmp_path, archive)(IDS).logits, model(IDS).logits)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"garbage", "cannot be read"),
        (pickle.dumps({"state": 3}), "cannot be read: not a file of tensors alone"),
        ({"weights": {}}, "expected a dict with 'state'"),
        ([1, 2], "expected a dict with 'state'"),
        ({"state": {"a": "text"}}, "a dict of weights"),
    ],
)
def test_what_is_no_archive_is_refused(tmp_path, content, message):
    path = tmp_path / "policy.pt"
    if isinstance(content, bytes):
        path.write_bytes(content)
    else:
        torch.save(content, path)
    with pytest.raises(CheckpointError, match=f"model.archive: .*policy.pt .*{message}"):
        load_model(find_model("tiny"), dtype=torch.float32, archive=str(path))


@pytest.fixture
def folder(tmp_path):
    """A checkpoint of several files and an index."""
    model = build_model("llama")
    model.save_pretrained(tmp_path, max_shard_size="20KB")
    assert len(list(tmp_path.glob("model-*.safetensors"))) > 1
    return tmp_path


def in_one_file(folder, change):
    weights = {}
    for path in [*folder.glob("model-*.safetensors"), folder / "model.safetensors.index.json"]:
        weights |= load_file(path) if path.suffix == ".safetensors" else {}
        path.unlink()
    save_file(change(weights), folder / "model.safetensors", metadata={"format": "pt"})


def in_a_pickle(folder, saved):
    for path in folder.glob("model*"):
        path.unlink()
    torch.save(saved, folder / "pytorch_model.bin")


def in_two_pickles(folder):
    """The paths of both."""
    weights = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    for path in folder.glob("model*"):
        path.unlink()
    names = sorted(weights)
    files = {f"pytorch_model-0000{i + 1}-of-00002.bin": names[i::2] for i in range(2)}
    for file, own in files.items():
        torch.save({name: weights[name].clone() for name in own}, folder / file)
    weight_map = {name: file for file, own in files.items() for name in own}
    index = folder / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": weight_map}))
    return [folder / file for file in files]


def first_shard(folder):
    return min(folder.glob("model-*.safetensors"))


DAMAGES = {
    "no weights": (lambda f: [x.unlink() for x in f.glob("model*")], "a config and no weights"),
    "shard gone": (
        lambda f: first_shard(f).unlink(),
        "that are not there: model-00001",
    ),
    "shard cut": (lambda f: first_shard(f).write_bytes(b"\x80"), "are damaged"),
    "pointer": (
        lambda f: first_shard(f).write_text("version https://git-lfs.github.com/spec/v1\noid 1"),
        "run git lfs pull",
    ),
    "index of nothing": (
        lambda f: (f / "model.safetensors.index.json").write_text('{"weight_map": {}}'),
        "has no weight_map",
    ),
    "index no JSON": (
        lambda f: (f / "model.safetensors.index.json").write_text("{"),
        "index.json cannot be read as JSON",
    ),
    "other weights": (
        lambda f: in_one_file(f, lambda w: {"a": torch.ones(1)}),
        r"missing model.embed_tokens.weight, .* and \d+ more, wrong shape none",
    ),
    "other shape": (
        lambda f: in_one_file(f, lambda w: w | {"model.norm.weight": torch.ones(5)}),
        r"missing none, wrong shape model.norm.weight \(\[5\], the model has \[32\]\)",
    ),
}
PICKLES = {
    "list": ([1, 2], "cannot load ModelForCausalLM"),
    "trainer": ({"state_dict": {}}, "do not fill|cannot load"),
    "class": ({"a": logging.getLogger("x")}, "damaged: not a file of tensors alone"),
}


@pytest.mark.parametrize("damage", DAMAGES)
def test_a_damaged_checkpoint_is_one_sentence_before_it_is_read(folder, damage):
    change, message = DAMAGES[damage]
    check_files(ModelConfig(name_or_path=str(folder)))
    change(folder)
    with pytest.raises(CheckpointError, match=message) as raised:
        check_files(ModelConfig(name_or_path=str(folder)))
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda path: path.unlink(), "names files that are not there: pytorch_model-00002"),
        (lambda path: path.write_bytes(path.read_bytes()[:-3000]), "00002.bin was cut"),
        (lambda path: torch.save({"a": torch.ones(1)}, path), "missing .*, wrong shape none"),
        (lambda path: torch.save([1], path), "00002.bin holds no weights by their names"),
    ],
)
def test_damaged_pickles_are_refused_before_they_are_read(folder, change, message):
    paths = in_two_pickles(folder)
    check_files(ModelConfig(name_or_path=str(folder)))
    change(paths[-1])
    with pytest.raises(CheckpointError, match=message):
        check_files(ModelConfig(name_or_path=str(folder)))


def test_an_archive_of_another_model_is_refused_before_it_is_read(renamed, tmp_path):
    base, models = renamed
    own, other = base / "mixtral/base", base / "gpt_neox/trained"
    for archive in (
        base / "mixtral/trained",
        save_policy(tmp_path, models["mixtral"].state_dict()),
    ):
        check_files(ModelConfig(name_or_path=str(own), archive=str(archive)))
    for archive in (other, save_policy(tmp_path, models["gpt_neox"].state_dict())):
        with pytest.raises(CheckpointError, match=r"model.archive: .* fit the model: missing"):
            check_files(ModelConfig(name_or_path=str(own), archive=str(archive)))


@pytest.mark.parametrize("content", PICKLES)
def test_a_pickle_of_something_else_is_one_sentence(folder, content):
    saved, message = PICKLES[content]
    in_a_pickle(folder, saved)
    with pytest.raises(CheckpointError, match=message) as raised:
        load_model(find_model(str(folder)), dtype=torch.float32)
    assert "\n" not in str(raised.value)


def test_what_is_no_weight_in_a_pickle_is_passed_over_as_transformers_does(tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    weights = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    torch.save(weights | {"version": 1}, folder / "pytorch_model.bin")
    options = ModelConfig(name_or_path=str(folder))
    check_files(options)
    load_model(find_model(str(folder)), dtype=torch.float32)
    assert open_weights(options, wrapper=False).weights.keys() == weights.keys()


def test_weights_that_the_config_leaves_out_are_named(folder, caplog):
    fields = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(fields | {"num_hidden_layers": 1}))
    with caplog.at_level(logging.WARNING, logger="fastpref"):
        load_model(find_model(str(folder)), dtype=torch.float32)
    assert "LlamaForCausalLM has no place for: model.layers.1." in caplog.text


def test_weights_of_few_bits_that_transformers_can_widen_are_widened(tmp_path):
    folder = save_tiny_model(tmp_path / "fp8", hidden_size=128, intermediate_size=128)
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.0.self_attn.q_proj.weight"
    expected = weights[name].to(torch.float8_e4m3fn).float() * 2
    for key in [key for key in weights if "proj" in key]:
        weights[key] = weights[key].to(torch.float8_e4m3fn)
        weights[f"{key}_scale_inv"] = torch.full((1, 1), 2.0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(fields))
    check_files(ModelConfig(name_or_path=str(folder), archive=str(folder)))
    model = load_model(find_model(str(folder)), dtype=torch.float32)
    assert torch.equal(model.get_parameter(name), expected)
    assert {parameter.dtype for parameter in model.parameters()} == {torch.float32}


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_comes_back_from_its_own_folder_as_an_archive(tmp_path, family):
    model = build_model(family).eval()
    model.save_pretrained(tmp_path / "base")
    save_random(model, tmp_path / "trained")
    loaded = from_archive(tmp_path / "base", tmp_path / "trained").eval()
    assert torch.equal(loaded(input_ids=IDS).logits, model(input_ids=IDS).logits)
