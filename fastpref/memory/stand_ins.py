"""What computes on a GPU by kernels of its own, without memory: the same tensors kept and made.

On the meta device torch would take attention, norms and SwiGLU layers apart, and keep what no
kernel keeps.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.model.attention.backends import PackedAttention
from fastpref.model.attention.rules import ScoreRules
from fastpref.model.liger import is_norm, is_swiglu
from fastpref.model.quantize import linear_layers


class _Attention(torch.autograd.Function):
    """Keeps query, key, value, output and a normalizer of every query, as flash attention does."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        B, H, L, _ = query.shape
        output = query.new_empty(B, L, H, value.shape[-1])
        ctx.save_for_backward(
            query, key, value, output, query.new_empty(B, H, L, dtype=torch.float32)
        )
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(x) for x in ctx.saved_tensors[:3])


class _Gathered(torch.autograd.Function):
    """Keys or values of every segment from the row's."""

    @staticmethod
    def forward(ctx: Any, row: Tensor, share: float) -> Tensor:
        ctx.shape = row.shape
        B, heads, L, E = row.shape
        return row.new_empty(B, heads, int(L * share), E)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0].new_empty(ctx.shape), None


def _attend(
    query: Tensor, key: Tensor, value: Tensor, keys_per_token: Any, rules: ScoreRules
) -> Tensor:
    if keys_per_token:
        key, value = (_Gathered.apply(x, keys_per_token) for x in (key, value))
    return _Attention.apply(query, key, value)


ATTENTION = PackedAttention(name="counted", attend=_attend)
"""Takes, in place of a layout, keys gathered for every token; 0: none are gathered."""


class _Norm(torch.autograd.Function):
    """Keeps its input and a factor of every token."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor, weight: Tensor) -> Tensor:
        factors = hidden.new_empty(*hidden.shape[:-1], 1, dtype=torch.float32)
        ctx.save_for_backward(hidden, weight, factors)
        return torch.empty_like(hidden)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        hidden, weight, _ = ctx.saved_tensors
        return torch.empty_like(hidden), torch.empty_like(weight)


class _GatedSilu(torch.autograd.Function):
    """Keeps its inputs, and writes their gradients in their place."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return gate, up


class _FourBits(nn.Linear):
    """Keeps no more than a frozen linear layer; not the class beside which adapters have an
    arithmetic of ours, so peft's own layers stand beside it, as beside bitsandbytes'."""


def stand_in_four_bits(model: Any, block_name: str | None) -> None:
    """What `fastpref.model.quantize` replaces, in place; before adapters are put beside it.

    Args:
        model: On the meta device.
        block_name: Class of its blocks; None: found from the model.
    """
    for _, _, layer in linear_layers(model, block_name):
        layer.__class__ = _FourBits


def replace_layers(model: nn.Module) -> None:
    """What `fastpref.model.liger` replaces on a GPU, in place."""
    for module in model.modules():
        if is_norm(module):
            module.forward = partial(_norm, module)
        elif is_swiglu(module):
            module.forward = partial(_swiglu, module)


def _norm(module: Any, hidden: Tensor) -> Tensor:
    return _Norm.apply(hidden, module.weight)


def _swiglu(module: Any, hidden: Tensor) -> Tensor:
    return module.down_proj(_GatedSilu.apply(module.gate_proj(hidden), module.up_proj(hidden)))
