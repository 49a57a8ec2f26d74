"""From a loaded model to a scorer: on one rank as a whole, on several sharded."""

from typing import Any

import torch

from fastpref.batches.layouts import RowLayout
from fastpref.config import ModelConfig, PackingConfig
from fastpref.config.groups import FLASH_PACKAGES
from fastpref.distributed import World
from fastpref.model.attention.backends import PackedAttention
from fastpref.model.attention.choice import choose_rows
from fastpref.model.frozen import (
    compute_in,
    store_parameters,
)
from fastpref.model.liger import replace_layers
from fastpref.model.loading import load_causal_lm, try_model
from fastpref.model.logit_path import LogitPath
from fastpref.model.parallelize import parallelize, send_weights, wrap_blocks
from fastpref.model.scorer import TokenScorer


def load_frozen_scorer(
    options: ModelConfig, packing: PackingConfig, world: World, *, longest: int
) -> tuple[TokenScorer, RowLayout]:
    """A model without gradients, and how it takes rows.

    Args:
        options: Of the model.
        packing: Whether rows are to be packed.
        world: Whoever computes.
        longest: Tokens of the longest sequence that will be scored.
    """
    model = load_causal_lm(options, world, trainable=False)
    path = try_model(model, options, world, trainable=False).path
    rows = choose_rows(model, options, packing, world, path=path, longest=longest)
    scorer = build_scorer(
        model, options, world, path=path, trainable=False, attention=rows.attention
    )
    return scorer, rows.layout


def build_scorer(
    model: Any,
    config: ModelConfig,
    world: World,
    *,
    path: LogitPath,
    trainable: bool,
    attention: PackedAttention | None = None,
    activation_checkpointing: bool = False,
    compile: bool = False,
    liger: bool = False,
) -> TokenScorer:
    """A loaded model as a scorer: on one rank as a whole on its device, on several sharded.

    Args:
        model: What `load_causal_lm` returned.
        config: Its options.
        world: Whoever computes.
        path: From its last hidden states to its logits.
        trainable: False for a reference.
        attention: What computes packed rows; None for padded ones.
        activation_checkpointing: Recompute activations in the backward.
        compile: Compile each block.
        liger: Norms and SwiGLU layers by Liger's kernels.
    """
    if attention is None and config.attention in FLASH_PACKAGES:
        model.set_attn_implementation(config.attention)
    if liger:
        replace_layers(model)
    wrap_blocks(
        model,
        config.block_name,
        activation_checkpointing=activation_checkpointing and trainable,
        compile=compile,
    )
    scorer = TokenScorer(model, attention, path)
    compute_dtype = getattr(torch, config.compute_dtype)
    if world.size > 1:
        shard(scorer, config, world, trainable=trainable)
    elif trainable:
        scorer.to(world.device).keep_masters(compute_dtype)
    else:
        freeze(scorer, compute_dtype, config.block_name)
        scorer.to(world.device)
    return scorer


def shard(scorer: TokenScorer, config: ModelConfig, world: World, *, trainable: bool) -> None:
    """Shard a scorer, whose weights rank 0 alone has, over all ranks."""
    weights = scorer.state_dict() if world.is_main else {}
    parallelize(
        scorer,
        world.mesh,
        compute_dtype=getattr(torch, config.compute_dtype),
        block_name=config.block_name,
        trainable=trainable,
    )
    send_weights(scorer, weights)


def freeze(scorer: TokenScorer, dtype: torch.dtype, block_name: str | None) -> None:
    """Let a scorer compute in a dtype without gradients, and without FSDP, on one rank."""
    scorer.requires_grad_(False)
    stored = next(scorer.parameters()).dtype
    if torch.promote_types(stored, dtype) == stored:
        # cast once what would be cast in every forward
        store_parameters(scorer.model, dtype)
    else:
        compute_in(scorer.model, dtype, block_name)
