"""Tiny random models of every family of the installed transformers with a causal language model,
multimodal ones included.

Nothing is downloaded: each family's config class is used with small sizes. Most size fields have
the same name in many families (`SIZES`); further fields of a family are in `FAMILIES`.
"""

from typing import Any

import torch
from transformers import AutoModelForCausalLM, AutoModelForMultimodalLM
from transformers.configuration_utils import PreTrainedConfig
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES,
    MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES,
)

VOCABULARY = 352
MULTIMODAL = frozenset(MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES)
"""Multimodal model types."""
EVERY = sorted(MULTIMODAL | set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES))
"""All model types that may have a language model."""
_SPECIAL_TOKENS = ("pad_token_id", "bos_token_id", "eos_token_id")


def _every(value: Any, names: str) -> dict[str, Any]:
    return dict.fromkeys(names.split(), value)


SIZES: dict[str, Any] = {
    **_every(VOCABULARY, "vocab_size vocab_size_per_layer_input audio_vocab_size"),
    **_every(32, "hidden_size d_model n_embd dim embedding_size emb_dim word_embed_proj_dim"),
    **_every(32, "embed_dim projection_dim lru_width conv_dim out_hidden_size image_size"),
    **_every(48, "intermediate_size ffn_dim d_ff n_inner dim_ff encoder_ffn_dim decoder_ffn_dim"),
    **_every(48, "dff ffn_hidden_size dense_intermediate_size intermediate_size_mlp block_ff_dim"),
    **_every(16, "moe_intermediate_size expert_ffn_hidden_size expert_intermediate_size"),
    **_every(16, "shared_expert_intermediate_size"),
    **_every(16, "moe_shared_expert_intermediate_size"),
    **_every(16, "shared_intermediate_size q_lora_rank kv_lora_rank qk_head_dim o_lora_rank"),
    **_every(
        16, "global_head_dim dim_model_base mamba_d_head mamba_head_dim mamba_headdim n_codes"
    ),
    **_every(2, "num_hidden_layers n_layer n_layers num_layers decoder_layers encoder_layers"),
    **_every(2, "num_blocks num_decoder_layers num_encoder_layers depth"),
    **_every(4, "num_attention_heads n_head n_heads decoder_attention_heads num_heads"),
    **_every(4, "encoder_attention_heads mamba_n_heads mamba_num_heads linear_num_value_heads"),
    **_every(2, "num_key_value_heads linear_num_key_heads index_n_heads n_mamba_heads o_groups"),
    **_every(8, "head_dim attention_head_size kv_channels d_kv qk_rope_head_dim qk_nope_head_dim"),
    **_every(8, "v_head_dim index_head_dim linear_key_head_dim linear_value_head_dim patch_size"),
    **_every(8, "mamba_chunk_size chunk_size hidden_size_per_layer_input laurel_rank"),
    **_every(4, "num_experts num_local_experts n_routed_experts moe_num_experts ffn_num_experts"),
    **_every(2, "num_experts_per_tok num_experts_per_token moe_topk top_k_experts moe_k"),
    **_every(2, "moe_top_k"),
    **_every(1, "n_group topk_group first_k_dense_replace moe_num_shared_experts num_dense_layers"),
    **_every(
        1, "n_shared_experts num_shared_experts num_experts_shared num_global_key_value_heads"
    ),
    **_every(1, "mamba_n_groups mamba_ngroups n_groups num_mem_blocks num_codebooks"),
    **_every(4, "mamba_d_state ssm_state_size mamba_dt_rank state_size time_step_rank rotary_dim"),
    **_every(4, "adapter_rank rotary_ndims"),
    **_every(64, "mamba_d_ssm index_topk attention_window_size window_size"),
    # shorter than the rows of the support matrix
    **_every(8, "sliding_window sliding_window_size"),
    **{"use_sliding_window": True, "max_window_layers": 1},
    **_every(64, "attention_chunk_size"),
    **_every(128, "max_position_embeddings n_positions n_ctx max_seq_len max_target_positions"),
    **_every(2, "mamba_expand expand attn_layer_period expert_layer_period type_vocab_size"),
    **_every(1, "attn_layer_offset expert_layer_offset"),
    **_every(0, "num_kv_shared_layers pad_token_id"),
    **{"bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 2},
    **{"image_token_id": 342, "image_token_index": 342, "audio_token_id": 343},
    **{"video_token_id": 344, "boi_token_id": 345, "eoi_token_id": 346, "boa_token_id": 347},
    **{"eoa_token_id": 348, "eoa_token_index": 348, "mlp_only_layers": [], "conv_L_cache": 3},
}
"""Values of config fields by name, applied to every config that has them."""

_MLA = {"num_key_value_heads": 4, "qk_head_dim": 16, "head_dim": 8}
_LINEAR_THEN_FULL = {"layer_types": ["linear_attention", "full_attention"]}
_LINEAR_MLA = _MLA | _LINEAR_THEN_FULL | {"linear_head_dim": 8, "linear_num_heads": 4}
_LINEAR_MLA |= {"model_max_length": 128}
_ROPE = {"rope_type": "default", "rope_theta": 1e4}
_MROPE = {
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [1, 1, 2]}
}
_HALF_MROPE = {
    "rope_parameters": _MROPE["rope_parameters"]
    | {"mrope_section": [0, 1, 1], "partial_rotary_factor": 0.5}
}
_GEMMA_3N = {
    "intermediate_size": [48] * 2,
    "layer_types": ["sliding_attention", "full_attention"],
    "activation_sparsity_pattern": [0.5, 0.0],
}

FAMILIES: dict[str, dict[str, Any]] = {
    **_every(_MLA, "axk1 axk2 deepseek_v3 deepseek_v32 glm4_moe_lite glm_moe_dsa longcat_flash"),
    **_every(_MLA, "minicpm3 sarvam_mla youtu"),
    **_every(_LINEAR_THEN_FULL, "qwen3_next qwen3_5_text qwen3_5_moe_text granitemoehybrid"),
    **_every({"text_config": _LINEAR_THEN_FULL}, "qwen3_5 qwen3_5_moe"),
    **_every({"layer_types": ["conv", "full_attention"]}, "lfm2_moe lfm3"),
    **_every({"is_decoder": True}, "bert roberta bert-generation camembert data2vec-text electra"),
    **_every({"is_decoder": True}, "ernie megatron-bert rembert roberta-prelayernorm roc_bert"),
    **_every({"is_decoder": True}, "roformer xlm-roberta xlm-roberta-xl"),
    **_every({"head_dim": 8}, "hunyuan_v1_dense hunyuan_v1_moe ministral"),
    # logit scales and softcaps that have an effect
    **_every({"logits_scaling": 4.0}, "granite granitemoe hyperclovax granite_swa"),
    **_every({"logit_scale": 0.25}, "cohere cohere2 cohere2_moe"),
    **_every({"final_logit_softcapping": 3.0}, "gemma2 vaultgemma gemma3_text nanochat"),
    "gemma4_text": {"final_logit_softcapping": 3.0},
    "falcon_h1": {"lm_head_multiplier": 0.3},
    "deepseek_v2": _MLA | {"topk_method": "greedy", "num_experts_per_tok": 2},
    "dots1": {
        "n_routed_experts": 4,
        "n_shared_experts": 1,
        "num_experts_per_tok": 2,
        "head_dim": 8,
    },
    "nemotron": {"num_key_value_heads": 2, "head_dim": 8},
    "bailing_hybrid": _LINEAR_MLA | {"num_expert_group": 1, "topk_group": 1},
    "kimi_linear": _LINEAR_MLA,
    "bamba": {"attn_layer_indices": [1]},
    "cohere_compass_text": {
        "rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}
    },
    "dbrx": {
        "attn_config": {"rope_theta": 1e4, "clip_qkv": 8.0, "kv_n_heads": 2},
        "ffn_config": {"ffn_hidden_size": 16, "hidden_size": 32},
    },
    "gemma3n_text": _GEMMA_3N,
    "gemma3n": {"text_config": _GEMMA_3N},
    "gpt_neo": {"attention_types": [[["global", "local"], 1]]},
    "lfm2": {"full_attn_idxs": [1]},
    "mamba2": {"num_heads": 8, "head_dim": 8, "n_groups": 1},
    "recurrent_gemma": {"num_hidden_layers": 3, "logits_soft_cap": 3.0},
    "dots3_note_text": {"num_key_value_heads": 4},
    "dots3_note": {"text_config": {"num_key_value_heads": 4}},
    # multimodal models: text configs, and encoders as small as possible
    **_every({"text_config": _MROPE}, "qwen2_vl qwen2_5_vl qwen3_vl qwen3_vl_moe paddleocr_vl"),
    **_every({"text_config": _HALF_MROPE}, "glm4v glm4v_moe glm46v glm_ocr"),
    **_every({"text_config": _MLA}, "kimi_k25 mistral_large4"),
    "cosmos3_edge": {"text_config": _MROPE},
    "hy_v4_vl": {"text_config": _MROPE},
    **_every({"vision_config": {"text_hidden_size": 32}}, "inkling2 inkling2_loop"),
    "molmo2": {"adapter_config": {"vision_feature_layer": [1, 0]}},
    "nemotron_h_omni": {"vision_config": {"video_temporal_patch_size": 2}},
    "cohere_compass": {
        "text_config": {"rope_parameters": {"full_attention": _ROPE, "sliding_attention": _ROPE}}
    },
    "gemma4": {
        "text_config": {"final_logit_softcapping": 3.0},
        "vision_config": {"model_type": "gemma4_vision"},
    },
    **_every({"unpadded_vocab_size": VOCABULARY}, "inkling2_text inkling2_loop_text"),
    "reformer": {"is_decoder": True, "axial_pos_embds": False, "num_hashes": 1},
    # two hybrid layers, as they share one attention block
    "zamba": {
        "num_hidden_layers": 6,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"] * 2,
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
    },
    "zamba2": {
        "num_hidden_layers": 3,
        "layers_block_type": ["linear_attention", "linear_attention", "hybrid"],
        "attention_hidden_size": 64,
        "attention_head_dim": 16,
        "kv_channels": 16,
        "num_query_groups": 4,
        "num_key_value_heads": 4,
        "hybrid_layer_ids": [2],
        "n_mamba_heads": 4,
    },
    "zaya": {"num_experts_per_tok": 1, "router_hidden_size": 16, "num_key_value_heads": 2},
}
"""Further config fields of a family, by model type; they override `SIZES`."""


def tiny_config(model_type: str) -> Any:
    """The family's config with small sizes.

    Raises:
        Exception: any error of the family's own validation.
    """
    config_class = CONFIG_MAPPING[model_type]
    return config_class(**_merged(_small_sizes(config_class()), FAMILIES.get(model_type, {})))


def build_tiny(model_type: str) -> Any:
    """A random float32 model of the family (the full multimodal one), with non-uniform logits."""
    torch.manual_seed(0)
    config = tiny_config(model_type)
    model = plain_class(config).from_config(config, dtype=torch.float32)
    generator = torch.Generator().manual_seed(0)
    kept = ("A_log", "dt_bias", ".D", "e_score_correction_bias", "time_decay")
    for name, parameter in sorted(model.named_parameters()):
        if name.endswith(kept) or not parameter.is_floating_point():
            continue
        noise = torch.randn(parameter.shape, generator=generator)
        # weights of norms stay near 1
        is_scale = parameter.dim() == 1 and parameter.mean() > 0.5
        parameter.data.copy_(1 + 0.1 * noise if is_scale else 0.12 * noise)
    return model.eval()


def plain_class(config: Any) -> Any:
    """Auto class that loads the full model in transformers, multimodal parts included."""
    sees = config.model_type in MULTIMODAL
    is_text = config.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES
    is_wrapper = config.get_text_config() is not config
    return (
        AutoModelForMultimodalLM if sees and (is_wrapper or not is_text) else AutoModelForCausalLM
    )


def _small_sizes(config: PreTrainedConfig) -> dict[str, Any]:
    small: dict[str, Any] = {}
    for name, value in vars(config).items():
        if isinstance(value, PreTrainedConfig):
            small[name] = _small_sizes(value) | {"model_type": value.model_type}
        elif name not in SIZES or isinstance(value, bool):
            continue
        elif value is not None or name in _SPECIAL_TOKENS:
            is_list = isinstance(value, list | tuple) and not isinstance(SIZES[name], list)
            repeated = is_list and name not in _SPECIAL_TOKENS
            small[name] = [SIZES[name]] * len(value) if repeated else SIZES[name]
    return small


def _merged(fields: dict[str, Any], changes: dict[str, Any]) -> dict[str, Any]:
    merged = dict(fields)
    for name, value in changes.items():
        both = isinstance(value, dict) and isinstance(merged.get(name), dict)
        merged[name] = _merged(merged[name], value) if both else value
    return merged
