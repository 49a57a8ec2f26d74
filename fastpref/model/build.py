"""Builds a scorer from a loaded model: whole on one rank, sharded over several."""

from typing import Any

import torch

from fastpref.config.groups import FLASH_PACKAGES, ModelConfig
from fastpref.distributed import World
from fastpref.model.adapters.lora import Adapters
from fastpref.model.attention.backends import PackedAttention
from fastpref.model.exact_arithmetic import cast_in_forward
from fastpref.model.frozen import store_parameters
from fastpref.model.liger import replace_layers
from fastpref.model.logit_path import LogitPath
from fastpref.model.parallelize import parallelize, send_weights, wrap_blocks
from fastpref.model.replicate import replicate
from fastpref.model.router import Router, choose_balance
from fastpref.model.scorer import TokenScorer


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
    adapters: Adapters | None = None,
    replicated: bool = False,
    router: Router | None = None,
) -> TokenScorer:
    """Build a scorer from a loaded model, whole on its device on one rank, sharded over several.

    Args:
        model: What `load_causal_lm` returned.
        path: From its last hidden states to its logits.
        trainable: False for a reference.
        attention: Backend for packed rows; None for padded rows.
        adapters: The adapters in it; if it is trained, only they are.
        replicated: Every rank holds the whole model.
        router: Its router of experts; a trained model may add the load-balancing loss.

    Raises:
        ConfigError: a load-balancing loss is requested that cannot be computed for the model.
    """
    balance = choose_balance(config.router_coefficient, router, model) if trainable else None
    if attention is None and config.attention in FLASH_PACKAGES:
        model.set_attn_implementation(config.attention)
    if liger:
        replace_layers(model)
    wrap_blocks(
        model,
        config.block_name,
        activation_checkpointing=activation_checkpointing and trainable,
        compile=compile,
        packed=attention is not None,
    )
    scorer = TokenScorer(model, attention, path, adapters, balance)
    compute_dtype = getattr(torch, config.compute_dtype)
    if world.size > 1 and replicated:
        replicate(scorer, world.device)
    elif world.size > 1:
        shard(scorer, config, world, trainable=trainable)
    elif trainable and adapters is not None:
        scorer.to(world.device)
    elif trainable:
        scorer.to(world.device).keep_masters(compute_dtype)
    else:
        freeze(scorer, compute_dtype, config.block_name)
        scorer.to(world.device)
    return scorer


def shard(scorer: TokenScorer, config: ModelConfig, world: World, *, trainable: bool) -> None:
    """Shard a scorer over all ranks; only rank 0's has weights."""
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
    """Freeze a scorer and make it compute in a dtype, on one rank without FSDP."""
    scorer.requires_grad_(False)
    # adapters stay in float32, whatever the model's dtype
    adapters = [] if scorer.adapters is None else scorer.adapters.parameters()
    stored = next(scorer.parameters()).dtype
    if torch.promote_types(stored, dtype) == stored:
        # narrowing loses nothing that a cast in every forward would keep, so it is done once
        store_parameters(scorer.model, dtype, kept=adapters)
    else:
        cast_in_forward(scorer.model, dtype, block_name, kept=adapters)
