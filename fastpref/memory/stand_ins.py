"""What computes on a GPU by kernels of its own, without memory: the same tensors kept and made.

On the meta device torch would take attention, norms and SwiGLU layers apart, and keep what no
kernel keeps.
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
"""Of torch, since when its kernels take one head of keys for all of queries, unasked."""


class _Attention(torch.autograd.Function):
    """Keeps query, key, value, output and a normalizer of every query, as flash attention does."""

    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor, like_query: bool) -> Tensor:
        B, H, L, _ = query.shape
        output = query.new_empty(B, L, H, value.shape[-1])
        if like_query and query.shape[-1] == value.shape[-1]:
            # torch's own: as the query lies in memory
            output = torch.empty_like(query).transpose(1, 2)
        ctx.save_for_backward(
            query, key, value, output, query.new_empty(B, H, L, dtype=torch.float32)
        )
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        return *(torch.empty_like(x) for x in ctx.saved_tensors[:3]), None


class CountedAttention:
    """Attention over packed rows.

    Args:
        gathers_keys: Whether keys that branches share are gathered for each, as variable-length
            attention takes them.
    """

    def __init__(self, *, gathers_keys: bool) -> None:
        self._gathers_keys = gathers_keys
        self.packed = PackedAttention(name="counted", attend=self._attend)
        self.was_asked = False
        """Some layer computed with it."""

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, layout: Any, rules: ScoreRules
    ) -> Tensor:
        self.was_asked = True
        # variable-length attention has no sinks
        if self._gathers_keys and rules.sinks is None and layout.has_branches:
            key, value = (_gathered(x, layout) for x in (key, value))
        return _Attention.apply(query, key, value, False)


def _gathered(x: Tensor, layout: SegmentLayout) -> Tensor:
    """Keys or values of every segment, (1, heads, K, E), from the row's, (1, heads, T, E)."""
    rows = GatheredKeys.apply(x.squeeze(0).transpose(0, 1), layout.keys, layout.uses)
    return rows.transpose(0, 1).unsqueeze(0)


@contextmanager
def kernels() -> Iterator[None]:
    """While entered, what torch does otherwise on the meta device, or not at all, is done as on
    others."""
    attend, real_autocast = F.scaled_dot_product_attention, torch.autocast

    def attention(query: Tensor, key: Tensor, value: Tensor, *args: Any, **options: Any) -> Tensor:
        # otherwise taken apart into scores, which no kernel keeps
        same_heads = query.shape[1:2] == key.shape[1:2] or options.get("enable_gqa", False)
        one_for_all = key.shape[1:2] == (1,) and torch.__version__ >= ONE_HEAD_OF_KEYS
        if query.dim() != 4 or not (same_heads or one_for_all):
            # no kernel takes these
            return attend(query, key, value, *args, **options)
        return _Attention.apply(query, key, value, True).transpose(1, 2)

    def autocast(device_type: str, *args: Any, **options: Any) -> Any:
        # peft's adapters of experts turn it off, which torch does not know there
        is_meta = device_type == "meta"
        return nullcontext() if is_meta else real_autocast(device_type, *args, **options)

    # and not by a mode, which torch leaves while blocks are computed again in the backward
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
    """The same, as if what it was made of were trained, and without its gradient."""
    return _Recorded.apply(x, x.new_empty(()).requires_grad_())


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
    """What `model/adapters/quantize.py` replaces, in place; before adapters are put beside it.

    Args:
        model: On the meta device.
    """
    for _, _, layer in quantizable_layers(model, block_name):
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
