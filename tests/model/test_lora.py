"""Adapters inside a model: which matrices get them, what is refused, what computes when."""

import json
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from tiny_models import FAMILIES, build_family, build_model, save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from fastpref.config import AdapterConfig, Config, DPOConfig, ModelConfig, PackingConfig
from fastpref.distributed import init_world
from fastpref.errors import CheckpointError, ConfigError
from fastpref.model.adapters.base import find_adapter_base
from fastpref.model.adapters.given import given_config
from fastpref.model.adapters.lora import (
    adapter_state,
    add_adapters,
    add_given_adapters,
    check_beside,
    insert_adapters,
)
from fastpref.model.adapters.targets import choose_targets
from fastpref.model.adapters.tied_head import adapted_head
from fastpref.model.beforehand import check_options, load_vocabulary
from fastpref.model.files.paths import find_model
from fastpref.model.filling import check_files
from fastpref.model.logit_path import measure_logit_path
from fastpref.model.source import build_meta

LORA: dict[str, Any] = {"r": 4, "target_modules": ["q_proj", "v_proj"], "task_type": "CAUSAL_LM"}


@pytest.fixture(scope="module")
def world():
    yield init_world()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models")
    save_tiny_model(folder / "tied", tie_word_embeddings=True)
    save_tiny_model(folder / "untied")
    save_tiny_model(folder / "wide", hidden_size=48)
    return folder


def save_adapter(base: Path, folder: Path, *, rows: int | None = None, **options: Any) -> Path:
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows)
    adapted = peft.get_peft_model(model, peft.LoraConfig(**(LORA | options)))
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    return folder


def load(folder: Path) -> Any:
    return AutoModelForCausalLM.from_pretrained(folder).eval()


def adapt(model: Any, world: Any, start: Path | None = None, **options: Any) -> Any:
    return add_adapters(
        model,
        AdapterConfig(kind="lora", **options),
        world,
        block_name=None,
        seed=0,
        start=None if start is None else str(start),
    )


@pytest.mark.parametrize("family", list(FAMILIES))
def test_all_linear_layers_of_the_blocks_get_adapters_and_nothing_else(family, world):
    model = build_model(family)
    linear = {
        name
        for name, module in model.named_modules()
        if type(module).__name__ in ("Linear", "Conv1D") and ".0." in name.replace(".1.", ".0.")
    }
    adapters = adapt(model.eval(), world)
    adapted = {
        name.partition(".lora_A")[0] for name, p in model.named_parameters() if "lora_A" in name
    }
    assert adapted == linear and adapters.num_layers == len(linear)
    assert not any("embed" in name or "lm_head" in name for name in adapted)
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained and all("lora_" in name for name in trained)


def test_experts_that_are_one_matrix_get_adapters(world):
    model = build_family(
        "qwen3_moe",
        hidden_size=32,
        intermediate_size=48,
        moe_intermediate_size=16,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_experts=4,
        num_experts_per_tok=2,
    ).eval()
    modules, parameters = choose_targets(model, AdapterConfig(kind="lora"), None)
    all_linear = AdapterConfig(kind="lora", target_modules=["all-linear"])
    assert choose_targets(model, all_linear, None) == (modules, parameters)
    assert parameters == ["experts.down_proj", "experts.gate_up_proj"]
    assert set(modules) >= {"q_proj", "k_proj", "v_proj", "o_proj"}
    ids = torch.arange(3, 30)[None]
    before = model(ids).logits
    adapters = adapt(model, world)
    assert torch.equal(model(ids).logits, before)
    names = {name.partition(".lora_")[0] for name in adapter_state(model)}
    assert sum("experts" in name for name in names) == 4
    for parameter in adapters.trained():
        torch.nn.init.normal_(parameter, std=0.1)
    assert not torch.allclose(model(ids).logits, before)
    with adapters.as_reference():
        assert torch.equal(model(ids).logits, before)


def test_the_model_stays_its_class_so_that_its_body_is_the_body(models, world):
    model = load(models / "tied")
    body = model.base_model
    adapt(model, world)
    assert model.base_model is body and type(model).__name__ == "LlamaForCausalLM"
    assert measure_logit_path(model).body is not None


def test_given_adapters_are_trained_on_and_their_copy_is_the_reference(models, world, tmp_path):
    start = save_adapter(models / "tied", tmp_path / "adapter")
    model = load(models / "tied")
    ids = torch.arange(3, 30)[None]
    bare = model(ids).logits
    expected = peft.PeftModel.from_pretrained(load(models / "tied"), start)(ids).logits
    adapters = adapt(model, world, start)
    assert torch.equal(model(ids).logits, expected)
    for parameter in adapters.trained():
        torch.nn.init.normal_(parameter, std=0.1)
    with adapters.as_reference():
        # neither what is trained nor the bare model
        assert torch.equal(model(ids).logits, expected)
    assert not torch.allclose(expected, bare)
    adapters.activate(None)
    assert torch.equal(model(ids).logits, bare)


@pytest.mark.parametrize("prefixed", [True, False])
def test_an_adapter_with_the_names_of_a_state_dict_is_trained_on(models, world, tmp_path, prefixed):
    start = save_adapter(models / "tied", tmp_path / "adapter")
    ids = torch.arange(3, 30)[None]
    expected = peft.PeftModel.from_pretrained(load(models / "tied"), start)(ids).logits
    path = start / "adapter_model.safetensors"
    weights = load_file(path)
    renamed = {name.replace(".weight", ".default.weight"): x for name, x in weights.items()}
    if not prefixed:
        renamed = {name.removeprefix("base_model.model."): x for name, x in renamed.items()}
    assert not renamed.keys() & weights.keys()
    save_file(renamed, path)
    model = load(models / "tied")
    adapt(model, world, start)
    assert torch.equal(model(ids).logits, expected)
    # before weights are read
    check_beside(build_meta(find_model(str(models / "tied")), dtype=torch.float32), str(start))


def test_an_adapter_that_is_not_finite_is_not_trained_on(models, world, tmp_path):
    start = save_adapter(models / "tied", tmp_path / "adapter")
    weights = load_file(start / "adapter_model.safetensors")
    name = min(weights)
    weights[name][0, 0] = torch.inf
    save_file(weights, start / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match=f"NaN or infinity in {name} of adapter_model"):
        adapt(load(models / "tied"), world, start)


def test_a_seed_is_an_adapter_and_leaves_the_run_s_random_state_alone(models, world):
    states = []
    for dtype in (torch.float32, torch.bfloat16):
        torch.manual_seed(5)
        model = load(models / "tied").to(dtype)
        adapt(model, world)
        states.append(adapter_state(model) | {"next": torch.rand(3)})
    for name, tensor in states[0].items():
        assert torch.equal(tensor, states[1][name]), name
    torch.manual_seed(5)
    load(models / "tied")
    assert torch.equal(torch.rand(3), states[0]["next"])


REFUSED_OPTIONS = {
    "unknown layer": ({"target_modules": ["q_prj"]}, "named q_prj; nearest: q_proj"),
    "tied head": (
        {"target_modules": ["q_proj", "lm_head"]},
        "shares its weight with the embedding",
    ),
    "tied embedding": ({"target_modules": ["embed_tokens"]}, "shares its weight with the head"),
    "no linear layer": ({"target_modules": ["input_layernorm"]}, "target_modules"),
}


@pytest.mark.parametrize("case", list(REFUSED_OPTIONS))
def test_options_that_do_not_fit_the_model_are_refused(models, world, case):
    options, message = REFUSED_OPTIONS[case]
    with pytest.raises(ConfigError, match=message):
        adapt(load(models / "tied"), world, **options)


def test_a_head_of_its_own_gets_an_adapter(models, world):
    model = load(models / "untied")
    adapters = adapt(model, world, target_modules=["q_proj", "lm_head"])
    assert adapters.num_layers == 3


REFUSED_ADAPTERS = {
    "tables beside it": ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
    "biases": ({"bias": "all"}, "biases that are the reference's"),
    "some tokens": ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
    "a base of its own": ({"kasa_config": {}}, "kasa_config"),
    "added tokens": ({"rows": 360}, "whole matrices of its own"),
}


@pytest.mark.parametrize("case", list(REFUSED_ADAPTERS))
def test_adapters_that_are_more_than_low_rank_matrices_are_refused(models, world, tmp_path, case):
    options, message = REFUSED_ADAPTERS[case]
    start = save_adapter(models / "untied", tmp_path / "adapter", **options)
    with pytest.raises(CheckpointError, match=f"{message}.*adapter=none merges it"):
        adapt(load(models / "untied"), world, start)


OTHER_KINDS = {
    "IA3": peft.IA3Config(target_modules=["down_proj"], feedforward_modules=["down_proj"]),
    "ADALORA": peft.AdaLoraConfig(target_modules=["q_proj"], total_step=1),
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_an_adapter_of_another_kind_is_refused(models, tmp_path, kind):
    peft.get_peft_model(load(models / "tied"), OTHER_KINDS[kind]).save_pretrained(tmp_path)
    with pytest.raises(CheckpointError, match=f"is {kind}, of which LoRA alone"):
        given_config(str(tmp_path))


def test_block_diagonal_adapters_are_trained_on(models, world, tmp_path):
    blocks = {"target_modules_bd_a": ["o_proj"], "target_modules_bd_b": ["q_proj"], "nblocks": 2}
    options = {"target_modules": ["q_proj", "o_proj"], "use_bdlora": blocks}
    start = save_adapter(models / "tied", tmp_path / "adapter", **options)
    expected = peft.PeftModel.from_pretrained(load(models / "tied"), start)
    model = load(models / "tied")
    adapt(model, world, start)
    ids = torch.arange(3, 15)[None]
    torch.testing.assert_close(model(ids).logits, expected(ids).logits)


@pytest.mark.parametrize(
    ("option", "value"),
    [("r", 8), ("alpha", 3), ("target_modules", ["q_proj"]), ("use_rslora", True)],
)
def test_options_that_a_given_adapter_does_not_have_are_refused(
    models, world, tmp_path, option, value
):
    start = save_adapter(models / "tied", tmp_path / "adapter")
    with pytest.raises(ConfigError, match=f"adapter.{option}=.* does not fit the adapter"):
        adapt(load(models / "tied"), world, start, **{option: value})


def test_an_adapter_of_a_base_of_another_shape_is_refused(models, world, tmp_path):
    start = save_adapter(models / "tied", tmp_path / "adapter")
    with pytest.raises(CheckpointError, match=r"cannot load the adapter from .*size mismatch"):
        adapt(load(models / "wide"), world, start)


@pytest.mark.parametrize("init", ["pissa", "olora", "pissa_niter_4"])
def test_an_adapter_that_moved_its_base_is_refused(models, world, tmp_path, init):
    start = save_adapter(models / "untied", tmp_path / "adapter")
    edit_config(start, init_lora_weights=init)
    with pytest.raises(CheckpointError, match=f"init_lora_weights={init}, which moved its base"):
        adapt(load(models / "untied"), world, start)


def test_token_ids_are_those_of_the_base_that_an_archive_is(models, tmp_path):
    longer = save_tiny_model(tmp_path / "longer", vocab_size=512)
    config = ModelConfig(name_or_path=str(models / "tied"), archive=str(longer))
    kinds = ("none", "lora")
    num_rows = {kind: load_vocabulary(config, AdapterConfig(kind=kind))[1] for kind in kinds}
    assert num_rows["none"] < num_rows["lora"] == 512


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"use_dora": True}, "DoRA"),
        ({"lora_bias": True}, "a bias"),
        (
            {"use_bdlora": {"target_modules_bd_a": ["q_proj", "lm_head"], "nblocks": 2}},
            "DoRA or an",
        ),
    ],
)
def test_a_head_that_is_more_than_low_rank_is_refused(models, world, tmp_path, options, message):
    targets = ["q_proj", "lm_head"]
    start = save_adapter(models / "untied", tmp_path / "adapter", target_modules=targets, **options)
    with pytest.raises(CheckpointError, match=f"lm_head, .* cannot have {message}"):
        adapt(load(models / "untied"), world, start)
    with pytest.raises(ConfigError, match=r"lm_head, .* cannot have dropout, .*adapter\.dropout=0"):
        adapt(load(models / "untied"), world, target_modules=targets, dropout=0.1)


def test_dropout_of_experts_is_refused_by_its_option_whoever_made_the_adapter(world, tmp_path):
    sizes = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16}
    base = save_tiny_model(tmp_path / "base", model_type="qwen3_moe", head_dim=8, **sizes)
    experts = {"target_modules": ["q_proj"], "target_parameters": ["experts.down_proj"]}
    for start in (None, save_adapter(base, tmp_path / "adapter", **experts)):
        with pytest.raises(ConfigError, match=r"adapter\.dropout=0\.1: .* a mixture's experts"):
            adapt(load(base), world, start, dropout=0.1)


def test_an_adapter_whose_sizes_come_from_its_layers_takes_no_memory(models, tmp_path):
    start = save_adapter(models / "untied", tmp_path / "adapter", use_dora=True)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(models / "untied"))
    trained = insert_adapters(model, AdapterConfig(kind="lora"), None, str(start)).trained()
    saved = load_file(start / "adapter_model.safetensors")
    assert all(parameter.is_meta for parameter in trained)
    assert sum(x.numel() for x in trained) == sum(x.numel() for x in saved.values())


def test_an_adapter_on_one_of_two_tied_tables_is_refused(models, world, tmp_path):
    targets = ["q_proj", "lm_head"]
    start = save_adapter(models / "tied", tmp_path / "adapter", target_modules=targets)
    with pytest.raises(CheckpointError, match="lm_head shares its weight with the embedding"):
        adapt(load(models / "tied"), world, start)


def test_whether_tables_are_adapted_alike_is_each_adapter_s_own(models, world, tmp_path):
    tables = {"target_modules": ["embed_tokens"]}
    alike = save_adapter(models / "tied", tmp_path / "a", **tables, ensure_weight_tying=True)
    one = save_adapter(models / "tied", tmp_path / "b", **tables)
    folders = {"positive": str(alike), "negative": str(one)}
    with pytest.raises(CheckpointError, match=r"b: .*embed_tokens shares its weight .* only one"):
        add_given_adapters(load(models / "tied"), folders, world)


def test_the_dropout_an_adapter_was_trained_with_is_nothing_to_a_model_that_only_scores(
    models, world, tmp_path
):
    base, targets = models / "untied", ["q_proj", "lm_head"]
    start = save_adapter(base, tmp_path / "adapter", target_modules=targets)
    outputs = []
    for dropout in (0.0, 0.1):
        edit_config(start, lora_dropout=dropout)
        model = load(base)
        add_given_adapters(model, {"side": str(start)}, world).activate("side")
        with torch.no_grad():
            outputs.append(model(input_ids=torch.arange(3, 15)[None]).logits)
    assert torch.equal(*outputs)


def edit_config(folder: Path, **changes: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


MISFITS = {
    # name: its options, what its config says instead, message
    "rank": ({}, {"r": 8}, "size mismatch"),
    "layer": ({}, {"layers_to_transform": [0]}, "without a place"),
    "package": ({}, {"megatron_config": {"a": 1}}, "cannot load .* No module named 'megatron'"),
    "table": ({"target_modules": ["embed_tokens"]}, {}, "shares its weight with the head"),
}


@pytest.mark.parametrize("kind", ["none", "lora"])
@pytest.mark.parametrize("case", MISFITS)
def test_adapters_that_do_not_fit_are_refused_before_weights_are_read(models, tmp_path, case, kind):
    options, changes, message = MISFITS[case]
    start = save_adapter(models / "tied", tmp_path / "adapter", **options)
    edit_config(start, **changes)
    model = ModelConfig(name_or_path=str(start))
    with pytest.raises(CheckpointError, match=message):
        check_options(model, AdapterConfig(kind=kind), PackingConfig(), trainable=True)
        check_files(model)


def test_what_cannot_be_merged_is_refused_before_it_is_trained(models, tmp_path):
    start = save_adapter(models / "tied", tmp_path / "adapter", lora_bias=True)
    model = ModelConfig(name_or_path=str(start))
    check_files(model, beside=True)
    with pytest.raises(CheckpointError, match=r"cannot be merged .* base layer has no bias"):
        check_files(model)


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("std", [1e-2, 1e-4])
def test_in_16_bits_the_head_s_adapter_is_not_rounded_away(models, world, tied, std):
    model = load(models / ("tied" if tied else "untied")).bfloat16()
    exact = load(models / ("tied" if tied else "untied"))
    exact.load_state_dict({name: x.float() for name, x in model.state_dict().items()})
    options = {"target_modules": ["lm_head"], "ensure_weight_tying": tied}
    states = []
    hidden = torch.randn(7, 32, generator=torch.Generator().manual_seed(0)).bfloat16()
    for adapted in (model, exact):
        adapters = adapt(adapted, world, **options)
        torch.manual_seed(3)
        for parameter in adapters.trained():
            torch.nn.init.normal_(parameter, std=std)
        states.append(adapted_head(adapted.get_output_embeddings(), hidden.to(adapted.dtype)))
    (states_ND, weight), (exact_ND, exact_weight) = states
    base = exact_ND.double() @ load_weight(model).double().T
    effect = states_ND.double() @ weight.double().T - base
    expected = exact_ND.double() @ exact_weight.double().T - base
    # of the adapter's own share of the logits, which float32 adds to the weight with an error
    error = (effect - expected).abs().max() / expected.abs().max()
    assert error < (1e-4 if std == 1e-2 else 0.1)


def load_weight(model: Any) -> torch.Tensor:
    head = model.get_output_embeddings()
    return getattr(head, "base_layer", head).weight


class Router(torch.nn.Linear):
    def forward(self, hidden: torch.Tensor) -> Any:
        return super().forward(hidden), None


def test_kinds_of_linear_layers_that_return_something_else_get_no_adapter(world):
    model = build_model("llama").eval()
    for layer in model.model.layers:
        layer.mlp.router = Router(32, 4)
        layer.mlp.conv_weight = torch.nn.Parameter(torch.zeros(8, 2, 4))
    assert choose_targets(model, AdapterConfig(kind="lora"), None) == (
        ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        [],
    )


def test_layers_that_kernels_read_past_get_no_adapter():
    sizes = {"hidden_size": 32, "state_size": 4, "num_hidden_layers": 2, "time_step_rank": 4}
    model = build_family("mamba", **sizes)
    assert choose_targets(model, AdapterConfig(kind="lora"), None) == (["in_proj", "x_proj"], [])


def test_an_adapter_with_a_matrix_missing_is_refused(models, world, tmp_path):
    start = save_adapter(models / "tied", tmp_path / "adapter")
    weights = load_file(start / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, start / "adapter_model.safetensors")
    with pytest.raises(CheckpointError, match="does not fit its base model: missing"):
        adapt(load(models / "tied"), world, start)


def test_the_base_of_an_adapter_is_found_or_what_is_wrong_is_said(models, tmp_path):
    start = save_adapter(models / "tied", tmp_path / "adapter")
    base = find_adapter_base(ModelConfig(name_or_path=str(start)))
    assert (base.name, base.start) == (str(models / "tied"), str(start))
    base = find_adapter_base(ModelConfig(name_or_path=str(models / "tied")))
    assert (base.name, base.start) == (str(models / "tied"), None)
    base = find_adapter_base(ModelConfig(name_or_path=str(models / "wide"), archive=str(start)))
    assert (base.name, base.start) == (str(models / "tied"), str(start))
    (tmp_path / "policy.pt").touch()
    with pytest.raises(ConfigError, match=r"model\.archive: an adapter names the folder"):
        find_adapter_base(
            ModelConfig(name_or_path=str(models / "tied"), archive=str(tmp_path / "policy.pt"))
        )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kind": "dora"}, "adapter"),
        ({"r": 0}, "adapter.r"),
        ({"r": 10**30}, "adapter.r must be >= 1 and <= 1048576"),
        ({"alpha": 0}, "adapter.alpha"),
        ({"dropout": 1.0}, "adapter.dropout"),
        ({"init": "pissa"}, "adapter.init=pissa would start with another model"),
        ({"init": "zeros"}, "adapter.init"),
        ({"base": "here"}, "adapter.base"),
        ({"target_modules": []}, "adapter.target_modules must name at least one"),
        ({"kind": "qlora", "base": "sharded"}, "layers in 4 bits cannot be sharded"),
    ],
)
def test_wrong_options_are_named(options, message):
    with pytest.raises(ValueError, match=message):
        AdapterConfig(**options)


def test_layers_in_four_bits_are_refused_on_a_cpu():
    pytest.importorskip("bitsandbytes")
    config = Config(
        model=ModelConfig(name_or_path="tiny"),
        datasets=["hh"],
        loss=DPOConfig(beta=0.1),
        adapter=AdapterConfig(kind="qlora"),
    )
    with pytest.raises(ConfigError, match="adapter=qlora computes on a CUDA device"):
        config.check_device("cpu", True)
