"""How long a sequence a model takes, by its tables of positions and by what it was made for."""

import pytest
import torch
from tiny_models import build_family, build_model
from transformers import AutoConfig

from fastpref.model.positions import config_value, position_limit, trained_positions

SIZES = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
DECODER = {"d_model": 32, "decoder_ffn_dim": 48, "decoder_layers": 2, "decoder_attention_heads": 4}
TABLES = {
    "gpt2": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 20},
    "gpt_bigcode": {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 20},
    "gptj": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 20},
    "codegen": {"n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 4, "n_positions": 20},
    "gpt_neo": {"hidden_size": 32, "num_layers": 2, "num_heads": 4, "max_position_embeddings": 20}
    | {"attention_types": [[["global", "local"], 1]], "window_size": 64},
    # two rows in front of the first position
    "opt": SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32, "max_position_embeddings": 20},
    "biogpt": SIZES | {"intermediate_size": 48, "max_position_embeddings": 20},
    "bart": DECODER | {"max_position_embeddings": 20},
    # computed once, under a name of its own
    "ctrl": {"n_embd": 32, "n_layer": 2, "n_head": 4, "dff": 48, "n_positions": 20},
    # distances laid out beforehand
    "mpt": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 20},
    "mpt without": {"d_model": 32, "n_layers": 2, "n_heads": 4, "max_seq_len": 20}
    | {"attn_config": {"alibi": False}},
    # counted from behind the position of padding
    "roberta": SIZES | {"intermediate_size": 48, "max_position_embeddings": 21, "is_decoder": True},
}
NO_TABLES = {
    "llama": SIZES | {"intermediate_size": 48, "max_position_embeddings": 20},
    "gpt_neox": SIZES | {"intermediate_size": 48, "max_position_embeddings": 20},
    # sines that grow with the rows
    "xglm": {"d_model": 32, "ffn_dim": 48, "num_layers": 2, "attention_heads": 4}
    | {"max_position_embeddings": 20},
    # distances in the scores
    "bloom": {"hidden_size": 32, "n_layer": 2, "n_head": 4},
}


@pytest.mark.parametrize("model_type", TABLES)
def test_the_limit_is_where_the_model_itself_ends(model_type):
    model = build_family(model_type.split()[0], **TABLES[model_type]).eval()
    limit = position_limit(model)
    assert limit == 20
    ids = torch.full((1, limit), 5)
    model(input_ids=ids, use_cache=False)
    with pytest.raises((IndexError, RuntimeError)):
        model(input_ids=torch.full((1, limit + 1), 5), use_cache=False)


@pytest.mark.parametrize("model_type", NO_TABLES)
def test_where_there_is_no_table_there_is_no_limit(model_type):
    model = build_family(model_type, **NO_TABLES[model_type]).eval()
    assert position_limit(model) is None
    model(input_ids=torch.full((1, 24), 5), use_cache=False)


def test_a_vocabulary_as_large_as_the_table_is_no_table():
    assert position_limit(build_model("llama", max_position_embeddings=97)) is None
    model = build_model("gpt2", n_positions=97)
    assert position_limit(model) == 97


@pytest.mark.parametrize(
    ("scaling", "expected"),
    [
        (None, 4096),
        # Llama 3.1 names what it was extended to, Qwen 2.5 what it was trained for
        (
            {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 512}
            | {"low_freq_factor": 1.0, "high_freq_factor": 4.0},
            4096,
        ),
        (
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 4096},
            16384,
        ),
    ],
)
def test_scaled_rotary_angles_count(scaling, expected):
    options = {} if scaling is None else {"rope_scaling": scaling}
    config = AutoConfig.for_model("llama", max_position_embeddings=4096, **options)
    assert trained_positions(config) == expected
    assert trained_positions(AutoConfig.for_model("bloom")) is None


class PerLayer:
    """A config with a value for each layer, as transformers builds Gemma 4's."""

    hidden_size = 32

    @property
    def head_dim(self) -> int:
        raise RuntimeError("'head_dim' is a per-layer attribute")


def test_a_value_that_differs_by_layer_is_none():
    assert config_value(PerLayer(), "head_dim") is None
    assert config_value(PerLayer(), "hidden_size") == 32
    assert config_value(PerLayer(), "no_such_value") is None
