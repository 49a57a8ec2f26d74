"""Liger's kernels for what a block computes beside attention: RMS norms and SwiGLU layers."""

import copy
import logging
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.distributed import World
from fastpref.errors import ConfigError, first_line

logger = logging.getLogger("fastpref")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose norms multiply by a weight around 1 and whose MLPs are SwiGLU."""
_TOLERANCE = 1e-4


def choose_liger(wish: str, model: Any, world: World, *, compiled: bool) -> bool:
    """Whether a model's layers are to run as Liger's kernels; rank 0 finds out and says so.

    Args:
        wish: "auto", "true" or "false": auto takes them on a GPU where they compute the same as
            the model's own layers and nothing is compiled, which fuses the same operations.
        model: Of transformers, on the CPU; only rank 0's has weights.
        world: Whoever computes.
        compiled: Whether blocks are compiled.

    Raises:
        ConfigError: "true", and they cannot be taken.
    """
    if wish == "false" or (wish == "auto" and (world.device.type != "cuda" or compiled)):
        return False
    obstacle = world.on_main(lambda: _obstacle(model, world.device))
    if not obstacle:
        logger.info("RMS norms and SwiGLU layers by liger-kernel")
        return True
    if wish == "true":
        raise ConfigError(f"model.liger=true: {obstacle}; set model.liger=auto")
    logger.info("layers without liger-kernel: %s", obstacle)
    return False


def replace_layers(model: nn.Module) -> None:
    """Let every RMS norm and SwiGLU layer of a model compute with Liger's kernels, in place."""
    for module in model.modules():
        forward = _liger_forward(module)
        if forward is not None:
            module.forward = forward


def _obstacle(model: Any, device: torch.device) -> str:
    """Why Liger's kernels cannot be taken, "" if they can; found out by doing both."""
    if device.type != "cuda":
        return "it runs on a GPU only"
    if find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed"
    if model.config.model_type not in FAMILIES:
        return f"{model.config.model_type} is none of {', '.join(FAMILIES)}"
    for layer in _one_of_each(model):
        try:
            difference = _difference(layer, device)
        except Exception as error:
            return f"{type(layer).__name__} failed: {first_line(error)}"
        if not difference <= _TOLERANCE:
            return f"{type(layer).__name__} is off by {difference:.1e}"
    return ""


def _one_of_each(model: nn.Module) -> list[Any]:
    layers = [module for module in model.modules() if _is_norm(module) or _is_swiglu(module)]
    return list({type(layer): layer for layer in layers}.values())


def _difference(layer: Any, device: torch.device) -> float:
    """Largest relative difference of value and gradient between a layer and its replacement."""
    width = layer.weight.shape[0] if _is_norm(layer) else layer.gate_proj.in_features
    plain = copy.deepcopy(layer).to(device=device, dtype=torch.float32).requires_grad_()
    replaced = copy.deepcopy(plain)
    replace_layers(replaced)
    generator = torch.Generator().manual_seed(0)
    hidden_BLD = torch.randn(2, 5, width, generator=generator).to(device)
    results = [_value_and_gradients(module, hidden_BLD) for module in (plain, replaced)]
    differences = [
        (ours - theirs).norm() / theirs.norm() for theirs, ours in zip(*results, strict=True)
    ]
    return torch.stack(differences).max().item()


def _value_and_gradients(layer: nn.Module, hidden_BLD: Tensor) -> list[Tensor]:
    leaf = hidden_BLD.clone().requires_grad_()
    value = layer(leaf)
    upstream = torch.linspace(-1, 1, value.numel(), device=value.device).view(value.shape)
    return [value, *torch.autograd.grad(value, [leaf, *layer.parameters()], upstream)]


def _liger_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    if _is_norm(module):
        return partial(_rms_norm, module)
    return partial(_swiglu, module) if _is_swiglu(module) else None


def _is_norm(module: nn.Module) -> bool:
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def _is_swiglu(module: nn.Module) -> bool:
    projections = ("gate_proj", "up_proj", "down_proj")
    has_silu = getattr(getattr(module, "config", None), "hidden_act", None) == "silu"
    return has_silu and all(hasattr(module, name) for name in projections)


def _rms_norm(module: Any, hidden: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_rms_norm

    return liger_rms_norm(hidden, module.weight, module.variance_epsilon, 0.0, "llama", False)


def _swiglu(module: Any, hidden: Tensor) -> Tensor:
    from liger_kernel.transformers.functional import liger_swiglu

    return module.down_proj(liger_swiglu(module.gate_proj(hidden), module.up_proj(hidden)))
