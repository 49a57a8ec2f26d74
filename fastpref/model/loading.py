"""Loads models onto the CPU, and checks them there before they are trained."""

import copy
import dataclasses
import logging
from typing import Any

import torch

from fastpref.config import ModelConfig
from fastpref.distributed import World
from fastpref.model.adapters.base import find_adapter_base
from fastpref.model.checks import Findings, check_lists, check_model
from fastpref.model.files.families import other_parts
from fastpref.model.files.paths import ModelSource, named_model
from fastpref.model.frozen import (
    frozen_dtype,
    round_buffers,
    rounds_more_than_parameters,
    store_parameters,
)
from fastpref.model.source import build_empty, build_meta, load_model

logger = logging.getLogger("fastpref")


def load_causal_lm(
    config: ModelConfig, world: World, *, trainable: bool, beside_policy: bool = False
) -> Any:
    """Load a model onto the CPU; only rank 0's has weights.

    Policy and reference compute in the same dtype through the same code, however each is stored.

    Args:
        trainable: False for a reference, and for a model that only scores.
        beside_policy: It is the reference of a policy, so its buffers must equal the policy's.

    Raises:
        CheckpointError: there is no such model, or its weights do not fill it.
    """
    source = named_model(config)
    stored = loaded = config.policy_dtype
    if not trainable:
        stored = world.on_main(lambda: frozen_dtype(config, beside_policy=beside_policy))
        if not (beside_policy and rounds_more_than_parameters(source, stored)):
            loaded = stored
    model = _load(source, config, world, loaded=loaded, stored=stored)
    if trainable:
        world.only_on_main(lambda: freeze_as_built(model, source))
    return model


def load_frozen_base(config: ModelConfig, world: World) -> tuple[Any, str | None]:
    """Load the frozen base of trained adapters onto the CPU, in its compute dtype.

    Args:
        config: The run's model options; if they name an adapter, it is the one to train on.
        world: The ranks; only rank 0's model has weights.

    Returns:
        The model; and the folder of the adapter that training starts from, None for new ones.

    Raises:
        CheckpointError: there is no such model, or its weights do not fill it.
    """
    base = find_adapter_base(config)
    stored = loaded = config.compute_dtype
    if rounds_more_than_parameters(base.source, stored):
        loaded = config.policy_dtype
    own = dataclasses.replace(config, archive=None)
    return _load(base.source, own, world, loaded=loaded, stored=stored), base.start


def _load(
    source: ModelSource, config: ModelConfig, world: World, *, loaded: str, stored: str
) -> Any:
    """Load a model in one dtype, and store its parameters in another."""
    options: dict[str, Any] = {
        "dtype": getattr(torch, loaded),
        "attention": config.attention,
    }
    loaded_model = world.only_on_main(lambda: load_model(source, archive=config.archive, **options))
    model: Any = loaded_model if world.is_main else build_empty(source, **options)
    store_parameters(model, getattr(torch, stored))
    keep_weights(model)
    return model


def freeze_as_built(model: Any, source: ModelSource) -> None:
    """Freeze the parameters that the family's own code freezes, such as an expert's bias in AFMoE.

    Transformers forgets it when it loads them, and ranks without weights have built the model.
    """
    built = build_meta(source, dtype=model.dtype)
    for name, parameter in built.named_parameters():
        if not parameter.requires_grad:
            model.get_parameter(name).requires_grad_(False)


def keep_weights(model: Any) -> None:
    """Keep RWKV from halving its weights in place, which it does in evaluation mode.

    The halving, meant for the range of float16, changes no logit. The exported config is unchanged.
    """
    body = model.base_model
    if body is not model and getattr(body.config, "rescale_every", None):
        body.config = copy.copy(body.config)
        body.config.rescale_every = 0


def load_reference(config: ModelConfig, world: World, findings: Findings) -> Any:
    """Load the reference beside a policy of the same config; `findings` are the policy's."""
    model = load_causal_lm(config, world, trainable=False, beside_policy=True)
    if findings.rounds_buffers:
        round_buffers(model, getattr(torch, config.compute_dtype))
    return model


def starts_exactly_equal(
    model: ModelConfig, findings: Findings, *, compile: bool, activation_checkpointing: bool
) -> bool:
    """Whether policy and reference are bit-identical before the first update."""
    # one in float32, one in the compute dtype: both end up rounded once, to the compute dtype
    stored_equal = model.reference_dtype in (None, model.policy_dtype) or {
        model.reference_dtype,
        model.policy_dtype,
    } == {"float32", model.compute_dtype}
    # blocks that are compiled with and without a backward are fused, and so rounded, differently
    rounds_alike = not compile or (
        model.compute_dtype == "float32" and not activation_checkpointing
    )
    return findings.repeats_exactly and stored_equal and rounds_alike


def try_model(
    model: Any, config: ModelConfig, world: World, *, trainable: bool, frozen: bool = False
) -> Findings:
    """Check a model on rank 0 by computing a few tokens; the findings go to every rank.

    Args:
        trainable: False if it only scores.
        frozen: Only adapters in it are trained.

    Raises:
        FastprefError: it cannot be trained, see `check_model` and `check_lists`.
    """
    dtype = getattr(torch, config.compute_dtype)
    findings = world.on_main(
        lambda: check_model(model, dtype, config.block_name, trainable=trainable)
    )
    if world.size > 1 and trainable and not frozen:
        world.on_main(lambda: check_lists(model, findings.path, config.block_name))
    if findings.rounds_buffers:
        round_buffers(model, dtype)
    parts = other_parts(model)
    if parts and trainable:
        logger.info(
            "%s: what reads text is trained; %s, which rows of text do not go through, %s not "
            "loaded, and an export has them as the source does",
            type(model).__name__,
            ", ".join(parts),
            "is" if len(parts) == 1 else "are",
        )
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
