"""LATEST of a wrapper is the whole wrapper, under the names of the source's files."""

import json
import logging
from pathlib import Path

import peft
import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from safetensors.torch import load_file, save_file
from stopped_runs import assert_same_end, run, run_in_starts
from tiny_models import save_dataset, save_tiny_model
from tiny_wrappers import BESIDE, KINDS, MTP, OLD_NAMES, save_with_mtp, save_wrapper
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM

from fastpref.config import ModelConfig
from fastpref.distributed import init_world
from fastpref.errors import CheckpointError
from fastpref.model.files.paths import find_model
from fastpref.model.files.source_weights import arrange, open_weights
from fastpref.model.scorer import TokenScorer
from fastpref.model.source import load_model, load_model_tokenizer
from fastpref.train.export.latest import export_model
from fastpref.train.export.plan import plan_export
from fastpref.train.export.weight_files import INDEX, write_weights

LAYOUTS = [(kind, False) for kind in KINDS] + [(kind, True) for kind in OLD_NAMES]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("wrapper-runs")
    save_dataset(base, "words", num_train=8, num_test=4)
    save_wrapper(base / "mistral3", "mistral3", old_names=True)
    save_wrapper(base / "gemma3", "gemma3")
    return base


def export(folder: Path, run_dir: Path, **options) -> Path:
    """A model as a folder, untrained."""
    model = ModelConfig(name_or_path=str(folder), **options)
    loaded = load_model(find_model(str(folder)), dtype=torch.float32, archive=model.archive)
    plan = plan_export(model, loaded.config, load_model_tokenizer(model), None)
    run_dir.mkdir(exist_ok=True)
    world = init_world()
    try:
        return export_model(TokenScorer(loaded), plan, run_dir, world)
    finally:
        dist.destroy_process_group()


def assert_same_bits(ours: dict[str, Tensor], theirs: dict[str, Tensor]) -> None:
    assert ours.keys() == theirs.keys()
    for name, weight in theirs.items():
        assert ours[name].dtype == weight.dtype and torch.equal(ours[name], weight), name


@pytest.mark.parametrize(("kind", "old_names"), LAYOUTS)
def test_an_untrained_export_is_its_source_tensor_by_tensor(tmp_path, kind, old_names, caplog):
    source = tmp_path / "source"
    weights = save_wrapper(source, kind, old_names=old_names, dtype=torch.bfloat16)
    with caplog.at_level(logging.INFO, logger="fastpref"):
        latest = export(source, tmp_path / "run", save_dtype="checkpoint")
    assert_same_bits(load_file(latest / "model.safetensors"), weights)
    [said] = [line for line in caplog.messages if line.startswith("copied")]
    assert "mtp (2 tensors)" in said and ("vision" in said or "visual" in said)
    ours, theirs = (json.loads((f / "config.json").read_text()) for f in (latest, source))
    assert ours["architectures"] == theirs["architectures"] == ["AsItWas"]
    assert ours["model_type"] == theirs["model_type"]
    for name, text in BESIDE.items():
        assert (latest / name).read_text() == text
    # and again: what a next stage starts from is a wrapper too
    again = export(source, tmp_path / "again", save_dtype="checkpoint", archive=str(latest))
    assert_same_bits(load_file(again / "model.safetensors"), weights)
    again = export(latest, tmp_path / "third", save_dtype="checkpoint")
    assert_same_bits(load_file(again / "model.safetensors"), weights)


def test_files_are_those_of_the_index_whatever_they_are_called(tmp_path, caplog):
    source = tmp_path / "source"
    weights = save_wrapper(source, "qwen3_vl", dtype=torch.bfloat16)
    (source / "model.safetensors").unlink()
    names = sorted(weights)
    # as some families are published, and a shard of an earlier version beside them
    files = {f"model.safetensors-0000{i}-of-00002.safetensors": names[i - 1 :: 2] for i in (1, 2)}
    for file, own in files.items():
        save_file({name: weights[name] for name in own}, source / file, metadata={"format": "pt"})
    save_file({"stale": torch.ones(1)}, source / "model-00001-of-00001.safetensors")
    weight_map = {name: file for file, own in files.items() for name in own}
    index = {"metadata": {}, "weight_map": weight_map}
    (source / "model.safetensors.index.json").write_text(json.dumps(index))
    with caplog.at_level(logging.INFO, logger="fastpref"):
        latest = export(source, tmp_path / "run", save_dtype="checkpoint")
    assert_same_bits(load_file(latest / "model.safetensors"), weights)
    assert any(line.startswith("copied") for line in caplog.messages)


def test_a_source_written_to_is_not_read_and_one_replaced_is_what_it_was(tmp_path):
    save_wrapper(tmp_path / "source", "llava")
    path = tmp_path / "source" / "model.safetensors"
    options = ModelConfig(name_or_path=str(tmp_path / "source"))
    weight = next(iter(open_weights(options, wrapper=True).weights.values()))
    before = weight.read().clone()
    other = tmp_path / "other"
    other.write_bytes(path.read_bytes()[:-64] + bytes(64))
    other.replace(path)
    assert torch.equal(weight.read(), before)
    weight = next(iter(open_weights(options, wrapper=True).weights.values()))
    with path.open("r+b") as file:
        file.truncate(1000)
    with pytest.raises(CheckpointError, match=r"was written to while a run used it.*resume=auto"):
        weight.read()


def test_an_archive_that_is_a_file_needs_no_weights_beside_a_plain_model(tmp_path):
    save_tiny_model(tmp_path / "plain")
    (tmp_path / "policy.pt").touch()
    options = ModelConfig(name_or_path=str(tmp_path / "plain"), archive=str(tmp_path / "policy.pt"))
    assert not open_weights(options, wrapper=False).weights
    assert open_weights(options, wrapper=True).weights


def test_what_is_trained_has_the_dtype_of_training_and_all_else_its_own(tmp_path):
    weights = save_wrapper(tmp_path / "source", "llava", dtype=torch.bfloat16)
    latest = export(tmp_path / "source", tmp_path / "run")
    ours = load_file(latest / "model.safetensors")
    assert ours.keys() == weights.keys()
    for name, weight in ours.items():
        trained = name.startswith(("model.language_model", "lm_head"))
        assert weight.dtype == (torch.float32 if trained else weights[name].dtype), name
        assert torch.equal(weight, weights[name].to(weight.dtype)), name
    fields = json.loads((latest / "config.json").read_text())
    assert fields["dtype"] == fields["text_config"]["dtype"] == "float32"
    assert fields["vision_config"]["dtype"] == "bfloat16"


def test_heads_that_transformers_does_not_load_survive_in_a_plain_model(tmp_path):
    weights = save_with_mtp(tmp_path / "source")
    latest = export(tmp_path / "source", tmp_path / "run", save_dtype="checkpoint")
    assert_same_bits(load_file(latest / "model.safetensors"), weights)
    assert json.loads((latest / "config.json").read_text())["architectures"] == ["LlamaForCausalLM"]
    AutoModelForCausalLM.from_pretrained(latest)


def test_weights_of_few_bits_that_are_not_trained_are_left_out_and_said(tmp_path, caplog):
    folder = save_tiny_model(tmp_path / "fp8", hidden_size=128, intermediate_size=128)
    weights = load_file(folder / "model.safetensors")
    names = set(weights)
    extra = "model.layers.2.mlp.up_proj.weight"
    weights[extra] = weights["model.layers.1.mlp.up_proj.weight"].clone()
    weights["model.layers.2.norm.weight"] = torch.ones(128)
    for key in [key for key in weights if "proj" in key]:
        weights[key] = weights[key].to(torch.float8_e4m3fn)
        weights[f"{key}_scale_inv"] = torch.full((1, 1), 2.0)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    fields = json.loads((folder / "config.json").read_text())
    fields["quantization_config"] = {"quant_method": "fp8", "weight_block_size": [128, 128]}
    (folder / "config.json").write_text(json.dumps(fields))
    with caplog.at_level(logging.INFO, logger="fastpref"):
        latest = export(folder, tmp_path / "run")
    assert "left out" in caplog.text and "model.layers.2 (2 tensors)" in caplog.text
    ours = load_file(latest / "model.safetensors")
    assert ours.keys() == names | {"model.layers.2.norm.weight"}
    assert {weight.dtype for weight in ours.values()} == {torch.float32}


def test_files_of_a_size_hold_together_what_one_would(tmp_path):
    weights = save_wrapper(tmp_path / "source", "llava")
    model = load_model(find_model(str(tmp_path / "source")), dtype=torch.float32)
    source = open_weights(ModelConfig(name_or_path=str(tmp_path / "source")), wrapper=True)
    arranged = arrange(model, dict(model.named_parameters()), source)
    assert arranged.own and arranged.untouched and not arranged.left_out
    (tmp_path / "several").mkdir()
    write_weights(tmp_path / "several", {**arranged.own, **arranged.untouched}, most_bytes=50_000)
    paths = sorted((tmp_path / "several").glob("model-*-of-*.safetensors"))
    assert len(paths) > 2
    count = f"{len(paths):05}"
    assert [path.name[6:] for path in paths] == [
        f"{i:05}-of-{count}.safetensors" for i in range(1, len(paths) + 1)
    ]
    described = json.loads((tmp_path / "several" / INDEX).read_text())
    size = sum(weight.nbytes for weight in weights.values())
    assert described["metadata"] == {"total_size": size}
    index = described["weight_map"]
    found = {name: (path.name, x) for path in paths for name, x in load_file(path).items()}
    assert {name: file for name, (file, _) in found.items()} == index
    assert_same_bits({name: x for name, (_, x) in found.items()}, weights)
    model.config.save_pretrained(tmp_path / "several")
    AutoModelForMultimodalLM.from_pretrained(tmp_path / "several")


def test_a_tied_head_that_the_files_have_as_well_is_the_trained_one(tmp_path):
    save_wrapper(tmp_path / "source", "gemma3")
    weights = load_file(tmp_path / "source" / "model.safetensors")
    embedding = "model.language_model.embed_tokens.weight"
    assert "lm_head.weight" not in weights
    weights["lm_head.weight"] = weights[embedding].clone()
    save_file(weights, tmp_path / "source" / "model.safetensors", metadata={"format": "pt"})
    model = load_model(find_model(str(tmp_path / "source")), dtype=torch.float32)
    model.get_input_embeddings().weight.data.add_(1)
    options = ModelConfig(name_or_path=str(tmp_path / "source"))
    plan = plan_export(options, model.config, load_model_tokenizer(options), None)
    # the files may go while it trains
    for path in (tmp_path / "source").iterdir():
        path.unlink()
    world = init_world()
    latest = export_model(TokenScorer(model), plan, tmp_path, world)
    dist.destroy_process_group()
    ours = load_file(latest / "model.safetensors")
    assert ours.keys() == weights.keys()
    assert torch.equal(ours["lm_head.weight"], weights[embedding] + 1)
    assert torch.equal(ours[embedding], weights[embedding] + 1)
    assert torch.equal(ours["mtp.norm.weight"], MTP["mtp.norm.weight"])


def arguments(base: Path, model: str, run_dir: Path, *options: str) -> list[str]:
    return [
        *("model=blank_model", f"model.name_or_path={base / model}", "model.fsdp_policy_mp=null"),
        *("datasets=[words]", f"base_data_dir={base}", f"run_dir={run_dir}", "max_length=64"),
        *("max_prompt_length=32", "batch_size=4", "n_epochs=2", "loss=dpo", "lr=1e-3"),
        *("optimizer=SGD", "warmup_steps=0", "sample_during_eval=false", "n_eval_examples=4"),
        *("eval_batch_size=4", *options),
    ]


def train_in_all_ways(base: Path, out: Path) -> None:
    assert run(arguments(base, "mistral3", out / "plain")) == 0
    lora = ("adapter=lora", "adapter.merge=true", "lr=1")
    assert run(arguments(base, "gemma3", out / "lora", *lora)) == 0
    assert run(arguments(base, "gemma3", out / "sharded", *lora, "adapter.base=sharded")) == 0


def logits(folder: Path) -> Tensor:
    model = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).eval()
    with torch.no_grad():
        return model(input_ids=torch.arange(3, 13)[None]).logits


def test_two_ranks_train_a_wrapper_as_one_does(base, tmp_path):
    train_in_all_ways(base, tmp_path / "one")
    run_on_ranks(train_in_all_ways, 2, base, tmp_path / "two")
    for name in ("plain/LATEST", "lora/LATEST-merged", "sharded/LATEST-merged"):
        kind = "mistral3" if "plain" in name else "gemma3"
        source = load_file(base / kind / "model.safetensors")
        one, two = (load_file(tmp_path / n / name / "model.safetensors") for n in ("one", "two"))
        assert one.keys() == two.keys() == source.keys()
        moved = {key for key in one if not torch.equal(one[key], source[key])}
        assert moved and all("language_model" in key for key in moved)
        for key in one:
            torch.testing.assert_close(two[key], one[key], rtol=1e-5, atol=1e-5, msg=key)
        torch.testing.assert_close(
            logits(tmp_path / "two" / name), logits(tmp_path / "one" / name), rtol=1e-4, atol=1e-4
        )
    # the adapter beside the whole wrapper computes what it does merged
    for name in ("lora", "sharded"):
        folder = tmp_path / "one" / name
        merged, beside = logits(folder / "LATEST-merged"), logits(folder / "LATEST")
        torch.testing.assert_close(beside, merged, rtol=1e-4, atol=1e-4)


def test_an_adapter_of_a_wrapper_is_trained_on(base, tmp_path):
    options = ("adapter=lora", "adapter.target_modules=[q_proj]")
    assert run(arguments(base, "gemma3", tmp_path / "first", *options)) == 0
    again = arguments(base, str(tmp_path / "first" / "LATEST"), tmp_path / "second", *options)
    assert run(again) == 0
    config = json.loads((tmp_path / "second/LATEST/adapter_config.json").read_text())
    assert all("language_model" in name for name in config["target_modules"])


def test_an_adapter_in_a_tower_is_refused_with_what_it_is_in(base, tmp_path, capsys):
    whole = AutoModelForMultimodalLM.from_pretrained(base / "gemma3")
    config = peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False)
    peft.get_peft_model(whole, config).save_pretrained(tmp_path / "adapter")
    fields = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    fields["base_model_name_or_path"] = str(base / "gemma3")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(fields))
    for options in ([], ["adapter=lora"]):
        command = arguments(base, str(tmp_path / "adapter"), tmp_path / "run", *options)
        assert run(command) == 4
        assert "is in model.vision_tower too" in capsys.readouterr().err.splitlines()[-1]


def stopped_and_whole(base: Path, out: Path) -> None:
    options = "gemma3", out / "whole", "checkpoint.every=1"
    assert run(arguments(base, *options)) == 0
    codes = run_in_starts(arguments(base, "gemma3", out / "stopped", "checkpoint.every=1"), 2)
    assert codes[0] == 75 and codes[-1] == 0


def test_a_stopped_run_of_a_wrapper_ends_as_a_whole_one(base, tmp_path):
    stopped_and_whole(base, tmp_path)
    files = ["LATEST/model.safetensors"]
    assert_same_end(tmp_path / "stopped", tmp_path / "whole", files=files)


def test_the_plan_counts_what_is_trained(base, tmp_path, capsys):
    save_wrapper(tmp_path / "wide", "mistral3")
    fields = json.loads((tmp_path / "wide" / "config.json").read_text())
    sizes = {"hidden_size": 1024, "intermediate_size": 4096, "vocab_size": 65_536}
    fields["text_config"] |= sizes | {"num_hidden_layers": 8, "num_attention_heads": 16}
    fields["text_config"] |= {"num_key_value_heads": 16, "head_dim": 64}
    # a tower as large again
    fields["vision_config"] |= {"hidden_size": 1024, "intermediate_size": 4096, "head_dim": 64}
    fields["vision_config"] |= {"num_attention_heads": 16, "num_hidden_layers": 20}
    (tmp_path / "wide" / "config.json").write_text(json.dumps(fields))
    command = ["task=plan", "model=blank_model", f"model.name_or_path={tmp_path / 'wide'}"]
    assert run([*command, "loss=dpo", "plan.num_gpus=8", "plan.memory_gib=80"]) == 0
    lines = (line.split("│")[1:-1] for line in capsys.readouterr().out.splitlines())
    rows = {cells[0].strip(): float(cells[1]) for cells in lines if cells and "masters" in cells[0]}
    # embedding and head are one
    text = 65_536 * 1024 + 8 * (4 * 1024 * 1024 + 3 * 1024 * 4096 + 2 * 1024) + 1024
    assert rows["masters"] == pytest.approx(4 * text / 2**30, abs=0.01)
