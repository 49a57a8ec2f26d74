"""What a model cannot do is told without its weights, by every task that would load it."""

import pytest
from safetensors.torch import save_file
from stopped_runs import run
from tiny_models import DISTANCES, save_dataset, save_tiny_model

from fastpref.config import AdapterConfig, ModelConfig, PackingConfig
from fastpref.errors import ConfigError
from fastpref.model.beforehand import check_options


@pytest.fixture(scope="module")
def base(tmp_path_factory):
    """Models of three families and two of one, without weights, and rows."""
    folder = tmp_path_factory.mktemp("without-weights")
    save_tiny_model(folder / "llama")
    save_tiny_model(folder / "gpt2", model_type="gpt2", n_embd=32, n_head=4, n_layer=2)
    for seed in (0, 1):
        save_tiny_model(folder / f"distances{seed}", seed=seed, **DISTANCES)
    for weights in folder.glob("*/*.safetensors"):
        save_file({}, weights)
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
    ],
)
def test_what_a_model_has_not_is_told_without_weights(base, name, adapter, options, message):
    model = ModelConfig(name_or_path=str(base / name), **options)
    of_adapters = AdapterConfig(**{"kind": "lora"} | adapter)
    with pytest.raises(ConfigError, match=message):
        check_options(model, of_adapters, PackingConfig(), trainable=True)


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
