"""LATEST is what was trained, with what its source has beside the weights."""

import errno
import json
import logging
import os
import resource
import shutil
from contextlib import nullcontext
from pathlib import Path
from types import SimpleNamespace

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from stopped_runs import run as run_command
from tiny_models import build_model, save_dataset, save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from fastpref.complete_files import complete_folder
from fastpref.config import AdapterConfig, Config, DataConfig, DPOConfig, ModelConfig
from fastpref.distributed import init_world
from fastpref.errors import CheckpointError
from fastpref.model.adapters.lora import add_adapters
from fastpref.model.files.paths import find_model
from fastpref.model.scorer import TokenScorer
from fastpref.model.source import load_model, load_model_tokenizer
from fastpref.train.export.config import write_config
from fastpref.train.export.latest import export_model
from fastpref.train.export.plan import ExportPlan, plan_export
from fastpref.train.export.weight_files import write_weights
from fastpref.train.task import train

# two ends of a text, and settings that transformers would not save together
GENERATION = '{"eos_token_id": [2, 7], "do_sample": false, "temperature": 0.6, "own": 1}\n'
# transformers refuses to load it with the model
REFUSED = '{"num_return_sequences": 2, "do_sample": false}\n'
TEMPLATE = "{% for message in messages %}[{{ message['content'] }}]{% endfor %}"
BESIDE = {
    "generation_config.json": GENERATION,
    "preprocessor_config.json": '{"size": 3}',
    "processor_config.json": '{"chat_template": "old", "processor_class": "X"}',
    "video_preprocessor_config.json": "{}",
    "chat_template.json": '{"chat_template": "old"}',
    "tokenizer.model": "a vocabulary",
    "special_tokens_map.json": "{}",
    "modeling_own.py": "VALUE = 1\n",
    "LICENSE": "of the model\n",
}
NOT_CARRIED = {
    "README.md": "of the model",
    "training_args.bin": "x",
    "pytorch_model.bin": "x",
    "model.safetensors.index.json": "{}",
    "trainer_state.json": "{}",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """Data, and a bfloat16 model with everything beside it that a folder of the hub may have."""
    base = tmp_path_factory.mktemp("export")
    save_dataset(base, "words")
    source = save_tiny_model(base / "source", tie_word_embeddings=True)
    AutoModelForCausalLM.from_pretrained(source, dtype=torch.bfloat16).save_pretrained(source)
    tokenizer = AutoTokenizer.from_pretrained(source)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(source)
    for name, text in (BESIDE | NOT_CARRIED).items():
        (source / name).write_text(text)
    (base / "template.jinja").write_text(TEMPLATE)
    return base


def make_config(base: Path, run_dir: Path, **options) -> Config:
    model = {"name_or_path": str(base / "source"), "fsdp_policy_mp": None}
    return Config(
        model=ModelConfig(**(model | options.pop("model", {}))),
        loss=DPOConfig(),
        datasets=["words"],
        base_data_dir=str(base),
        run_dir=str(run_dir),
        batch_size=8,
        n_eval_examples=0,
        lr=1e-3,
        warmup_steps=1,
        max_length=64,
        max_prompt_length=32,
        sample_during_eval=False,
        **options,
    )


def run(config: Config) -> Path:
    """Train in this process; returns the exported folder."""
    world = init_world()
    try:
        train(config, world)
    finally:
        dist.destroy_process_group()
    return Path(str(config.run_dir)) / "LATEST"


def test_a_run_leaves_what_its_source_has_beside_the_weights(base, tmp_path):
    latest = run(make_config(base, tmp_path / "run"))
    for name, text in BESIDE.items():
        assert (latest / name).read_text() == text, name
    assert not [name for name in NOT_CARRIED if (latest / name).exists()]
    ours, theirs = (AutoTokenizer.from_pretrained(f) for f in (latest, base / "source"))
    assert ours.get_vocab() == theirs.get_vocab() and "<extra>" in ours.get_vocab()
    assert ours.chat_template == theirs.chat_template
    model = AutoModelForCausalLM.from_pretrained(latest)
    assert model.generation_config.eos_token_id == [2, 7]
    assert not (tmp_path / "run" / "LATEST.partial").exists()


def test_weights_may_be_read_by_whom_the_umask_lets(tmp_path):
    before = os.umask(0o027)
    try:
        (tmp_path / "LATEST").mkdir()
        weights = {"a": torch.ones(2), "b": torch.ones(2)}
        write_weights(tmp_path / "LATEST", weights, most_bytes=8)
    finally:
        os.umask(before)
    modes = {
        path.name: oct(path.stat().st_mode & 0o777) for path in (tmp_path / "LATEST").iterdir()
    }
    assert len(modes) == 3 and set(modes.values()) == {"0o640"}, modes


def test_weights_that_fill_a_file_to_the_last_byte_are_one_file_of_torch(tmp_path):
    write_weights(tmp_path, {"a": torch.ones(2), "b": torch.ones(2)}, most_bytes=16)
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        # earlier versions of transformers refuse files that do not say so
        assert file.metadata() == {"format": "pt"}


def test_every_file_is_filled_before_the_next(tmp_path):
    write_weights(tmp_path, {name: torch.ones(2) for name in "abcde"}, most_bytes=16)
    index = json.loads((tmp_path / "model.safetensors.index.json").read_text())
    files = [f"model-0000{i}-of-00003.safetensors" for i in (1, 1, 2, 2, 3)]
    assert index["weight_map"] == dict(zip("abcde", files, strict=True))
    assert index["metadata"] == {"total_size": 40}


def test_a_weight_larger_than_a_file_and_not_in_order_is_a_whole_one(tmp_path):
    weight = torch.arange(6.0).reshape(2, 3).t()
    write_weights(tmp_path, {"a": weight}, most_bytes=8)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["a"], weight)


def test_the_template_that_was_trained_on_is_that_of_every_file(base, tmp_path):
    template = str(base / "template.jinja")
    latest = run(make_config(base, tmp_path / "run", data=DataConfig(chat_template=template)))
    tokenizer = AutoTokenizer.from_pretrained(latest)
    assert tokenizer.chat_template == TEMPLATE
    message = [{"role": "user", "content": "hello"}]
    assert tokenizer.apply_chat_template(message, tokenize=False) == "[hello]"
    for name in ("processor_config.json", "chat_template.json"):
        assert json.loads((latest / name).read_text())["chat_template"] == TEMPLATE
    assert "chat_template" not in json.loads((latest / "tokenizer_config.json").read_text())


def test_a_tokenizer_s_config_stays_as_transformers_4_wrote_and_reads_it(base, tmp_path):
    source = save_tiny_model(tmp_path / "source", model_type="qwen2")
    path = source / "tokenizer_config.json"
    template = source / "chat_template.jinja"
    older = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "additional_special_tokens": ["<|bos|>"],
        "chat_template": template.read_text(),
    }
    fields = json.loads(path.read_text()) | older
    path.write_text(json.dumps(fields))
    template.unlink()
    kept = export(source, tmp_path / "kept")
    assert (kept / "tokenizer_config.json").read_bytes() == path.read_bytes()
    replaced = export(source, tmp_path / "replaced", chat_template=TEMPLATE)
    for folder, expected in ((kept, older["chat_template"]), (replaced, TEMPLATE)):
        tokenizer = AutoTokenizer.from_pretrained(folder)
        assert tokenizer.chat_template == expected
        assert (folder / "chat_template.jinja").read_text() == expected
        assert json.loads((folder / path.name).read_text()) == fields | {"chat_template": expected}


DTYPES = {
    # save_dtype, policy_dtype: what is written, what the log says of it
    (None, "float32"): ("float32", "in float32, as trained; model.save_dtype=checkpoint writes bf"),
    ("float32", "float32"): ("float32", "in float32, as trained"),
    ("checkpoint", "float32"): (
        "bfloat16",
        "in bfloat16 (model.save_dtype=checkpoint), trained in float32",
    ),
    (None, "bfloat16"): ("bfloat16", "LATEST in bfloat16"),
    ("float32", "bfloat16"): ("float32", "in float32 (model.save_dtype=float32), trained in bf"),
}


@pytest.mark.parametrize(("save_dtype", "policy_dtype"), DTYPES)
def test_weights_are_written_in_the_dtype_that_the_log_and_the_config_say(
    base, tmp_path, caplog, save_dtype, policy_dtype
):
    written, message = DTYPES[save_dtype, policy_dtype]
    options = {"save_dtype": save_dtype, "policy_dtype": policy_dtype}
    with caplog.at_level(logging.INFO, logger="fastpref"):
        latest = run(make_config(base, tmp_path / "run", model=options))
    assert message in caplog.text
    weights = load_file(latest / "model.safetensors")
    assert {str(weight.dtype) for weight in weights.values()} == {f"torch.{written}"}
    assert json.loads((latest / "config.json").read_text())["dtype"] == written
    assert str(AutoModelForCausalLM.from_pretrained(latest).dtype) == f"torch.{written}"


def test_a_float32_export_holds_every_bit_and_a_checkpoint_s_is_rounded_once(base, tmp_path):
    exact = load_file(run(make_config(base, tmp_path / "exact")) / "model.safetensors")
    options = {"save_dtype": "checkpoint"}
    rounded = run(make_config(base, tmp_path / "rounded", model=options))
    source = load_file(base / "source" / "model.safetensors")
    moved = 0
    for name, weight in load_file(rounded / "model.safetensors").items():
        assert torch.equal(weight, exact[name].to(torch.bfloat16)), name
        moved += (exact[name] != source[name].float()).sum().item()
    assert moved > 0
    # what the next stage starts from
    for name, weight in load_model(
        find_model(str(tmp_path / "exact/LATEST")), dtype=torch.float32
    ).named_parameters():
        assert torch.equal(weight, exact[name]), name


def test_a_damaged_file_that_may_hold_the_template_is_refused_before_training(tmp_path):
    source = save_tiny_model(tmp_path / "source")
    (source / "processor_config.json").write_text('{"chat_template": "old')
    message = r"model: processor_config\.json cannot be read as JSON: Unterminated"
    with pytest.raises(CheckpointError, match=message):
        export(source, tmp_path / "run", chat_template=TEMPLATE)


def export(name, run_dir, *, chat_template=None, **options) -> Path:
    """A model as a folder, untrained."""
    model = ModelConfig(name_or_path=str(name), **options)
    tokenizer = load_model_tokenizer(model)
    loaded = load_model(find_model(str(name)), dtype=torch.float32, archive=model.archive)
    plan = plan_export(model, loaded.config, tokenizer, chat_template)
    run_dir.mkdir(exist_ok=True)
    world = init_world()
    try:
        return export_model(TokenScorer(loaded), plan, run_dir, world)
    finally:
        dist.destroy_process_group()


def test_a_checkpoint_of_mixed_dtypes_comes_back_mixed(base, tmp_path):
    source = save_tiny_model(tmp_path / "mixed")
    weights = {name: x.half() for name, x in load_file(source / "model.safetensors").items()}
    wide = "model.layers.1.input_layernorm.weight"
    weights[wide] = weights[wide].float() + 1e-6
    save_file(weights, source / "model.safetensors", metadata={"format": "pt"})
    latest = export(source, tmp_path / "run", save_dtype="checkpoint")
    for name, weight in load_file(latest / "model.safetensors").items():
        assert torch.equal(weight, weights[name]) and weight.dtype == weights[name].dtype, name
    assert json.loads((latest / "config.json").read_text())["dtype"] == "float16"


def test_the_parts_of_a_config_have_the_dtype_as_well(tmp_path):
    text = {"vocab_size": 341, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8}
    vision = text | {"num_attention_heads": 4, "image_size": 28, "patch_size": 14}
    config = AutoConfig.for_model("gemma3", text_config=text | heads, vision_config=vision)
    model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "source")
    AutoTokenizer.from_pretrained(save_tiny_model(tmp_path / "t")).save_pretrained(
        tmp_path / "source"
    )
    path = tmp_path / "source/config.json"
    # as transformers 4 writes it
    fields = json.loads(path.read_text())
    older = {"rope_theta": 5e5, "rope_local_base_freq": 2e4}
    older |= {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}
    del fields["text_config"]["rope_parameters"]
    fields["torch_dtype"] = fields.pop("dtype")
    fields["text_config"] |= older
    path.write_text(json.dumps(fields | {"own": {"a": 1}}))
    rotary = AutoConfig.from_pretrained(tmp_path / "source").text_config.rope_parameters
    for dtype in ("checkpoint", "float32"):
        latest = export(tmp_path / "source", tmp_path / dtype, save_dtype=dtype)
        expected = "bfloat16" if dtype == "checkpoint" else dtype
        fields = json.loads((latest / "config.json").read_text())
        assert {fields["dtype"], fields["text_config"]["dtype"]} == {expected}
        # what is not trained is what it was
        assert fields["vision_config"]["dtype"] == "bfloat16"
        # who knows the older names alone finds what the source had
        assert older.items() <= fields["text_config"].items()
        assert fields["torch_dtype"] == expected
        assert fields["own"] == {"a": 1}
        assert AutoConfig.from_pretrained(latest).text_config.rope_parameters == rotary
        assert rotary["full_attention"]["rope_theta"] == 5e5


def test_fields_of_a_source_that_would_be_read_otherwise_are_left_out(tmp_path):
    given = {"dtype": torch.float32, "others": None}
    model = build_model("llama")
    scaled = {"rope_scaling": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4}}
    few_bits = {"quantization_config": {"quant_method": "fp8"}}
    write_config(model, tmp_path, source=few_bits | {"own": 1, "_name_or_path": "x"}, **given)
    fields = json.loads((tmp_path / "config.json").read_text())
    assert fields["own"] == 1 and not {"quantization_config", "_name_or_path"} & fields.keys()
    write_config(model, tmp_path, source=scaled, **given)
    assert "rope_scaling" not in json.loads((tmp_path / "config.json").read_text())


def test_an_archive_s_dtypes_count_and_the_model_s_own_files(base, tmp_path):
    half = save_tiny_model(tmp_path / "half", seed=3, tie_word_embeddings=True)
    model = AutoModelForCausalLM.from_pretrained(half, dtype=torch.float16)
    torch.save({"state": model.state_dict()}, tmp_path / "policy.pt")
    model.save_pretrained(half)
    for archive in (half, tmp_path / "policy.pt"):
        options = {"archive": str(archive), "save_dtype": "checkpoint"}
        latest = export(base / "source", tmp_path / "run", **options)
        for name, weight in load_file(latest / "model.safetensors").items():
            assert torch.equal(weight, model.state_dict()[name]), name
        assert (latest / "generation_config.json").read_text() == GENERATION


def test_a_tokenizer_from_elsewhere_brings_its_own_files_alone(base, tmp_path):
    tokenizer = save_tiny_model(tmp_path / "other")
    (tokenizer / "tokenizer.model").write_text("another vocabulary")
    (tokenizer / "preprocessor_config.json").write_text("not the model's")
    options = {"tokenizer_name_or_path": str(tokenizer)}
    latest = export(base / "source", tmp_path / "run", **options)
    assert (latest / "tokenizer.model").read_text() == "another vocabulary"
    assert not (latest / "special_tokens_map.json").exists()
    assert (latest / "preprocessor_config.json").read_text() == '{"size": 3}'


def test_an_adapter_s_own_files_stand_before_those_of_its_base(base, tmp_path):
    model = shutil.copytree(base / "source", tmp_path / "model")
    (model / "NOTICE").write_text("of the base")
    config = AutoConfig.from_pretrained(model)
    adapted = peft.get_peft_model(
        AutoModelForCausalLM.from_pretrained(model), peft.LoraConfig(task_type="CAUSAL_LM")
    )
    adapted.save_pretrained(tmp_path / "adapter")
    (tmp_path / "adapter" / "LICENSE").write_text("of the adapter")
    (tmp_path / "adapter" / "NOTICE").write_text("of the adapter")
    options = ModelConfig(name_or_path=str(tmp_path / "adapter"))
    tokenizer = AutoTokenizer.from_pretrained(model)
    others = plan_export(options, config, tokenizer, None).others
    assert others["LICENSE"] == others["NOTICE"] == b"of the adapter"


def test_an_adapter_names_its_base_and_leaves_no_earlier_merged_model(base, tmp_path):
    source = str(base / "source")
    options = ModelConfig(name_or_path=source, revision="main")
    world = init_world()
    try:
        for merge in (True, False):
            adapter = AdapterConfig(kind="lora", r=2, merge=merge)
            model = load_model(find_model(source), dtype=torch.float32)
            adapters = add_adapters(model, adapter, world, block_name=None, seed=0)
            tokenizer = load_model_tokenizer(options)
            plan = plan_export(options, model.config, tokenizer, TEMPLATE, adapter=adapter)
            # the plan takes the template without changing the tokenizer
            assert tokenizer.chat_template != TEMPLATE
            latest = export_model(TokenScorer(model, adapters=adapters), plan, tmp_path, world)
            assert (tmp_path / "LATEST-merged").exists() == merge
    finally:
        dist.destroy_process_group()
    fields = json.loads((latest / "adapter_config.json").read_text())
    named = {"base_model_name_or_path": source, "revision": "main", "inference_mode": True}
    assert named.items() <= fields.items()
    assert AutoTokenizer.from_pretrained(latest).chat_template == TEMPLATE


def test_a_part_of_a_model_that_nothing_could_load_is_refused_before_training(base):
    config = AutoConfig.for_model("mllama").text_config
    options = ModelConfig(name_or_path=str(base / "source"))
    with pytest.raises(CheckpointError, match="mllama_text_model, is no causal language model"):
        plan_export(options, config, load_model_tokenizer(options), None)


def test_a_source_that_changes_meanwhile_changes_nothing(base, tmp_path):
    source = save_tiny_model(tmp_path / "source")
    (source / "generation_config.json").write_text(REFUSED)
    model = load_model(find_model(str(source)), dtype=torch.float32)
    options = ModelConfig(name_or_path=str(source))
    plan = plan_export(options, model.config, load_model_tokenizer(options), None)
    for path in source.iterdir():
        path.unlink()
    world = init_world()
    latest = export_model(TokenScorer(model), plan, tmp_path, world)
    dist.destroy_process_group()
    assert (latest / "generation_config.json").read_text() == REFUSED
    assert AutoTokenizer.from_pretrained(latest).eos_token_id is not None


def test_a_folder_that_cannot_be_written_is_one_sentence(base, tmp_path):
    run_dir = tmp_path / "run"
    run_dir.write_text("a file where the run's folder was")
    model = load_model(find_model(str(base / "source")), dtype=torch.float32)
    options = ModelConfig(name_or_path=str(base / "source"))
    plan = plan_export(options, model.config, load_model_tokenizer(options), None)
    world = init_world()
    with pytest.raises(CheckpointError, match=r"run/LATEST: cannot be written: Not a directory"):
        export_model(TokenScorer(model), plan, run_dir, world)
    # what a killed start has left, whatever it is, does not stand in the way
    run_dir.unlink()
    run_dir.mkdir()
    (run_dir / "LATEST.partial").write_text("half")
    (run_dir / "LATEST").symlink_to(tmp_path)
    assert (export_model(TokenScorer(model), plan, run_dir, world) / "model.safetensors").is_file()
    dist.destroy_process_group()
    assert not (run_dir / "LATEST").is_symlink()


def test_a_full_disk_ends_in_exit_4_without_a_traceback(base, tmp_path, capsys):
    options = [
        *("model=blank_model", f"model.name_or_path={base / 'source'}", "datasets=[words]"),
        *(f"base_data_dir={base}", "loss=sft", f"run_dir={tmp_path / 'run'}", "batch_size=8"),
        *("model.fsdp_policy_mp=null", "n_eval_examples=0", "sample_during_eval=false"),
        *("max_length=64", "max_prompt_length=32"),
    ]
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (60_000, before[1]))
    try:
        code = run_command(options)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    said = capsys.readouterr().err
    assert code == 4, said
    assert "LATEST: cannot be written" in said and "Traceback" not in said
    assert not list((tmp_path / "run").glob("LATEST*"))


def test_a_model_that_the_disk_refuses_in_the_end_takes_no_other_s_place(tmp_path, monkeypatch):
    folder = tmp_path / "LATEST"
    with complete_folder(folder) as partial:
        partial.mkdir()
        (partial / "weights").write_text("old")

    def fsync(_: int) -> None:
        raise OSError(errno.EDQUOT, "Disk quota exceeded")

    # a library that writes does not look at what closing a file says
    monkeypatch.setattr(os, "fsync", fsync)
    with (
        pytest.raises(CheckpointError, match="LATEST: cannot be written: Disk quota exceeded"),
        complete_folder(folder) as partial,
    ):
        partial.mkdir()
        (partial / "weights").write_text("new")
    assert (folder / "weights").read_text() == "old"
    assert os.listdir(tmp_path) == ["LATEST"]


def test_a_file_system_that_brings_files_alone_to_the_disk_takes_a_model(tmp_path, monkeypatch):
    synced = []

    def fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        if path.is_dir() or path.name == "refused":
            raise OSError(errno.EINVAL, "Invalid argument")
        synced.append(path.name)

    monkeypatch.setattr(os, "fsync", fsync)
    for name, outcome in (
        ("weights", nullcontext()),
        ("refused", pytest.raises(CheckpointError, match="Invalid argument")),
    ):
        with outcome, complete_folder(tmp_path / "LATEST") as partial:
            (partial / "folder").mkdir(parents=True)
            (partial / name).write_text("new")
    assert synced == ["weights"] and (tmp_path / "LATEST" / "weights").is_file()


def test_a_model_whose_predecessor_is_still_read_takes_its_place(tmp_path, monkeypatch):
    folder = tmp_path / "LATEST"
    for content in ("old", "new"):
        with complete_folder(folder) as partial:
            partial.mkdir()
            (partial / "weights").write_text(content)
        # of a file that is open elsewhere NFS keeps one by another name, which fills its folder
        monkeypatch.setattr(shutil, "rmtree", in_use)
    assert (folder / "weights").read_text() == "new"
    monkeypatch.undo()
    with complete_folder(folder) as partial:
        partial.mkdir()
    assert os.listdir(tmp_path) == ["LATEST"]


def in_use(path: Path, ignore_errors: bool = False) -> None:
    if not ignore_errors:
        raise OSError(errno.ENOTEMPTY, "Directory not empty", str(path))


def test_integers_keep_their_dtype_and_a_weight_without_a_loaded_one_takes_the_commonest():
    half, loaded = torch.bfloat16, {"a": torch.float16}
    weight, count = torch.zeros(1), torch.zeros(1, dtype=torch.int64)
    for save_dtype, expected in (
        (None, [torch.float32] * 2),
        ("float32", [torch.float32] * 2),
        ("checkpoint", [torch.float16, half]),
    ):
        plan = SimpleNamespace(
            model=SimpleNamespace(save_dtype=save_dtype),
            loaded=SimpleNamespace(by_name=loaded, commonest=half),
        )
        assert [ExportPlan.dtype_of(plan, name, weight) for name in "ab"] == expected
        assert ExportPlan.dtype_of(plan, "a", count) == torch.int64
