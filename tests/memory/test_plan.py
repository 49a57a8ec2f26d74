"""The memory plan: what it counts without memory is what a step takes, and what it says of it."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from fastpref_kernels import get_workspace_mib, set_workspace_mib
from fastpref_kernels.workspace import auto_workspace_mib
from packed_pairs import skip_what_does_not_pack
from peft import LoraConfig, get_peft_model
from stopped_runs import run
from tiny_models import FAMILIES, build_model, save_tiny_model
from transformers import AutoConfig, AutoModelForCausalLM

from fastpref.batches.layouts import PackedRows, RowLayout
from fastpref.config import (
    AdapterConfig,
    Config,
    DPOConfig,
    HeadConfig,
    ModelConfig,
    PackingConfig,
)
from fastpref.distributed import World, init_world
from fastpref.memory.count import count_token_bytes, count_weights
from fastpref.memory.here import bound_workspace
from fastpref.memory.live_bytes import LiveBytes
from fastpref.memory.plan import GIB, Device, HeadBytes, MemoryPlan, communicated_bytes
from fastpref.memory.planning import AUTO_TOKENS, Counted, Measured, auto_tokens, count_training
from fastpref.memory.stack import find_stack
from fastpref.memory.worst_rows import Rows
from fastpref.model.adapters.lora import insert_adapters
from fastpref.model.blocks import find_blocks
from fastpref.model.pair import Pair, build_pair
from fastpref.objectives.objective import build_objective
from fastpref.objectives.step_loss import StepLoss
from fastpref.train.optim import state_bytes

pytestmark = pytest.mark.counts_memory

LONGEST = 128
SHAPES: dict[str, dict[str, Any]] = {
    "llama": {},
    "qwen2": {"model_type": "qwen2", "tie_word_embeddings": True},
    "qwen3": {"model_type": "qwen3", "head_dim": 32, "num_hidden_layers": 6},
    # scores that are bent, by the plain way
    "gemma2": {"model_type": "gemma2", "head_dim": 32, "query_pre_attn_scalar": 32},
    "gpt-neox": {"model_type": "gpt_neox", "intermediate_size": 512},
    # experts, in float32
    "qwen3-moe": {
        "model_type": "qwen3_moe",
        "head_dim": 32,
        "num_experts": 4,
        "num_experts_per_tok": 2,
        "moe_intermediate_size": 192,
    },
    # as many heads of keys as of queries: a further branch gathers none on a CPU
    "gpt2": {"model_type": "gpt2"},
    # padded rows, with an attention of its own around torch's; with one head of keys for all
    "stablelm": {"model_type": "stablelm"},
    "falcon": {"model_type": "falcon", "alibi": False},
    # a prompt once for each response
    "lfm2": {"model_type": "lfm2", "layer_types": 2 * ["conv", "full_attention"]},
}
KINDS = dict.fromkeys(SHAPES, ("none", "lora")) | dict.fromkeys(
    ("gpt2", "stablelm", "lfm2", "falcon"), ("none",)
)
SIZE = {
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "max_position_embeddings": 512,
}


@pytest.fixture
def world():
    yield init_world()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def models(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("shapes")
    for name, config in SHAPES.items():
        save_tiny_model(folder / name, **(SIZE | config))
    return folder


def make_config(model: Path, compute_dtype: str | None = None, **options: Any) -> Config:
    return Config(
        model=ModelConfig(name_or_path=str(model), fsdp_policy_mp=compute_dtype),
        datasets=["words"],
        loss=DPOConfig(beta=0.1),
        packing=PackingConfig(),
        batch_size=8,
        **options,
    )


PACKED = PackedRows(share_prompt=True, max_tokens=8192)
ROWS = Rows(PACKED, longest=32, pairs=True, gathers_keys=False)


def counted_of(
    config: Config, device: Device, layout: RowLayout = PACKED, *, gathers_keys: bool = False
) -> Counted:
    rows = Rows(layout, LONGEST, pairs=True, gathers_keys=gathers_keys)
    measured = Measured(body=None, rows=rows, state_bytes=state_bytes(config.training))
    return count_training(config.training, measured, device)


def count(config: Config, device: Device, layout: RowLayout = PACKED) -> MemoryPlan:
    return counted_of(config, device, layout).plan(device)


def measured_peak(pair: Pair, step_loss: StepLoss, num_tokens: int) -> tuple[int, int]:
    """Bytes that a forward and a backward of pairs take beside the weights, and their tokens."""
    rows_like = Rows(pair.layout, LONGEST, pairs=True, gathers_keys=False)
    rows = rows_like.worst(pair.policy, num_tokens, weighted=False)
    batch = pair.layout.build_rows(rows, pad_token_id=0)
    present = [*pair.policy.parameters(), *pair.policy.buffers()]
    if isinstance(pair.reference, torch.nn.Module):
        present += [*pair.reference.parameters(), *pair.reference.buffers()]
    with LiveBytes(present) as live:
        losses, _ = step_loss.compute(batch, 0)
        losses.sum().backward()
    step_loss.done()
    pair.policy.forget_gradients()
    return live.peak, batch.input_ids.numel()


def measured_peaks(pair: Pair, config: Config) -> list[tuple[int, int]]:
    """Of two batches, see `measured_peak`."""
    for module in pair.policy.modules():
        if hasattr(module, "support_avx512bf16_for_cpu"):
            # kernels of bitsandbytes that no GPU has
            module.support_avx512bf16_for_cpu = False
    step_loss = StepLoss(build_objective(config.loss), pair.policy, pair.reference)
    return [measured_peak(pair, step_loss, num_tokens) for num_tokens in (768, 1536)]


def assert_planned(config: Config, world: World) -> None:
    pair = build_pair(config.training, config.packing, world, longest=LONGEST)
    (small, few), (large, many) = measured_peaks(pair, config)
    plan = count(config, Device("cpu", 1, 8 * GIB), pair.layout)
    planned = plan.peak(many) - plan.peak(few)
    assert planned == pytest.approx(large - small, rel=0.1)


@pytest.mark.parametrize(
    ("shape", "kind"),
    [(shape, kind) for shape in SHAPES for kind in ("none", "lora") if kind in KINDS[shape]],
)
def test_tokens_take_what_the_plan_says_to_a_tenth(models, world: World, shape, kind):
    assert_planned(make_config(models / shape, adapter=AdapterConfig(kind=kind)), world)


@pytest.mark.parametrize(
    ("shape", "options"),
    [("llama", {}), ("llama", {"kind": "qlora"}), ("qwen3", {}), ("qwen3", {"dropout": 0.1})],
    ids=str,
)
def test_so_do_those_of_adapters_in_bfloat16(models, world: World, shape, options):
    # where float32 adapters keep inputs of their own, or the layer's, by what they stand beside
    if options.get("kind") == "qlora":
        pytest.importorskip("bitsandbytes")
    adapter = AdapterConfig(**({"kind": "lora"} | options))
    assert_planned(make_config(models / shape, "bfloat16", adapter=adapter), world)


def test_adapters_of_16_bits_make_no_float32_copies_of_what_their_layers_read(models, world: World):
    # the backward of one block is the most of what recomputed blocks take
    adapter = AdapterConfig(kind="lora")
    config = make_config(
        models / "llama", "bfloat16", adapter=adapter, activation_checkpointing=True
    )
    pair = build_pair(config.training, config.packing, world, longest=LONGEST)
    (small, few), (large, many) = measured_peaks(pair, config)
    tokens = counted_of(config, Device("cpu", 1, 8 * GIB), pair.layout).tokens
    assert (large - small) / (many - few) <= tokens.kept + tokens.backward


@pytest.mark.parametrize(
    ("shape", "kind", "recomputes"), [("llama", "lora", True), ("qwen3-moe", "none", False)]
)
def test_two_shallow_models_tell_what_a_deep_one_takes(
    tmp_path, monkeypatch, shape, kind, recomputes
):
    save_tiny_model(tmp_path, **(SIZE | SHAPES[shape] | {"num_hidden_layers": 7}))
    options = {"activation_checkpointing": recomputes, "adapter": AdapterConfig(kind=kind)}
    config = make_config(tmp_path, "bfloat16", **options)
    device, found = Device("cuda", 1, 80 * GIB), []
    shallow = counted_of(config, device)

    def remember(*args: Any) -> None:
        found.append(find_stack(*args))

    monkeypatch.setattr("fastpref.memory.count.find_stack", remember)
    deep = counted_of(config, device)
    assert deep._replace(tokens=shallow.tokens) == shallow
    # which experts take a token is not the same in every block
    assert deep.tokens == pytest.approx(shallow.tokens, rel=2e-3)
    assert [len(stack.blocks) for stack in found] == [7]


def test_blocks_that_differ_are_all_counted():
    for family, options in {
        "qwen3": {},
        "gemma2": {"layer_types": 3 * ["sliding_attention", "full_attention"]},
        # the first block of these has no experts
        "qwen3_moe": {"mlp_only_layers": [0], "num_experts": 4},
    }.items():
        config = AutoConfig.for_model(
            family, **SIZE | {"num_hidden_layers": 6, "num_attention_heads": 4} | options
        )
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config)
        is_one = find_stack(model, find_blocks(model, None)) is not None
        assert is_one == (family == "qwen3"), family


def test_adapters_take_what_they_are(models):
    full = count(make_config(models / "llama"), Device("cuda", 1, 80 * GIB))
    lora = count(
        make_config(models / "llama", adapter=AdapterConfig(kind="lora", r=4)),
        Device("cuda", 1, 80 * GIB),
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(models / "llama"))
    base = sum(parameter.numel() for parameter in model.parameters())
    adapters = insert_adapters(model, AdapterConfig(kind="lora", r=4), None, None).trained()
    trained = sum(parameter.numel() for parameter in adapters)
    assert (full.masters, full.reference, full.optimizer) == (4 * base, 4 * base, 8 * base)
    assert (lora.masters, lora.gradients, lora.optimizer) == (4 * trained, 4 * trained, 8 * trained)
    # one model in memory, and no gradient of the head
    assert (lora.weights, lora.reference) == (4 * base, 0)
    assert list(lora.parts())[:2] == ["adapters", "base"] and "masters" in full.parts()
    # what is kept for the backward is no more than in full training
    assert lora.kept_per_token <= full.kept_per_token


def test_the_adapter_that_training_started_from_has_no_gradient_and_no_optimizer(models, tmp_path):
    base = AutoModelForCausalLM.from_pretrained(models / "llama")
    options = LoraConfig(task_type="CAUSAL_LM", r=4, target_modules=["q_proj"])
    start = get_peft_model(base, options)
    start.save_pretrained(tmp_path / "start")
    numbers = sum(p.numel() for name, p in start.named_parameters() if ".lora_" in name)
    config = make_config(tmp_path / "start", adapter=AdapterConfig(kind="lora"))
    device = Device("cuda", 2, 80 * GIB, replicated=True)
    counted = counted_of(config, device)
    plan = counted.plan(device)
    # two adapters in memory, of which one is trained; its gradients are in the buffer they are
    # reduced in, too
    assert (plan.masters, plan.gradients, plan.optimizer) == (8 * numbers,) * 3
    sent = communicated_bytes(counted.weights, counted.sizes, device, num_micro_batches=1)
    assert sent == 4 * numbers


def test_adapters_of_experts_make_matrices_as_large_as_they_stand_beside(models):
    experts = 4 * 4 * (3 * 192 * 128) * 4
    made = [
        count(
            make_config(
                models / "qwen3-moe",
                adapter=AdapterConfig(kind="lora"),
                activation_checkpointing=recomputes,
            ),
            Device("cuda", 1, 80 * GIB),
        ).made
        for recomputes in (False, True)
    ]
    # of all four blocks, or of the one that is computed again; and gradients of one
    for num_blocks, size in zip((4, 1), made, strict=True):
        assert num_blocks / 4 <= size / experts <= (num_blocks + 1.5) / 4


def test_keys_that_branches_share_are_kept_for_each_where_attention_gathers_them(models):
    config, device = make_config(models / "llama"), Device("cuda", 1, 80 * GIB)
    kept, gathered = (
        counted_of(config, device, gathers_keys=gathers).tokens.kept for gathers in (False, True)
    )
    # a third of the tokens once more: keys and values of four layers, two heads of 32
    assert gathered - kept == pytest.approx(4 * 2 * 2 * 32 * 4 / 3, rel=0.03)


def test_the_gradient_of_a_large_vocabulary_hides_no_tokens(tmp_path):
    taken = []
    for size in (500, 100_000):
        config = AutoConfig.for_model("llama", **SIZE | {"vocab_size": size, "head_dim": 32})
        config.save_pretrained(tmp_path)
        options = make_config(tmp_path, activation_checkpointing=True)
        taken.append(counted_of(options, Device("cuda", 1, 80 * GIB)).tokens)
    assert taken[0].backward == taken[1].backward > taken[1].kept


def test_embedding_head_and_final_norm_are_counted_outside_of_the_blocks():
    model = build_model("llama")
    weights = count_weights(model, None)
    outside = (model.model.embed_tokens, model.model.norm, model.lm_head)
    assert weights.outside == sum(module.weight.numel() for module in outside)
    sizes = [sum(p.numel() for p in block.parameters()) for block in model.model.layers]
    assert (weights.largest_block, weights.total) == (max(sizes), sum(sizes) + weights.outside)


def test_layers_in_four_bits_take_an_eighth_of_float32(models):
    model = build_model("llama").to("meta")
    weights = count_weights(model, None, in_four_bits=True)
    linear = sum(
        module.weight.numel()
        for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and "layers" in name
    )
    assert weights.in_four_bits == linear
    expected = 2 * (weights.total - linear) + linear * (4 + 8 / 64 + 32 / (64 * 256)) / 8
    assert weights.stored_bytes(2) == pytest.approx(expected, rel=1e-3)


@pytest.mark.parametrize("family", list(FAMILIES))
def test_every_family_is_counted_without_memory(family):
    skip_what_does_not_pack(family)
    config = AutoConfig.for_model(FAMILIES[family][0], **FAMILIES[family][1])
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    body = next(name for name, module in model.named_modules() if module is model.base_model)
    options: dict[str, Any] = {"rows": ROWS, "block_name": None, "fused_layers": False}
    plain = count_token_bytes(model, body=body, activation_checkpointing=False, **options)
    with torch.device("meta"):
        again = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    recomputed = count_token_bytes(again, body=body, activation_checkpointing=True, **options)
    assert 0 < recomputed.kept < plain.kept


def test_router_logits_are_kept_where_their_balance_is_part_of_the_loss():
    experts = {"num_local_experts": 4, "num_experts_per_tok": 2, "sliding_window": None}
    kept = {}
    for family, extra in (("mixtral", experts), ("llama", {})):
        for balanced in (False, True):
            config = AutoConfig.for_model(family, **(FAMILIES["llama"][1] | extra))
            with torch.device("meta"):
                model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
            kept[family, balanced] = count_token_bytes(
                model,
                body="model",
                rows=ROWS,
                block_name=None,
                activation_checkpointing=True,
                fused_layers=False,
                balanced=balanced,
            ).kept
    # two layers, four experts, two bytes
    assert kept["mixtral", True] - kept["mixtral", False] == 2 * 4 * 2
    assert kept["llama", True] == kept["llama", False]


def test_rows_that_a_model_cannot_pack_are_not_counted_as_packed():
    kinds = {"layer_types": ["full_attention", "compressed_sparse_attention"]}
    config = AutoConfig.for_model("llama", **FAMILIES["llama"][1])
    config.update(kinds)
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    options: dict[str, Any] = {"block_name": None, "fused_layers": False}
    with pytest.raises(ValueError, match="no attention to all tokens of a row"):
        count_token_bytes(model, body="model", rows=ROWS, activation_checkpointing=False, **options)


def test_fused_layers_keep_what_their_kernels_do():
    config = AutoConfig.for_model("llama", **FAMILIES["llama"][1])
    kept = []
    for fused_layers in (False, True):
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
        counted = count_token_bytes(
            model,
            body="model",
            rows=ROWS,
            block_name=None,
            activation_checkpointing=False,
            fused_layers=fused_layers,
        )
        kept.append(counted.kept)
    # silu(gate) of every block, and of every norm its normalized input in two bytes
    norms = 2 * config.num_hidden_layers + 1
    sizes = config.num_hidden_layers * config.intermediate_size + norms * config.hidden_size
    assert kept[0] - kept[1] >= 2 * sizes


def plan_of(**changes: Any) -> MemoryPlan:
    values = {
        "masters": 4 * GIB,
        "weights": 2 * GIB,
        "gradients": 4 * GIB,
        "optimizer": 8 * GIB,
        "reference": 2 * GIB,
        "head": HeadBytes(GIB),
        "kept_per_token": 2.0**20,
        "backward_per_token": 2.0**18,
        "scored_per_token": 2.0**14,
        "has_adapters": False,
        "made": 0,
        "process": 0,
        "reserve": GIB,
    }
    return MemoryPlan(**(values | changes))


@pytest.mark.parametrize("head", [HeadBytes(GIB), HeadBytes(GIB, 2**20, 4 * GIB)])
def test_the_most_tokens_are_the_most_that_fit(head):
    plan = plan_of(head=head)
    for available in (24 * GIB, 40 * GIB, 80 * GIB):
        most = plan.most_tokens(available)
        assert plan.peak(most) + plan.reserve <= available < plan.peak(most + 1) + plan.reserve
    assert plan.most_tokens(16 * GIB) == 0
    assert auto_tokens(plan, 400 * GIB) == AUTO_TOKENS
    assert auto_tokens(plan, 16 * GIB) == 1
    assert auto_tokens(plan, 32 * GIB) % 256 == 0


def test_the_head_s_workspace_follows_from_the_device(models):
    assert auto_workspace_mib(None) == auto_workspace_mib(8 * GIB) == 1024
    assert auto_workspace_mib(80 * GIB) == 5120
    before = get_workspace_mib()
    try:
        for options, mib in ((HeadConfig(), 5120), (HeadConfig(workspace_mib="2048"), 2048)):
            bound_workspace(options, 80 * GIB)
            assert get_workspace_mib() == mib
            full = count(make_config(models / "llama"), Device("cuda", 1, 80 * GIB))
            assert full.head.limit == mib * 2**20
            assert full.head.of(10) < full.head.of(10_000) <= full.head.of(10**7)
            assert full.head.of(10**7) == full.head.fixed + full.head.limit
            # of a frozen head nothing is kept
            config = make_config(models / "llama", adapter=AdapterConfig(kind="lora"))
            frozen_device = Device("cuda", 1, 80 * GIB)
            frozen = count(config, frozen_device)
            assert frozen.head.of(10**7) == frozen.head.fixed <= GIB
            # one with an adapter is made anew, with a gradient
            adapter = AdapterConfig(kind="lora", r=4, target_modules=["q_proj", "lm_head"])
            adapted = count(make_config(models / "llama", adapter=adapter), frozen_device)
            vocab_size = json.loads((models / "llama/config.json").read_text())["vocab_size"]
            size = vocab_size * (SIZE["hidden_size"] + 3 * 4)
            assert adapted.head.fixed - frozen.head.fixed == 2 * size * 4
            assert adapted.head.limit == mib * 2**20
    finally:
        set_workspace_mib(before)


@pytest.mark.parametrize("value", ["some", "0", "-1"])
def test_a_wrong_workspace_is_named(value, capsys):
    assert run([f"head.workspace_mib={value}", "task=plan"]) == 2
    assert "head.workspace_mib" in capsys.readouterr().err


def test_shards_on_several_gpus(models):
    config = make_config(models / "llama")
    one, eight, many = (count(config, Device("cuda", num, 80 * GIB)) for num in (1, 8, 64))
    assert one.masters > eight.masters > many.masters
    assert eight.masters * 8 == pytest.approx(one.masters, rel=1e-3)
    assert eight.optimizer * 8 == pytest.approx(one.optimizer, rel=1e-3)
    assert eight.reserve > one.reserve


@pytest.mark.parametrize("value", ["many", "0", "1.5"])
def test_a_wrong_number_of_tokens_is_named(value, capsys):
    assert run([f"packing.max_tokens={value}", "task=plan"]) == 2
    assert "packing.max_tokens" in capsys.readouterr().err


def test_the_run_says_what_it_will_take(models, tmp_path, capsys):
    rows = [{"prompt": "a b", "chosen": " c d e", "rejected": " f"} for _ in range(8)]
    (tmp_path / "words").mkdir()
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    (tmp_path / "words" / "train.jsonl").write_text(lines)
    command = [
        *("model=blank_model", f"model.name_or_path={models / 'llama'}", "datasets=[words]"),
        *(f"base_data_dir={tmp_path}", f"run_dir={tmp_path / 'run'}", "n_eval_examples=0"),
        *("loss=dpo", "adapter=lora", "n_epochs=1", "batch_size=8", "model.fsdp_policy_mp=null"),
    ]
    assert run(command) == 0
    [line] = [x for x in capsys.readouterr().err.splitlines() if "memory, planned" in x]
    assert "MiB a token" in line and "tokens at once take" in line
