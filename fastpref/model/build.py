"""From a model option to a scorer: loaded, tried, sharded."""

import copy
import logging
from typing import Any

import torch

from fastpref.batches.layouts import RowLayout
from fastpref.config import ModelConfig, PackingConfig
from fastpref.config.groups import FLASH_PACKAGES
from fastpref.distributed import World
from fastpref.errors import ConfigError
from fastpref.model.attention.backends import PackedAttention
from fastpref.model.attention.choice import choose_rows
from fastpref.model.checks import Findings, check_model
from fastpref.model.frozen import (
    compute_in,
    frozen_dtype,
    round_buffers,
    rounds_more_than_parameters,
    store_parameters,
)
from fastpref.model.liger import replace_layers
from fastpref.model.logit_path import LogitPath
from fastpref.model.parallelize import parallelize, send_weights, wrap_blocks
from fastpref.model.paths import resolve_model
from fastpref.model.positions import position_limit, trained_positions
from fastpref.model.scorer import TokenScorer
from fastpref.model.source import build_empty, load_model

logger = logging.getLogger("fastpref")


def load_causal_lm(
    config: ModelConfig, world: World, *, trainable: bool, beside_policy: bool = False
) -> Any:
    """The model on the CPU; without weights on every rank but 0.

    Policy and reference compute in the same dtype through the same code, however each is stored.

    Args:
        config: Of the model.
        world: Whoever computes.
        trainable: False for a reference, and for a model that scores alone.
        beside_policy: It is a reference: what of it is no parameter must be the policy's own.

    Raises:
        CheckpointError: there is none, or its weights do not fill it.
    """
    name = resolve_model(config.name_or_path)
    stored = loaded = config.policy_dtype
    if not trainable:
        stored = world.on_main(lambda: frozen_dtype(config, beside_policy=beside_policy))
        if not (beside_policy and rounds_more_than_parameters(name, stored, config.revision)):
            loaded = stored
    options: dict[str, Any] = {
        "dtype": getattr(torch, loaded),
        "attention": config.attention,
        "revision": config.revision,
    }
    loaded_model = world.only_on_main(lambda: load_model(name, archive=config.archive, **options))
    model: Any = loaded_model if world.is_main else build_empty(name, **options)
    store_parameters(model, getattr(torch, stored))
    keep_weights(model)
    return model


def keep_weights(model: Any) -> None:
    """Let RWKV compute without halving weights in place, which it does in evaluation mode alone.

    The halving, for the range of float16, changes no logit. The config that the model is exported
    with keeps what it said.
    """
    body = model.base_model
    if body is not model and getattr(body.config, "rescale_every", None):
        body.config = copy.copy(body.config)
        body.config.rescale_every = 0


def load_reference(config: ModelConfig, world: World, findings: Findings) -> Any:
    """The reference beside a policy of the same config, of which `findings` tell."""
    model = load_causal_lm(config, world, trainable=False, beside_policy=True)
    if findings.rounds_buffers:
        round_buffers(model, getattr(torch, config.compute_dtype))
    return model


def starts_exactly_equal(
    model: ModelConfig, findings: Findings, *, compile: bool, activation_checkpointing: bool
) -> bool:
    """Whether policy and reference give the same bits before the first update.

    Args:
        model: Options of both.
        findings: What was found out about them.
        compile, activation_checkpointing: How blocks are computed.
    """
    # rounding twice to the same dtype is rounding once, to another one it is not
    stored_equal = model.reference_dtype in (None, model.policy_dtype) or {
        model.reference_dtype,
        model.policy_dtype,
    } == {"float32", model.compute_dtype}
    # compiled with and without a backward, blocks are fused and so rounded in different places
    rounds_alike = not compile or (
        model.compute_dtype == "float32" and not activation_checkpointing
    )
    return findings.repeats_exactly and stored_equal and rounds_alike


def try_model(model: Any, config: ModelConfig, world: World, *, trainable: bool) -> Findings:
    """What rank 0 finds out about a model by computing a few tokens, on every rank.

    Args:
        model: What `load_causal_lm` returned.
        config: Its options.
        world: Whoever computes.
        trainable: False where it scores only.

    Raises:
        FastprefError: it cannot be trained, see `check_model`.
    """
    dtype = getattr(torch, config.compute_dtype)
    findings = world.on_main(
        lambda: check_model(model, dtype, config.block_name, trainable=trainable)
    )
    if findings.rounds_buffers:
        round_buffers(model, getattr(torch, config.compute_dtype))
    kept = sorted(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    if kept and trainable and config.compute_dtype != "float32":
        logger.info(
            "%s keeps %s in float32 beside 16 bits; here all parameters compute in %s "
            "(model.fsdp_policy_mp=null computes in model.policy_dtype)",
            type(model).__name__,
            ", ".join(kept),
            config.compute_dtype,
        )
    return findings


def check_positions(model: Any, longest: int) -> None:
    """Refuse sequences that run off a table of positions; warn of those a model was not made for.

    Args:
        model: Of transformers.
        longest: Tokens of the longest sequence.

    Raises:
        ConfigError: naming the largest max_length that fits.
    """
    limit = position_limit(model)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"max_length: the longest sequence has {longest} tokens, the model has positions for "
            f"{limit}; set max_length={limit} or less"
        )
    warn_beyond_training(model, longest)


def warn_beyond_training(model: Any, longest: int) -> None:
    """Say where sequences are longer than those that a model without a table was made for.

    Args:
        model: Of transformers.
        longest: Tokens of the longest sequence.
    """
    trained = trained_positions(model.config)
    if position_limit(model) is None and trained is not None and longest > trained:
        logger.warning(
            "the longest sequence has %d tokens, %s was made for %d by its config "
            "(max_position_embeddings): what it computes beyond them may be worth little",
            longest,
            type(model).__name__,
            trained,
        )


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
