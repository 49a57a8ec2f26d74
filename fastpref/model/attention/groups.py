"""Packed attention by torch's own kernels, over groups of segments of similar length.

One call per segment would cost more than the attention itself for short segments, and autograd
would allocate a gradient as long as the row for every slice. Both are avoided here.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastpref.model.attention.rules import ScoreRules, attend_to_all
from fastpref.model.attention.segments import SegmentGroup


def takes_flash_on_cpu(query: Tensor, value: Tensor) -> bool:
    """Whether torch's flash kernel for CPUs can be called: it is not public, and keys and values
    must have the same head dimension."""
    is_there = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    return is_there and query.device.type == "cpu" and query.shape[-1] == value.shape[-1]


class GroupedAttention(torch.autograd.Function):
    """Torch's attention, group by group, as one node of the autograd graph.

    The backward adds in a fixed order. With the CPU flash kernel it is that kernel's own; otherwise
    each group's attention is recomputed in its math form and differentiated, so that only one
    group's scores are in memory at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        sinks: Tensor | None,
        groups: tuple[SegmentGroup, ...],
        scale: float,
        flash_on_cpu: bool,
    ) -> Tensor:
        _, H, T, _ = query.shape
        output_THE = query.new_empty(T, H, value.shape[-1])
        attend = _attend_on_cpu if flash_on_cpu else _attend
        normalizers = []
        for group in groups:
            query_SHRE, key_SHKE, value_SHKE = _take_all((query, key, value), group)
            inside = _in_dtype(group, query.dtype)
            output, lse = attend(query_SHRE, key_SHKE, value_SHKE, inside, scale, sinks)
            output_THE.index_copy_(0, group.places, _kept(output, group))
            normalizers += [] if lse is None else [lse]
        output = output_THE[None]
        ctx.save_for_backward(query, key, value, output, sinks, *normalizers)
        ctx.groups, ctx.scale, ctx.flash_on_cpu = groups, scale, flash_on_cpu
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # read once: under activation checkpointing a second access is an error
        tensors = ctx.saved_tensors
        sinks = tensors[4]
        if not ctx.flash_on_cpu:
            of_inputs = _gradients(tensors[:3], sinks, grads[0], ctx.groups, ctx.scale)
            return (*of_inputs, None, None, None)
        saved, normalizers = tensors[:4], tensors[5:]
        # in bfloat16 torch's kernel takes up to four times as long as in float32
        at_least = torch.promote_types(saved[0].dtype, torch.float32)
        query, key, value, output, grad = (x.to(at_least) for x in (*saved, *grads))
        output, grad = output.transpose(1, 2), grad.transpose(1, 2)
        # (T, heads, E) in memory, the layout of the projections' outputs
        totals = [x.new_zeros(x.shape[2], x.shape[1], x.shape[3]) for x in (query, key, value)]
        of_sinks = None if sinks is None else torch.zeros_like(sinks, dtype=at_least)
        for group, lse in zip(ctx.groups, normalizers, strict=True):
            upstream = _take_upstream(grad, group)
            if of_sinks is not None:
                of_sinks -= _share_of_sinks(sinks, lse, upstream, _take(output, group.queries))
            parts = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward(
                upstream,
                _take(query, group.queries),
                _take(key, group.keys),
                _take(value, group.keys),
                _take(output, group.queries),
                lse,
                0.0,
                scale=ctx.scale,
                **_in_dtype(group, at_least).causality,
            )
            totals[0].index_copy_(0, group.places, _kept(parts[0], group))
            for total, part in zip(totals[1:], parts[1:], strict=True):
                _add(total, group.keys, part)
        dtype = saved[0].dtype
        rows = (total.to(dtype).transpose(0, 1)[None] for total in totals)
        return *rows, None if of_sinks is None else of_sinks.to(sinks.dtype), None, None, None


def _share_of_sinks(sinks: Tensor, lse: Tensor, upstream: Tensor, output: Tensor) -> Tensor:
    """Negative gradient of each head's sink, (H,): Σ p · (∂loss/∂output · output) over queries, p
    being the sink's attention probability."""
    share_SHR = (sinks[:, None] - lse).exp()
    return (share_SHR * (upstream * output).sum(-1)).sum((0, 2))


def _attend_on_cpu(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: SegmentGroup,
    scale: float,
    sinks: Tensor | None,
) -> tuple[Tensor, Tensor]:
    output, lse = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, scale=scale, **group.causality
    )
    if sinks is None:
        return output, lse
    # the sink adds to the softmax's normalizer and not to the output: given the corrected
    # normalizer and output, the kernel's backward is right for all other keys
    with_sink = torch.logaddexp(lse, sinks[:, None].to(lse.dtype))
    return output * (lse - with_sink).exp()[..., None].to(output.dtype), with_sink


def _attend(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    group: SegmentGroup,
    scale: float,
    sinks: Tensor | None,
) -> tuple[Tensor, None]:
    if sinks is not None:
        mask = None if group.mask is None else group.mask == 0
        rules = ScoreRules(scale, sinks=sinks)
        return attend_to_all(query, key, value, rules, mask=mask).transpose(1, 2), None
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    # on a GPU the other kernels add query gradients in any order, or build a plan for every shape
    with sdpa_kernel(SDPBackend.MATH):
        output = F.scaled_dot_product_attention(query, key, value, scale=scale, **group.causality)
    return output, None


def _gradients(
    inputs: tuple[Tensor, ...],
    sinks: Tensor | None,
    grad: Tensor,
    groups: tuple[SegmentGroup, ...],
    scale: float,
) -> tuple[Tensor | None, ...]:
    """Gradients of query, key, value and sinks, by recomputing each group's attention."""
    at_least = torch.promote_types(grad.dtype, torch.float32)
    totals = [x.new_zeros(x.shape[2], x.shape[1], x.shape[3], dtype=at_least) for x in inputs]
    own_sinks = None if sinks is None else sinks.detach().to(at_least).requires_grad_()
    of_sinks = None if own_sinks is None else torch.zeros_like(own_sinks)
    for group in groups:
        leaves = [x.detach().requires_grad_() for x in _take_all(inputs, group)]
        upstream = _take_upstream(grad.transpose(1, 2), group)
        query, key, value = leaves
        with torch.enable_grad():
            inside = _in_dtype(group, grad.dtype)
            output, _ = _attend(query, key, value, inside, scale, own_sinks)
        wanted = [*leaves, *([] if own_sinks is None else [own_sinks])]
        parts = torch.autograd.grad(output, wanted, upstream)
        totals[0].index_copy_(0, group.places, _kept(parts[0], group).to(at_least))
        for total, part in zip(totals[1:], parts[1:3], strict=True):
            _add(total, group.keys, part.to(at_least))
        if of_sinks is not None:
            of_sinks += parts[3]
    found = (total.to(inputs[0].dtype).transpose(0, 1)[None] for total in totals)
    if sinks is None or of_sinks is None:
        return *found, None
    return *found, of_sinks.to(sinks.dtype)


def _take_all(inputs: tuple[Tensor, ...], group: SegmentGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a group."""
    query, key, value = inputs
    return _take(query, group.queries), _take(key, group.keys), _take(value, group.keys)


def _take(x: Tensor, places: Tensor | slice) -> Tensor:
    """Gather places of the row, (1, heads, T, E) -> (S, heads, L, E); a slice gives a view."""
    if isinstance(places, slice):
        return x[:, :, places]
    taken = x[0].transpose(0, 1).index_select(0, places.flatten())
    return taken.view(*places.shape, *taken.shape[1:]).transpose(1, 2)


def _take_upstream(grad: Tensor, group: SegmentGroup) -> Tensor:
    """A group's part of the output gradient, zero at padding."""
    upstream = _take(grad, group.queries)
    if len(group.padding):
        # a group with padding was gathered: a copy, which may be changed
        _tokens(upstream).index_fill_(0, group.padding, 0)
    return upstream


def _add(total: Tensor, places: Tensor | slice, part: Tensor) -> None:
    """Add (S, heads, L, E) to the given places of (T, heads, E)."""
    if isinstance(places, slice):
        total[places] += _tokens(part)
    elif total.device.type == "cpu":
        total.index_add_(0, places.flatten(), _tokens(part))
    else:
        # on a GPU index_add_ adds in any order
        total.index_put_((places.flatten(),), _tokens(part), accumulate=True)


def _tokens(x: Tensor) -> Tensor:
    """(S, heads, L, E) -> (S·L, heads, E)."""
    return x.transpose(1, 2).flatten(0, 1)


def _kept(x: Tensor, group: SegmentGroup) -> Tensor:
    """(S, heads, R, E) -> (tokens, heads, E): padding removed."""
    tokens = _tokens(x)
    return tokens[group.kept] if len(group.padding) else tokens


def _in_dtype(group: SegmentGroup, dtype: torch.dtype) -> SegmentGroup:
    return group if group.mask is None else group._replace(mask=group.mask.to(dtype))
