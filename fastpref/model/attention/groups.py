"""Packed attention by torch's own kernels, over groups of segments of like length.

A call for every segment costs more than the attention itself where segments are short, and autograd
would turn every slice into a tensor as long as the row. Both are avoided here.
"""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from fastpref.batch import SegmentLayout

LONG_KEYS = 128
"""From this many keys on a segment is computed alone on a CPU: it keeps the kernel busy by itself.
A GPU is never busy with one."""
MAX_SCORES = 2**22
"""Scores of a group and head on a GPU, at most: they are in memory, 16 MiB of float32 a head. A
segment alone may have more."""
MAX_PADDING = 1.5
"""Scores computed for a group, padding included, over those of its segments, at most."""


class SegmentGroup(NamedTuple):
    """S segments that one call computes, padded to R queries and K keys each.

    Behind its end a segment has its last token again: as a key no other query attends to it, as a
    query nothing comes of it.
    """

    queries: Tensor | slice
    """(S, R) int64: places in the row; a slice of the row where one segment is alone."""
    keys: Tensor | slice
    """(S, K) int64: places in the row, its prefix's and then its own; or a slice of it."""
    mask: Tensor | None
    """(S, 1, R, K) float32, 0 where a query may attend and -inf elsewhere; None: causal."""
    kept: Tensor
    """(tokens,) int64: which of the S·R queries are no padding."""
    places: Tensor
    """(tokens,) int64: their places in the row."""
    padding: Tensor
    """(S·R - tokens,) int64: which are."""

    @property
    def causality(self) -> dict[str, Any]:
        """As torch's kernels take it."""
        return {"is_causal": self.mask is None, "attn_mask": self.mask}

    def to(self, device: torch.device) -> "SegmentGroup":
        """The same group on a device."""
        moved: list[Any] = [x.to(device) if isinstance(x, Tensor) else x for x in self]
        return SegmentGroup(*moved)


def group_segments(layout: SegmentLayout) -> tuple[SegmentGroup, ...]:
    """The segments of a packed row in groups: plain ones, then branches."""
    device = layout.query_offsets.device
    long_keys, max_scores = (LONG_KEYS, None) if device.type == "cpu" else (None, MAX_SCORES)
    segments_S4 = np.array(layout.segments, np.int64)
    tokens = segments_S4[:, 1] - segments_S4[:, 0]
    keys = tokens + segments_S4[:, 3] - segments_S4[:, 2]
    groups = []
    for is_plain in (True, False):
        (places,) = np.nonzero((keys == tokens) == is_plain)
        # like beside like
        order = places[np.lexsort((-tokens[places], -keys[places]))]
        lengths = tokens[order].tolist(), keys[order].tolist()
        for run in runs_of_like_length(*lengths, long_keys=long_keys, max_scores=max_scores):
            groups.append(_group(segments_S4[order[run]]).to(device))
    return tuple(groups)


def runs_of_like_length(
    tokens: list[int], keys: list[int], *, long_keys: int | None, max_scores: int | None
) -> Iterator[slice]:
    """Which neighbours are computed together, from their numbers of queries and of keys."""
    start, longest, scores = 0, 0, 0
    for i, (R, K) in enumerate(zip(tokens, keys, strict=True)):
        longest, scores = max(longest, R), scores + R * K
        padded = (i + 1 - start) * longest * keys[start]
        is_long = long_keys is not None and keys[start] >= long_keys
        is_large = max_scores is not None and padded > max_scores
        if i > start and (is_long or is_large or padded > MAX_PADDING * scores):
            yield slice(start, i)
            start, longest, scores = i, R, R * K
    if tokens:
        yield slice(start, len(tokens))


def _group(segments_S4: np.ndarray) -> SegmentGroup:
    start, stop, prefix_start, prefix_stop = segments_S4.T[:, :, None]
    tokens, of_prefix = stop - start, prefix_stop - prefix_start
    query = np.arange(tokens.max())
    key = np.arange((tokens + of_prefix).max())
    queries = np.minimum(start + query, stop - 1)
    keys = np.where(
        key < of_prefix, prefix_start + key, np.minimum(start + key - of_prefix, stop - 1)
    )
    mask = None
    if of_prefix.any():
        seen = key <= (of_prefix + query)[:, :, None]
        mask = torch.from_numpy(np.where(seen, np.float32(0), np.float32("-inf")))[:, None]
    is_token = (query < tokens).ravel()
    kept = np.flatnonzero(is_token)
    return SegmentGroup(
        queries=_places(queries),
        keys=_places(keys),
        mask=mask,
        kept=torch.from_numpy(kept),
        places=torch.from_numpy(queries.ravel()[kept]),
        padding=torch.from_numpy(np.flatnonzero(~is_token)),
    )


def _places(places_SL: np.ndarray) -> Tensor | slice:
    first, last = int(places_SL[0, 0]), int(places_SL[-1, -1])
    if len(places_SL) == 1 and last - first == places_SL.shape[1] - 1:
        return slice(first, last + 1)
    return torch.from_numpy(places_SL)


def takes_flash_on_cpu(query: Tensor, value: Tensor) -> bool:
    """Whether torch's flash kernel for a CPU can be called: it is no public function, and takes
    values as wide as the keys."""
    is_there = hasattr(torch.ops.aten, "_scaled_dot_product_flash_attention_for_cpu")
    return is_there and query.device.type == "cpu" and query.shape[-1] == value.shape[-1]


class GroupedAttention(torch.autograd.Function):
    """Torch's attention, group by group, as one node of the graph.

    The backward adds up in a fixed order. On a CPU it is that of the kernel behind torch's
    attention; elsewhere a group's attention is computed anew in its plain form and differentiated,
    with one group's scores in memory at a time.
    """

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        key: Tensor,
        value: Tensor,
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
            output, lse = attend(query_SHRE, key_SHKE, value_SHKE, inside, scale)
            output_THE.index_copy_(0, group.places, _kept(output, group))
            normalizers += [] if lse is None else [lse]
        output = output_THE[None]
        ctx.save_for_backward(query, key, value, output, *normalizers)
        ctx.groups, ctx.scale, ctx.flash_on_cpu = groups, scale, flash_on_cpu
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        # once: under activation checkpointing the tensors are there for one reading
        tensors = ctx.saved_tensors
        if not ctx.flash_on_cpu:
            return (*_gradients(tensors[:3], grads[0], ctx.groups, ctx.scale), None, None, None)
        saved, normalizers = tensors[:4], tensors[4:]
        # in bfloat16 torch's kernel takes up to four times as long as in float32
        at_least = torch.promote_types(saved[0].dtype, torch.float32)
        query, key, value, output, grad = (x.to(at_least) for x in (*saved, *grads))
        output, grad = output.transpose(1, 2), grad.transpose(1, 2)
        # (T, heads, E) in memory, as the projections before it are
        totals = [x.new_zeros(x.shape[2], x.shape[1], x.shape[3]) for x in (query, key, value)]
        for group, lse in zip(ctx.groups, normalizers, strict=True):
            upstream = _take(grad, group.queries)
            if len(group.padding):
                # a group with padding is a copy
                _tokens(upstream).index_fill_(0, group.padding, 0)
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
        return (*(total.to(dtype).transpose(0, 1)[None] for total in totals), None, None, None)


def _attend_on_cpu(
    query: Tensor, key: Tensor, value: Tensor, group: SegmentGroup, scale: float
) -> tuple[Tensor, Tensor]:
    return torch.ops.aten._scaled_dot_product_flash_attention_for_cpu(
        query, key, value, scale=scale, **group.causality
    )


def _attend(
    query: Tensor, key: Tensor, value: Tensor, group: SegmentGroup, scale: float
) -> tuple[Tensor, None]:
    repeats = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(repeats, dim=1) for x in (key, value))
    # the others of a GPU add to a query's gradient in any order, or build a plan for every shape
    with sdpa_kernel(SDPBackend.MATH):
        output = F.scaled_dot_product_attention(query, key, value, scale=scale, **group.causality)
    return output, None


def _gradients(
    inputs: tuple[Tensor, ...], grad: Tensor, groups: tuple[SegmentGroup, ...], scale: float
) -> tuple[Tensor, ...]:
    """Those of query, key and value, from each group's attention computed anew."""
    at_least = torch.promote_types(grad.dtype, torch.float32)
    totals = [x.new_zeros(x.shape[2], x.shape[1], x.shape[3], dtype=at_least) for x in inputs]
    for group in groups:
        leaves = [x.detach().requires_grad_() for x in _take_all(inputs, group)]
        upstream = _take(grad.transpose(1, 2), group.queries)
        if len(group.padding):
            # a group with padding is a copy
            _tokens(upstream).index_fill_(0, group.padding, 0)
        query, key, value = leaves
        with torch.enable_grad():
            output, _ = _attend(query, key, value, _in_dtype(group, grad.dtype), scale)
        parts = torch.autograd.grad(output, leaves, upstream)
        totals[0].index_copy_(0, group.places, _kept(parts[0], group).to(at_least))
        for total, part in zip(totals[1:], parts[1:], strict=True):
            _add(total, group.keys, part.to(at_least))
    return tuple(total.to(inputs[0].dtype).transpose(0, 1)[None] for total in totals)


def _take_all(inputs: tuple[Tensor, ...], group: SegmentGroup) -> tuple[Tensor, Tensor, Tensor]:
    """Queries, keys and values of a group."""
    query, key, value = inputs
    return _take(query, group.queries), _take(key, group.keys), _take(value, group.keys)


def _take(x: Tensor, places: Tensor | slice) -> Tensor:
    """(1, heads, T, E) -> (S, heads, L, E): those places of the row, for a slice as a view."""
    if isinstance(places, slice):
        return x[:, :, places]
    taken = x[0].transpose(0, 1).index_select(0, places.flatten())
    return taken.view(*places.shape, *taken.shape[1:]).transpose(1, 2)


def _add(total: Tensor, places: Tensor | slice, part: Tensor) -> None:
    """Add (S, heads, L, E) to those places of (T, heads, E)."""
    if isinstance(places, slice):
        total[places] += _tokens(part)
    elif total.device.type == "cpu":
        total.index_add_(0, places.flatten(), _tokens(part))
    else:
        # index_add_ adds in any order there
        total.index_put_((places.flatten(),), _tokens(part), accumulate=True)


def _tokens(x: Tensor) -> Tensor:
    """(S, heads, L, E) -> (S·L, heads, E)."""
    return x.transpose(1, 2).flatten(0, 1)


def _kept(x: Tensor, group: SegmentGroup) -> Tensor:
    """(S, heads, R, E) -> (tokens, heads, E): without what is padding."""
    tokens = _tokens(x)
    return tokens[group.kept] if len(group.padding) else tokens


def _in_dtype(group: SegmentGroup, dtype: torch.dtype) -> SegmentGroup:
    return group if group.mask is None else group._replace(mask=group.mask.to(dtype))
