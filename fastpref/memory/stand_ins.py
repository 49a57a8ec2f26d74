"""Stand-ins on the meta device for fused GPU kernels, which save and allocate the same tensors.

On the meta device torch would decompose attention, norms and SwiGLU layers, and save tensors for
the backward that the fused kernels do not.
"""

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpref.batch import SegmentLayout
from fastpref.model.adapters.quantize import quantizable_layers
from fastpref.model.attention.backends import GatheredKeys, PackedAttention
from fastpref.model.attention.rules import ScoreRules
from fastpref.model.liger import is_norm, is_swiglu

ONE_HEAD_OF_KEYS = "2.14"
"""First torch version whose kernels accept one KV head for all query heads without `enable_gqa`."""


class _Attention(torch.autograd.Function):
    """Saves query, key, value, output and one log-sum-exp per query, as flash attention does."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, like_query: bool) -> Tensor:
        B, H, L, _ = query.shape
        output = query.new_empty(B, L, H, value.shape[-1])
        if like_query and query.shape[-1] == value.shape[-1]:
            # torch's own kernels: output with the memory layout of the query
            output = torch.empty_like(query).transpose(1, 2)
        ctx.save_for_backward(
            query, key, value, output, query.new_empty(B, H, L, dtype=torch.float32)
        )
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None


class CountedAttention:
    """Attention over packed rows that allocates like the real one and computes nothing.

    Args:
        gathers_keys: Whether keys shared by branches are copied for each branch, as variable-length
            attention requires.
    """

    def __init__(self, *, gathers_keys: bool) -> None:
        self._gathers_keys = gathers_keys
        self.packed = PackedAttention(name="counted", attend=self._attend)
        self.was_asked = False
        """Whether any layer called it."""

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Any, rules: ScoreRules
    ) -> Tensor:
        self.was_asked = True
        # layers with sinks do not use variable-length attention
        if self._gathers_keys and rules.sinks is None and layout.has_branches:
            key, value = (_gathered(x, layout) for x in (key, value))
        return _Attention.apply(query, key, value, False)


def _gathered(x: Tensor, layout: SegmentLayout) -> Tensor:
    """Gather keys or values of all segments, (1, heads, K, E), from the row's (1, heads, T, E)."""
    rows = GatheredKeys.apply(x.squeeze(0).transpose(0, 1), layout.keys, layout.uses)
    return rows.transpose(0, 1).unsqueeze(0)


@contextmanager
def kernels() -> Iterator[None]:
    """Within the context, attention and autocast on the meta device behave as on a GPU."""
    attend, real_autocast = F.scaled_dot_product_attention, torch.autocast

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        # torch would decompose it and save the scores, which no kernel does
        same_heads = query.shape[1:2] == key.shape[1:2] or options.get("enable_gqa", False)
        one_for_all = key.shape[1:2] == (1,) and torch.__version__ >= ONE_HEAD_OF_KEYS
        if query.dim() != 4 or not (same_heads or one_for_all):
            # no fused kernel supports these shapes
            return attend(query, key, value, *args, **options)
        return _Attention.apply(query, key, value, True).transpose(1, 2)

    def autocast(device_type: str, *args: Any, **options: Any) -> Any:
        # peft's adapters of experts disable autocast, which torch does not support on meta
        is_meta = device_type == "meta"
        return nullcontext() if is_meta else real_autocast(device_type, *args, **options)

    # patched: a torch function mode is not active while checkpointed blocks are recomputed
    replaced: Any = F, torch
    replaced[0].scaled_dot_product_attention, replaced[1].autocast = attention, autocast
    try:
        yield
    finally:
        replaced[0].scaled_dot_product_attention, replaced[1].autocast = attend, real_autocast


class _Recorded(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, trained: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[None, None]:
        return None, None


def recorded(x: Tensor) -> Tensor:
    """`x` as if it required a gradient, without computing one."""
    return _Recorded.apply(x, x.new_empty(()).requires_grad_())


class _Norm(torch.autograd.Function):
    """Saves its input, the weight and one factor per token, as a fused norm does."""

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
    """Saves its inputs and overwrites them with their gradients, as a fused SwiGLU does."""

    @staticmethod
    def forward(ctx: Any, gate: Tensor, up: Tensor) -> Tensor:
        ctx.save_for_backward(gate, up)
        return torch.empty_like(gate)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor]:
        gate, up = ctx.saved_tensors
        return gate, up


class _FourBits(nn.Linear):
    """Saves no more than a frozen linear layer. A class of its own, so that adapters use peft's
    layers, as with bitsandbytes', not our own replacement for `nn.Linear`."""


def stand_in_four_bits(model: Any, block_name: str | None) -> None:
    """Replace the layers that `model/adapters/quantize.py` quantizes, in place, before adapters.

    Args:
        model: Model on the meta device.
    """
    for _, _, layer in quantizable_layers(model, block_name):
        layer.__class__ = _FourBits


def replace_layers(model: nn.Module) -> None:
    """Replace, in place, the layers that `fastpref.model.liger` replaces on a GPU."""
    for module in model.modules():
        if is_norm(module):
            module.forward = partial(_norm, module)
        elif is_swiglu(module):
            module.forward = partial(_swiglu, module)


def _norm(module: Any, hidden: Tensor) -> Tensor:
    return _Norm.apply(hidden, module.weight)


def _swiglu(module: Any, hidden: Tensor) -> Tensor:
    return module.down_proj(_GatedSilu.apply(module.gate_proj(hidden), module.up_proj(hidden)))
