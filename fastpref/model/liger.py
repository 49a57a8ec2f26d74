"""Fused kernels for a block's memory-bound operations, where they compute the same: RMS norms by
torch's own, rotary embeddings and SwiGLU layers by Liger's.

Torch's norm costs the host less time than Liger's, and small micro-batches are host-bound.
"""

import copy
import logging
import sys
from collections.abc import Callable
from functools import partial
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpref.distributed import World
from fastpref.errors import ConfigError, first_line, is_shortage

logger = logging.getLogger("fastpref")

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
"""Model types whose norms multiply by a weight around 1, whose MLPs are SwiGLU and whose rotary
embedding rotates the whole head dimension, first half against second half."""
ROTATION = "apply_rotary_pos_emb"
"""Name of transformers' function that rotates queries and keys."""
_TOLERANCE = 1e-4


def choose_liger(wish: str, model: Any, world: World, *, compiled: bool) -> bool:
    """Whether a model's layers run as fused kernels; rank 0 finds out and logs the choice.

    Args:
        wish: "auto", "true" or "false": auto uses them on a GPU if they compute the same as the
            model's own layers, unless blocks are compiled, which fuses the same operations.
        model: A causal LM of transformers, on the CPU; only rank 0's has weights.
        compiled: Whether blocks are compiled.

    Raises:
        ConfigError: "true", and they cannot be used.
    """
    if wish == "false" or (wish == "auto" and (world.device.type != "cuda" or compiled)):
        return False
    obstacle = world.on_main(lambda: _obstacle(model, world.device))
    if not obstacle:
        logger.info("fused RMS norms; rotary embeddings and SwiGLU layers by liger-kernel")
        return True
    if wish == "true":
        raise ConfigError(f"model.liger=true: {obstacle}; set model.liger=auto")
    logger.info("layers without liger-kernel: %s", obstacle)
    return False


def replace_layers(model: nn.Module) -> None:
    """Replace a model's norms, SwiGLU layers and rotary embeddings by fused kernels, in place.

    The rotation is a function of the family's Python module, so it is replaced for all models of
    the family that compute on a GPU.
    """
    for module in model.modules():
        forward = _fused_forward(module)
        if forward is not None:
            module.forward = forward
    family: Any = sys.modules[type(model).__module__]
    plain = getattr(family, ROTATION, None)
    if plain is not None and not isinstance(plain, _Rotation):
        setattr(family, ROTATION, _Rotation(plain))


def _obstacle(model: Any, device: torch.device) -> str:
    """Why fused kernels cannot be used, "" if they can; found out by computing with and without."""
    if device.type != "cuda":
        return "it runs on a GPU only"
    if find_spec("liger_kernel") is None:
        return "the package liger-kernel is not installed"
    if model.config.model_type not in FAMILIES:
        return f"{model.config.model_type} is none of {', '.join(FAMILIES)}"
    layers = (module for module in model.modules() if is_norm(module) or is_swiglu(module))
    one_of_each = {type(layer): layer for layer in layers}
    measures = {kind.__name__: partial(_difference, x, device) for kind, x in one_of_each.items()}
    plain = getattr(sys.modules[type(model).__module__], ROTATION, None)
    measures[ROTATION] = partial(_difference_of_rotation, getattr(plain, "plain", plain), device)
    for name, measure in measures.items():
        try:
            difference = measure()
        except Exception as error:
            if is_shortage(error):
                raise
            return f"{name} failed: {first_line(error)}"
        if not difference <= _TOLERANCE:
            return f"{name} is off by {difference:.1e}"
    return ""


def _difference(layer: Any, device: torch.device) -> float:
    """Largest relative difference of value and gradient between a layer and its replacement."""
    width = layer.weight.shape[0] if is_norm(layer) else layer.gate_proj.in_features
    plain = copy.deepcopy(layer).to(device=device, dtype=torch.float32).requires_grad_()
    replaced: Any = copy.deepcopy(plain)
    # the layer alone: `replace_layers` would exchange the rotation of the whole family
    replaced.forward = _fused_forward(replaced)
    generator = torch.Generator().manual_seed(0)
    hidden_BLD = torch.randn(2, 5, width, generator=generator).to(device)
    return _largest_difference(
        *(_value_and_gradients(module, hidden_BLD) for module in (plain, replaced))
    )


def _difference_of_rotation(plain: Any, device: torch.device) -> float:
    """Largest relative difference of rotated queries and keys and of their gradients."""
    generator = torch.Generator().manual_seed(0)
    shapes = (1, 4, 5, 16), (1, 2, 5, 16), (1, 5, 8)
    query, key, angles = (torch.randn(s, generator=generator).to(device) for s in shapes)
    angles = torch.cat([angles, angles], dim=-1)
    results = []
    rotations: tuple[Callable[..., Any], ...] = (plain, _rotate)
    for rotate in rotations:
        # a leaf may not be rotated in place
        leaves = query.clone().requires_grad_(), key.clone().requires_grad_()
        rotated = rotate(*(leaf * 1 for leaf in leaves), angles.cos(), angles.sin())
        grads = torch.autograd.grad(rotated, leaves, [torch.ones_like(x) for x in rotated])
        results.append([*rotated, *grads])
    return _largest_difference(*results)


def _largest_difference(theirs: list[Tensor], ours: list[Tensor]) -> float:
    pairs = zip(theirs, ours, strict=True)
    return torch.stack([(our - their).norm() / their.norm() for their, our in pairs]).max().item()


def _value_and_gradients(layer: nn.Module, hidden_BLD: Tensor) -> list[Tensor]:
    leaf = hidden_BLD.clone().requires_grad_()
    value = layer(leaf)
    upstream = torch.linspace(-1, 1, value.numel(), device=value.device).view(value.shape)
    return [value, *torch.autograd.grad(value, [leaf, *layer.parameters()], upstream)]


class _Rotation:
    """A family's rotation of queries and keys, done by Liger's kernel on a GPU."""

    def __init__(self, plain: Callable[..., tuple[Tensor, Tensor]]) -> None:
        self.plain = plain

    def __call__(
        self, query: Tensor, key: Tensor, cos: Tensor, sin: Tensor, *args: Any, **options: Any
    ) -> tuple[Tensor, Tensor]:
        if query.is_cuda and not args and not options:
            return _rotate(query, key, cos, sin)
        return self.plain(query, key, cos, sin, *args, **options)


def _rotate(query: Tensor, key: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    """Liger's rotation; in place for tensors that lie in memory as (B, L, heads, E)."""
    from liger_kernel.ops import LigerRopeFunction

    return LigerRopeFunction.apply(query, key, cos, sin)


def _fused_forward(module: nn.Module) -> Callable[[Tensor], Tensor] | None:
    if is_norm(module):
        return partial(_rms_norm, module)
    return partial(_swiglu, module) if is_swiglu(module) else None


def is_norm(module: nn.Module) -> bool:
    """Whether a module is an RMS norm that a fused one can replace."""
    return type(module).__name__.endswith("RMSNorm") and hasattr(module, "variance_epsilon")


def is_swiglu(module: nn.Module) -> bool:
    """Whether a module is an MLP gated by a SiLU."""
    projections = ("gate_proj", "up_proj", "down_proj")
    has_silu = getattr(getattr(module, "config", None), "hidden_act", None) == "silu"
    return has_silu and all(hasattr(module, name) for name in projections)


def _rms_norm(module: Any, hidden: Tensor) -> Tensor:
    return F.rms_norm(hidden, module.weight.shape, module.weight, module.variance_epsilon)


def _swiglu(module: Any, hidden: Tensor) -> Tensor:
    from liger_kernel.ops import LigerSiLUMulFunction

    gated = LigerSiLUMulFunction.apply(module.gate_proj(hidden), module.up_proj(hidden))
    return module.down_proj(gated)
