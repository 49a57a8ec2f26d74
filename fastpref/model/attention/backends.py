"""Attention over the segments of a packed row, by the libraries that can compute it.

Every function takes queries (1, H, T, E), keys and values (1, K, T, E) with H a multiple of the K
key-value heads, a layout, and the layer's `ScoreRules`, and returns (1, T, H, E). `attend_in_math`
is the reference implementation.
"""

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache, partial
from importlib import import_module
from typing import Any

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from fastpref.batch import KeyUses, Segment, SegmentLayout
from fastpref.model.attention.groups import GroupedAttention, takes_flash_on_cpu
from fastpref.model.attention.rules import ScoreRules, attend_to_all

Attend = Callable[[Tensor, Tensor, Tensor, Any, ScoreRules], Tensor]
"""(query, key, value, prepared layout, rules) -> output."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedAttention:
    """A backend for attention over a packed row."""

    name: str
    """The value of `model.attention` that selects it."""
    attend: Attend
    prepare: Callable[[SegmentLayout], Any] = lambda layout: layout
    """Converts the layout to the form `attend` takes; called once per forward, not per layer."""
    gathers_keys: bool = False
    """Whether a shared prompt's keys and values are copied for each of its branches."""


def attend_in_math(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SegmentLayout,
    rules: ScoreRules,
    *,
    keeps_scores: bool = True,
) -> Tensor:
    """softmax(scale · q·kᵀ)·v, segment by segment, the softmax in at least float32; without
    `keeps_scores` the backward recomputes the scores."""
    attend = attend_to_all
    if not keeps_scores:
        attend = partial(checkpoint, attend_to_all, use_reentrant=False, preserve_rng_state=False)
    outputs = []
    for segment in layout.segments:
        keys, values = _keys_of(key, segment), _keys_of(value, segment)
        queries = query[:, :, segment.start : segment.stop]
        outputs.append(attend(queries, keys, values, rules))
    return torch.cat(outputs, dim=1)


class ByWindow:
    """A layout, and a backend's form of it for each sliding window, computed on first use."""

    def __init__(
        self, make: Callable[[SegmentLayout, int | None], Any], layout: SegmentLayout
    ) -> None:
        self.layout = layout
        self.made = cache(partial(make, layout))


def attend_in_groups(
    query: Tensor, key: Tensor, value: Tensor, prepared: ByWindow, rules: ScoreRules
) -> Tensor:
    """Torch's scaled-dot-product attention, one call per group of segments of similar length."""
    if rules.softcap is not None:
        # kept for every layer, the scores would outweigh all other activations
        return attend_in_math(query, key, value, prepared.layout, rules, keeps_scores=False)
    on_cpu = takes_flash_on_cpu(query, value)
    groups = prepared.made(rules.window)
    return GroupedAttention.apply(query, key, value, rules.sinks, groups, rules.scale, on_cpu)


def _keys_of(key: Tensor, segment: Segment) -> Tensor:
    """Keys (or values) that a segment attends to: those of its prefix, then its own."""
    own = key[:, :, segment.start : segment.stop]
    if segment.prefix_start == segment.prefix_stop:
        return own
    return torch.cat([key[:, :, segment.prefix_start : segment.prefix_stop], own], dim=2)


VarlenKernel = Callable[[Tensor, Tensor, Tensor, SegmentLayout, ScoreRules], Tensor]
"""(queries, keys, values, layout, rules) -> output, (tokens, H, E). The layout's offsets delimit
the segments; the causal mask is aligned at the last key."""


def attend_varlen(kernel: VarlenKernel) -> Attend:
    """Variable-length attention in one call; keys of a shared prefix are copied for each branch."""

    def attend(
        query: Tensor, key: Tensor, value: Tensor, layout: SegmentLayout, rules: ScoreRules
    ) -> Tensor:
        if rules.sinks is not None:
            raise ValueError("variable-length attention has no sinks")
        # squeeze, not x[0]: the backward of indexing would copy
        query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        if layout.keys is not None:
            key, value = (GatheredKeys.apply(x, layout.keys, layout.uses) for x in (key, value))
        return kernel(query, key, value, layout, rules).unsqueeze(0)

    return attend


class GatheredKeys(torch.autograd.Function):
    """Gather the keys (or values) of every segment, (K, heads, E), from the row's, (T, heads, E).

    To add in a fixed order, torch's own indexing would sort the indices in every layer's backward;
    here the layout has the order.
    """

    @staticmethod
    def forward(ctx: Any, row: Tensor, keys: Tensor, uses: KeyUses) -> Tensor:
        ctx.uses = uses
        return row.index_select(0, keys)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, None]:
        uses, (grad,) = ctx.uses, grads
        total = grad.index_select(0, uses.first)
        if len(uses.rounds) > 1:
            # a single addition is rounded once in any dtype; several are summed in float32
            total = total.float() if grad.dtype != torch.float64 else total
        rounds = zip(uses.tokens.split(uses.rounds), uses.places.split(uses.rounds), strict=True)
        for tokens, places in rounds:
            total.index_add_(0, tokens, grad.index_select(0, places).to(total.dtype))
        return total.to(grad.dtype), None, None


def flash_kernel(package: str) -> VarlenKernel:
    """`flash_attn_varlen_func` of FlashAttention 2, 3 or 4, each a package of its own; its causal
    mask is aligned at the last key since 2.1."""
    function = import_module(package).flash_attn_varlen_func
    # otherwise query gradients are accumulated in an arbitrary order, with other bits each time
    in_order = "deterministic" in inspect.signature(function).parameters
    options: dict[str, Any] = {"deterministic": True} if in_order else {}

    def kernel(q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout, rules: ScoreRules) -> Tensor:
        output = function(
            q,
            k,
            v,
            cu_seqlens_q=layout.query_offsets,
            cu_seqlens_k=layout.key_offsets,
            max_seqlen_q=layout.longest,
            max_seqlen_k=layout.longest_keys,
            softmax_scale=rules.scale,
            causal=True,
            window_size=(-1, -1) if rules.window is None else (rules.window - 1, 0),
            softcap=rules.softcap or 0.0,
            **options,
        )
        # versions 3 and 4 may return the log-sum-exp beside the output
        return output[0] if isinstance(output, tuple) else output

    return kernel


def torch_varlen_kernel() -> VarlenKernel:
    """`torch.nn.attention.varlen`: FlashAttention 2 inside torch; 16 bits only, no softcap."""
    function = import_module("torch.nn.attention.varlen").varlen_attn
    # torch 2.11 has no such option and accepts fewer key heads than query heads
    asks = "enable_gqa" in inspect.signature(function).parameters
    of_groups = {"enable_gqa": True} if asks else {}

    def kernel(q: Tensor, k: Tensor, v: Tensor, layout: SegmentLayout, rules: ScoreRules) -> Tensor:
        if rules.softcap is not None:
            raise ValueError("torch's variable-length attention has no softcap")
        before = -1 if rules.window is None else rules.window - 1
        options = {"window_size": (before, 0), "scale": rules.scale, **of_groups}
        offsets = layout.query_offsets, layout.key_offsets
        return function(q, k, v, *offsets, layout.longest, layout.longest_keys, **options)

    return kernel
