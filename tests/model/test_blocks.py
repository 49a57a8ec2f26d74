"""The blocks of a model: each parameter in one of them or in none."""

import pytest
import torch
from tiny_models import FAMILIES, build_family, build_model
from torch import nn

from fastpref.errors import ConfigError
from fastpref.model.blocks import find_blocks


@pytest.mark.parametrize("family", FAMILIES)
def test_the_blocks_of_a_family_are_found(family):
    model = build_model(family)
    blocks = find_blocks(model, None)
    assert {type(block).__name__ for block in blocks} == {FAMILIES[family][2]}
    assert len(blocks) == 2
    assert blocks == find_blocks(model, FAMILIES[family][2])


def test_an_unknown_block_name_is_refused_with_the_models_own():
    with pytest.raises(ConfigError, match=r"model\.block_name.*LlamaDecoderLayer"):
        find_blocks(build_model("llama"), "GPT2Block")


def test_a_model_that_names_no_blocks_is_cut_into_its_layers():
    model = build_family("ctrl", n_embd=32, dff=48, n_layer=3, n_head=4)
    assert not model._no_split_modules
    assert find_blocks(model, None) == list(model.transformer.h)


def test_of_blocks_within_blocks_the_outer_ones_count():
    # transformers names both MambaBlock and the MambaMixer inside of it
    model = build_family("mamba", hidden_size=32, state_size=4, num_hidden_layers=2)
    model._no_split_modules = ["MambaMixer", "MambaBlock"]
    assert find_blocks(model, None) == list(model.backbone.layers)


def test_what_shares_a_parameter_with_the_rest_is_no_block():
    # Zamba: one attention layer in several places, each beside a layer of its own
    model = build_model("llama", num_hidden_layers=4)
    layers = model.model.layers
    layers[1].mlp.up_proj.weight = layers[3].mlp.up_proj.weight
    model._no_split_modules = ["LlamaDecoderLayer", "LlamaAttention"]
    inner = [layers[1].self_attn, layers[3].self_attn]
    assert find_blocks(model, None) == [layers[0], inner[0], layers[2], inner[1]]


def test_blocks_that_have_a_layer_in_common_are_none():
    model = build_model("llama", num_hidden_layers=4)
    layers = model.model.layers
    layers[3].mlp = layers[1].mlp
    assert find_blocks(model, None) == [layers[0], layers[2]]


def test_a_layer_without_parameters_is_no_block():
    model = build_model("llama")
    model._no_split_modules = None
    model.extra = nn.ModuleList([nn.Identity(), nn.ReLU()])
    assert find_blocks(model, None) == list(model.model.layers)
    assert all(
        isinstance(p, torch.Tensor) for b in find_blocks(model, None) for p in b.parameters()
    )
