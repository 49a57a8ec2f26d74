"""From a model option to a scorer: what is refused, and that a reference is its policy."""

import logging

import pytest
import torch
import torch.distributed as dist
from tiny_models import build_family, build_model, random_rows, save_tiny_model

from fastpref.batches.padded import pad_rows
from fastpref.config import ModelConfig
from fastpref.distributed import init_world
from fastpref.errors import CheckpointError, ConfigError
from fastpref.model.build import build_scorer
from fastpref.model.loading import (
    load_causal_lm,
    load_reference,
    starts_exactly_equal,
    try_model,
)
from fastpref.model.positions import check_positions

SIZES = {
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
FAMILIES = {
    "llama": SIZES,
    # its embedding's scale, a buffer, is rounded where it is loaded in 16 bits
    "gemma2": SIZES | {"head_dim": 8},
    # a buffer of factors that would be rounded step by step
    "falcon_h1": SIZES
    | {"mamba_d_ssm": 32, "mamba_n_heads": 4, "mamba_d_head": 8, "mamba_n_groups": 1}
    | {"mamba_d_state": 4, "mamba_chunk_size": 8, "ssm_multipliers": [0.3, 0.7, 1.1, 0.9, 0.77]},
    # a table of positions that computes in 16 bits only where it is rounded
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4},
    # routers that draw random numbers in training mode
    "phimoe": SIZES
    | {"num_local_experts": 4, "router_jitter_noise": 0.1, "input_jitter_noise": 0.1},
    # routers in float32 beside 16 bits
    "deepseek_v3": SIZES
    | {"num_key_value_heads": 4, "n_routed_experts": 4, "n_group": 1, "topk_group": 1}
    | {"num_experts_per_tok": 2, "moe_intermediate_size": 16, "first_k_dense_replace": 1}
    | {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8}
    | {"v_head_dim": 8, "head_dim": 8},
}


@pytest.fixture(scope="module")
def world():
    yield init_world()
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Checkpoints in bfloat16, one a family."""
    base = tmp_path_factory.mktemp("families")
    for model_type, config in FAMILIES.items():
        build_family(model_type, **config).bfloat16().save_pretrained(base / model_type)
    return base


@pytest.mark.parametrize(
    ("policy_dtype", "compute_dtype"),
    [("float32", None), ("float32", "bfloat16"), ("bfloat16", "bfloat16"), ("bfloat16", "float32")],
)
@pytest.mark.parametrize("model_type", FAMILIES)
def test_a_reference_scores_as_its_policy_to_the_last_bit(
    folders, world, model_type, policy_dtype, compute_dtype
):
    config = ModelConfig(
        name_or_path=str(folders / model_type),
        policy_dtype=policy_dtype,
        fsdp_policy_mp=compute_dtype,
    )
    model = load_causal_lm(config, world, trainable=True)
    findings = try_model(model, config, world, trainable=True)
    policy = build_scorer(model, config, world, path=findings.path, trainable=True)
    reference = build_scorer(
        load_reference(config, world, findings), config, world, path=findings.path, trainable=False
    )
    batch = pad_rows(random_rows(), pad_token_id=0)
    logps_N = policy(batch)
    with torch.no_grad():
        assert torch.equal(logps_N, reference(batch))
    logps_N.sum().backward()
    assert starts_exactly_equal(config, findings, compile=False, activation_checkpointing=False)


def test_equality_is_not_expected_of_what_rounds_differently(folders, world):
    def options(**changes) -> ModelConfig:
        return ModelConfig(**({"name_or_path": str(folders / "llama")} | changes))

    plain = options()
    findings = try_model(load_causal_lm(plain, world, trainable=True), plain, world, trainable=True)

    def equal(compile: bool = False, recompute: bool = False, **changes) -> bool:
        return starts_exactly_equal(
            options(**changes), findings, compile=compile, activation_checkpointing=recompute
        )

    assert equal()
    assert equal(reference_dtype="float32")
    assert equal(reference_dtype="bfloat16")
    assert not equal(reference_dtype="float16")
    assert not equal(reference_dtype="bfloat16", fsdp_policy_mp=None)
    assert not equal(compile=True)
    assert equal(compile=True, fsdp_policy_mp=None)
    assert not equal(compile=True, recompute=True, fsdp_policy_mp=None)


def test_an_encoder_decoder_model_is_refused(tmp_path, world):
    sizes = {"d_model": 32, "encoder_layers": 1, "decoder_layers": 1}
    model = build_family("bart", **sizes)
    model.config.is_encoder_decoder = True
    model.config.save_pretrained(tmp_path)
    config = ModelConfig(name_or_path=str(tmp_path))
    with pytest.raises(CheckpointError, match="is an encoder-decoder model"):
        load_causal_lm(config, world, trainable=True)


def test_parameters_that_a_family_keeps_in_float32_are_said_to_compute_in_16_bits(
    folders, world, caplog
):
    config = ModelConfig(name_or_path=str(folders / "deepseek_v3"))
    model = load_causal_lm(config, world, trainable=True)
    with caplog.at_level(logging.INFO, "fastpref"):
        try_model(model, config, world, trainable=True)
    kept = ", ".join(sorted(model._keep_in_fp32_modules_strict))
    assert f"keeps {kept} in float32 beside 16 bits; here all parameters compute" in caplog.text


def test_sequences_beyond_a_table_are_refused_and_beyond_the_training_warned_of(caplog):
    gpt2, llama = build_model("gpt2"), build_model("llama")
    check_positions(gpt2, 64)
    check_positions(llama, 64)
    assert not caplog.messages
    with pytest.raises(ConfigError, match=r"has 65 tokens.*positions for 64; set max_length=64"):
        check_positions(gpt2, 65)
    check_positions(llama, 65)
    (message,) = caplog.messages
    assert "65 tokens, LlamaForCausalLM was made for 64" in message


def test_weights_of_nan_end_the_run_as_a_checkpoint_does(tmp_path, world):
    folder = save_tiny_model(tmp_path / "m")
    config = ModelConfig(name_or_path=str(folder))
    model = load_causal_lm(config, world, trainable=True)
    model.lm_head.weight.data[3, 3] = float("nan")
    with pytest.raises(CheckpointError, match=r"not finite \(NaN or infinite\): .*"):
        try_model(model, config, world, trainable=True)
