"""Attention over the segments of a packed row, by the libraries that can compute it.

Every function takes queries (1, H, T, E), keys and values (1, K, T, E) with H a multiple of the K
key-value heads, a layout, the scale of the scores and their softcap (c · tanh(score / c), Gemma 2),
and returns (1, T, H, E). `attend_in_math` is the definition.
"""

import inspect
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from importlib import import_module
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.batch import KeyUses, Segment, SegmentLayout
from fastpref.model.attention.groups import (
    GroupedAttention,
    SegmentGroup,
    group_segments,
    takes_flash_on_cpu,
)

Attend = Callable[[Tensor, Tensor, Tensor, Any, float, float | None], Tensor]
"""(query, key, value, prepared layout, scale, softcap) -> attention."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PackedAttention:
    """One way to compute attention over a packed row."""

    name: str
    """As `model.attention` names it."""
    attend: Attend
    prepare: Callable[[SegmentLayout], Any] = lambda layout: layout
    """What `attend` takes in place of the layout; called once a forward, not once a layer."""


def attend_in_math(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    layout: SegmentLayout,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Segment by segment: softmax(scale · q·kᵀ)·v, the softmax in float32 or more."""
    outputs = []
    for segment, keys in _segments(layout, key):
        values = _keys_of(value, segment)
        queries = query[:, :, segment.start : segment.stop]
        outputs.append(attend_to_all(queries, keys, values, scale=scale, softcap=softcap))
    return torch.cat(outputs, dim=1)


def attend_to_all(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    *,
    scale: float,
    softcap: float | None,
    mask: Tensor | None = None,
) -> Tensor:
    """Attention of R queries to K keys with a softcap, in plain torch.

    Args:
        query, key, value: (B, H, R, E), (B, heads, K, E) twice.
        scale: Of the scores.
        softcap: c in c · tanh(score / c), or None.
        mask: Broadcast to (B, H, R, K), true where a query may attend; None: the last query to
            every key, the one before to all but the last, and so on.

    Returns:
        (B, R, H, E).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    scores = query @ key.transpose(2, 3)
    scores = scores.to(torch.promote_types(scores.dtype, torch.float32)) * scale
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    if mask is None:
        R, K = scores.shape[2:]
        mask = scores.new_ones(R, K, dtype=torch.bool).tril(K - R)
    probabilities = scores.masked_fill(~mask, torch.finfo(scores.dtype).min).softmax(-1)
    return (probabilities.to(value.dtype) @ value).transpose(1, 2)


class PreparedSegments(NamedTuple):
    """What `attend_in_groups` takes."""

    layout: SegmentLayout
    groups: tuple[SegmentGroup, ...]


def prepare_segments(layout: SegmentLayout) -> PreparedSegments:
    """Segments of like length together."""
    return PreparedSegments(layout, group_segments(layout))


def attend_in_groups(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    prepared: PreparedSegments,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Torch's scaled-dot-product attention, one call a group of segments of like length."""
    if softcap is not None:
        return attend_in_math(query, key, value, prepared.layout, scale, softcap)
    on_cpu = takes_flash_on_cpu(query, value)
    return GroupedAttention.apply(query, key, value, prepared.groups, scale, on_cpu)


def _segments(layout: SegmentLayout, key: Tensor) -> Iterator[tuple[Segment, Tensor]]:
    return ((segment, _keys_of(key, segment)) for segment in layout.segments)


def _keys_of(key: Tensor, segment: Segment) -> Tensor:
    """Keys (or values) that a segment attends to: its prefix's, then its own."""
    own = key[:, :, segment.start : segment.stop]
    if segment.prefix_start == segment.prefix_stop:
        return own
    return torch.cat([key[:, :, segment.prefix_start : segment.prefix_stop], own], dim=2)


VarlenKernel = Callable[[Tensor, Tensor, Tensor, SegmentLayout, float, float | None], Tensor]
"""(queries, keys, values, layout, scale, softcap) -> output, (tokens, H, E), segment by segment as
the layout's offsets say; causal, aligned at the end of the keys."""


def attend_varlen(kernel: VarlenKernel) -> Attend:
    """Variable-length attention in one call; keys that branches share are gathered for each."""

    def attend(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        layout: SegmentLayout,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        # the gradient of an index would be a copy
        query, key, value = (x.squeeze(0).transpose(0, 1) for x in (query, key, value))
        if layout.keys is not None:
            key, value = (GatheredKeys.apply(x, layout.keys, layout.uses) for x in (key, value))
        return kernel(query, key, value, layout, scale, softcap).unsqueeze(0)

    return attend


class GatheredKeys(torch.autograd.Function):
    """Keys (or values) of every segment, (K, heads, E), from the row's, (T, heads, E).

    Torch's own indexing would sort the places in every layer's backward to add in a fixed order;
    the layout knows the order.
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
            # one addition is rounded once in any dtype
            total = total.float() if grad.dtype != torch.float64 else total
        rounds = zip(uses.tokens.split(uses.rounds), uses.places.split(uses.rounds), strict=True)
        for tokens, places in rounds:
            total.index_add_(0, tokens, grad.index_select(0, places).to(total.dtype))
        return total.to(grad.dtype), None, None


def flash_kernel(version: int) -> VarlenKernel:
    """`flash_attn_varlen_func` of FlashAttention 2, 3 or 4; its causal mask is aligned at the end
    since 2.1."""
    module = {2: "flash_attn", 3: "flash_attn_interface", 4: "flash_attn.cute"}[version]
    function = import_module(module).flash_attn_varlen_func

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: SegmentLayout,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        output = function(
            q,
            k,
            v,
            cu_seqlens_q=layout.query_offsets,
            cu_seqlens_k=layout.key_offsets,
            max_seqlen_q=layout.longest,
            max_seqlen_k=layout.longest_keys,
            softmax_scale=scale,
            causal=True,
            softcap=softcap or 0.0,
        )
        # versions 3 and 4 may return the log-sum-exp beside the output
        return output[0] if isinstance(output, tuple) else output

    return kernel


def torch_varlen_kernel() -> VarlenKernel:
    """`torch.nn.attention.varlen`: FlashAttention 2 inside torch, 16 bits, no softcap."""
    function = import_module("torch.nn.attention.varlen").varlen_attn
    accepted = inspect.signature(function).parameters
    # torch 2.10 had is_causal; what came after says the same with a window
    causal: dict[str, Any] = (
        {"window_size": (-1, 0)} if "window_size" in accepted else {"is_causal": True}
    )

    def kernel(
        q: Tensor,
        k: Tensor,
        v: Tensor,
        layout: SegmentLayout,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        if softcap is not None:
            raise ValueError("torch's variable-length attention has no softcap")
        options = dict(causal, scale=scale)
        if "enable_gqa" in accepted:
            options["enable_gqa"] = True
        elif q.shape[1] != k.shape[1]:
            k, v = (x.repeat_interleave(q.shape[1] // x.shape[1], dim=1) for x in (k, v))
        offsets = layout.query_offsets, layout.key_offsets
        return function(q, k, v, *offsets, layout.longest, layout.longest_keys, **options)

    return kernel


def prepare_flex(layout: SegmentLayout) -> Any:
    """The block mask of FlexAttention: own segment's earlier tokens, and the segment's prefix."""
    flex = import_module("torch.nn.attention.flex_attention")
    device = layout.query_offsets.device
    table = torch.tensor(layout.segments, device=device)
    T = layout.segments[-1].stop
    segment_of = torch.repeat_interleave(table[:, 1] - table[:, 0], output_size=T)
    prefix_start, prefix_stop = table[segment_of, 2], table[segment_of, 3]

    def attends(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (segment_of[q] == segment_of[k]) & (k <= q)
        return own | ((k >= prefix_start[q]) & (k < prefix_stop[q]))

    return flex.create_block_mask(attends, None, None, T, T, device=device)


def flex_attend() -> Attend:
    """FlexAttention, compiled where it runs on a GPU."""
    flex_attention = import_module("torch.nn.attention.flex_attention").flex_attention
    compiled = torch.compile(flex_attention, dynamic=True)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, mask: Any, scale: float, softcap: float | None
    ) -> Tensor:
        def cap(score: Tensor, *_: Tensor) -> Tensor:
            assert softcap is not None
            return softcap * torch.tanh(score / softcap)

        function = compiled if query.is_cuda else flex_attention
        output = function(
            query,
            key,
            value,
            score_mod=None if softcap is None else cap,
            block_mask=mask,
            scale=scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output.transpose(1, 2)

    return attend
