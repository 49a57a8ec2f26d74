"""What a model cannot do is told without its weights, by every task that would load it."""

import pytest
import torch.distributed as dist
from ranks import run_on_ranks
from safetensors.torch import save_file
from stopped_runs import run
from tiny_models import DISTANCES, save_dataset, save_tiny_model

from fastpref.config import AdapterConfig, ModelConfig, PackingConfig
from fastpref.distributed import init_world
from fastpref.errors import CheckpointError, ConfigError
from fastpref.model.beforehand import check_options


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Models of three families and two of one, without weights, and rows."""
    folder = tmp_path_factory.mktemp("without-weights")
    save_tiny_model(folder / "llama")
    save_tiny_model(folder / "gpt2", model_type="gpt2", n_embd=32, n_head=4, n_layer=2)
    for seed in (0, 1):
        save_tiny_model(folder / f"distances{seed}", seed=seed, **DISTANCES)
    save_tiny_model(folder / "mixtral", model_type="mixtral", num_local_experts=4)
    odd = save_tiny_model(folder / "odd", model_type="gpt2") / "config.json"
    odd.write_text(odd.read_text().replace('"n_head": 4', '"n_head": 5'))
    save_tiny_model(folder / "bert", model_type="bert")
    for weights in folder.glob("*/*.safetensors"):
        save_file({}, weights)
    return save_dataset(folder, "pairs")


@pytest.fixture(scope="module")
def unread(tmp_path_factory):
    """Models whose weights nothing can read, and that is not known before somebody tries; rows."""
    folder = tmp_path_factory.mktemp("unread")
    save_tiny_model(folder / "table", model_type="gpt2", max_position_embeddings=24)
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 40, "rope_theta": 1e4}
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    save_tiny_model(folder / "longrope", head_dim=8, rope_parameters=rope | factors)
    for weights in folder.glob("*/*.safetensors"):
        weights.unlink()
        weights.with_name("pytorch_model.bin").write_bytes(b"no weights")
    return save_dataset(folder, "pairs")


@pytest.mark.parametrize(
    ("name", "adapter", "options", "message"),
    [
        ("llama", {"target_modules": ["q_projj"]}, {}, "target_modules: .* nearest: q_proj"),
        ("llama", {"target_parameters": ["experts"]}, {}, "target_parameters: nothing"),
        ("gpt2", {"kind": "qlora"}, {}, "adapter=qlora: GPT2LMHeadModel has no torch.nn.Linear"),
        ("llama", {"kind": "none"}, {"router_aux_loss": "0.1"}, "router_aux_loss=0.1: .*no router"),
        ("llama", {"kind": "none"}, {"block_name": "Block"}, "blocks are LlamaDecoderLayer"),
        ("distances0", {"kind": "none"}, {"attention": "sdpa"}, "sdpa: BloomForCausalLM has no"),
        ("bert", {"kind": "none"}, {}, "BertLMHeadModel .* no causal language model: .*is_decoder"),
    ],
)
def test_what_a_model_has_not_is_told_without_weights(base, name, adapter, options, message):
    model = ModelConfig(name_or_path=str(base / name), **options)
    of_adapters = AdapterConfig(**{"kind": "lora"} | adapter)
    with pytest.raises(ConfigError, match=message):
        check_options(model, of_adapters, PackingConfig(), trainable=True)


def test_a_family_that_cannot_be_built_is_refused_without_weights(base):
    model = ModelConfig(name_or_path=str(base / "odd"))
    with pytest.raises(CheckpointError, match=r"cannot load ModelForCausalLM from .*odd"):
        check_options(model, AdapterConfig(), PackingConfig(), trainable=True)


def refuse_beside_shards(base):
    world = init_world()
    model = ModelConfig(name_or_path=str(base / "mixtral"))
    matrices = {"target_parameters": ["experts.down_proj"]}
    for where in ("replicated", "sharded"):
        adapter = AdapterConfig(kind="lora", base=where, **matrices)
        if where == "sharded":
            with pytest.raises(ConfigError, match=r"target_parameters=.*adapter.base=replicated"):
                check_options(model, adapter, PackingConfig(), trainable=True, world=world)
        else:
            check_options(model, adapter, PackingConfig(), trainable=True, world=world)
    dist.destroy_process_group()


def test_adapters_that_cannot_stand_beside_shards_are_told_without_weights(base):
    run_on_ranks(refuse_beside_shards, 2, base)


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("table", [], "the model has positions for 24; set max_length=24"),
        ("longrope", ["loss=dpo", "reference.mode=cache"], "set reference.mode=online"),
    ],
)
def test_lengths_that_do_not_go_are_told_before_weights_are_read(
    unread, tmp_path, capfd, name, options, message
):
    command = [
        *("model=blank_model", f"model.name_or_path={unread / name}", "datasets=[pairs]"),
        *(f"base_data_dir={unread}", f"output_dir={tmp_path}", "max_prompt_length=64", *options),
    ]
    assert run(command) == 2
    assert message in capfd.readouterr().err


def test_rows_too_long_for_the_second_model_are_told_before_the_first_is_read(
    unread, tmp_path, capfd
):
    command = [
        *("task=estimate_weights", "datasets=[pairs]", f"base_data_dir={unread}"),
        *(f"weights.positive={unread / 'longrope'}", f"weights.negative={unread / 'table'}"),
        f"weights.output_dir={tmp_path}",
    ]
    assert run(command) == 3
    said = capfd.readouterr().err
    assert "train.jsonl:1: " in said and "table has positions for 24; weights are" in said


@pytest.mark.parametrize("task", ["train", "plan", "estimate_weights"])
def test_every_task_tells_before_a_row_is_tokenized(base, tmp_path, capfd, task):
    sides = [
        f"weights.{side}={base / f'distances{i}'}"
        for i, side in enumerate(("positive", "negative"))
    ]
    command = [
        *(f"task={task}", "model=blank_model", f"model.name_or_path={base / 'distances0'}"),
        *("datasets=[pairs]", f"base_data_dir={base}", "packing.share_prompt=true"),
        *(*sides, f"weights.output_dir={tmp_path / 'weights'}", f"output_dir={tmp_path}"),
    ]
    assert run(command) == 2
    said = capfd.readouterr().err
    assert "BloomForCausalLM cannot share prompts: its attention is one of its own" in said
    assert "longest sequence" not in said
