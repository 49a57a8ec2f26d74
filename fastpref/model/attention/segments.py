"""Groups the segments of a packed row by length, for one kernel call per group."""

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor

from fastpref.batch import SegmentLayout, send

LONG_KEYS = 128
"""Number of keys from which on a segment gets a call of its own on a CPU: it keeps the kernel busy.
A single segment never keeps a GPU busy."""
SHORT_PART = 64
"""Minimum step, in queries, when a segment is divided for a sliding window."""
MAX_SCORES = 2**22
"""Maximum scores per group and head on a GPU, which has them in memory: 16 MiB in float32."""
MAX_PADDING = 1.5
"""Maximum ratio of the scores computed for a group, padding included, to those of its segments."""


class SegmentGroup(NamedTuple):
    """S segments that one call computes, padded to R queries and K keys each.

    A segment is padded with copies of its last token: no real query attends to such a key, and the
    output of such a query is dropped.
    """

    queries: Tensor | slice
    """(S, R) int64: places in the row; a slice of the row for a single segment."""
    keys: Tensor | slice
    """(S, K) int64: places in the row, the prefix's and then the segment's own; or a slice."""
    mask: Tensor | None
    """(S, 1, R, K) float32, 0 where a query may attend and -inf elsewhere; None: causal."""
    kept: Tensor
    """(tokens,) int64: indices, among the S·R queries, of those that are not padding."""
    places: Tensor
    """(tokens,) int64: their places in the row."""
    padding: Tensor
    """(S·R - tokens,) int64: indices of the padding queries."""

    @property
    def causality(self) -> dict[str, Any]:
        """The mask, as keyword arguments of torch's kernels."""
        return {"is_causal": self.mask is None, "attn_mask": self.mask}

    def to(self, device: torch.device) -> "SegmentGroup":
        """The same group on a device, copied without waiting for the device."""
        moved: list[Any] = [send(x, device) if isinstance(x, Tensor) else x for x in self]
        return SegmentGroup(*moved)


def group_segments(layout: SegmentLayout, window: int | None = None) -> tuple[SegmentGroup, ...]:
    """Group the segments of a packed row: plainly causal groups first, then those with a mask.

    Args:
        window: Sliding window in tokens; None: all earlier tokens. Segments with more keys are
            divided, so that a query is multiplied with fewer than window + max(window,
            `SHORT_PART`) keys. On a GPU any segment may be divided, to limit the scores in memory.
    """
    device = layout.query_offsets.device
    long_keys, max_scores = (
        (None, MAX_SCORES) if scores_are_in_memory(device) else (LONG_KEYS, None)
    )
    parts_S6 = _parts(np.array(layout.segments, np.int64), window, max_scores)
    tokens = parts_S6[:, 1] - parts_S6[:, 0]
    keys = tokens + _keys_before(parts_S6)
    is_causal = keys == tokens
    if window is not None:
        is_causal &= keys <= window
    groups = []
    for is_plain in (True, False):
        (places,) = np.nonzero(is_causal == is_plain)
        # neighbours are of similar length
        order = places[np.lexsort((-tokens[places], -keys[places]))]
        lengths = tokens[order].tolist(), keys[order].tolist()
        for run in runs_of_like_length(*lengths, long_keys=long_keys, max_scores=max_scores):
            groups.append(_group(parts_S6[order[run]], window).to(device))
    return tuple(groups)


def scores_are_in_memory(device: torch.device) -> bool:
    """Whether attention holds all scores of a group in memory at once."""
    return device.type != "cpu"


def _parts(segments_S4: np.ndarray, window: int | None, max_scores: int | None) -> np.ndarray:
    """Divide segments into parts, (S, 6): first query and last query + 1, start of the segment,
    start and stop of its prefix, and the position in the sequence of the part's first key."""
    start, stop, prefix_start, prefix_stop = segments_S4.T
    zeros = np.zeros_like(start)
    parts_S6 = np.stack([start, stop, start, prefix_start, prefix_stop, zeros], axis=1)
    if window is None and max_scores is None:
        return parts_S6
    divided = []
    for start, stop, origin, prefix_start, prefix_stop, _ in parts_S6.tolist():
        length, of_prefix = stop - start, prefix_stop - prefix_start
        step = num_keys = length + of_prefix
        if window is not None and num_keys > window:
            step = max(window, SHORT_PART)
            num_keys = min(num_keys, step + window)
        if max_scores is not None:
            step = min(step, max(1, max_scores // num_keys))
        for first in range(start, stop, step):
            position = of_prefix + first - origin
            earliest = 0 if window is None else max(0, position - window + 1)
            last = min(stop, first + step)
            divided.append((first, last, origin, prefix_start, prefix_stop, earliest))
    return np.array(divided, np.int64)


def _keys_before(parts_S6: np.ndarray) -> np.ndarray:
    """Number of each part's keys that precede its first query's own."""
    start, _, origin, prefix_start, prefix_stop, earliest = parts_S6.T
    return prefix_stop - prefix_start + start - origin - earliest


def runs_of_like_length(
    tokens: list[int], keys: list[int], *, long_keys: int | None, max_scores: int | None
) -> Iterator[slice]:
    """Runs of neighbours to compute together; `tokens` are their queries, `keys` must descend."""
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


def _group(parts_S6: np.ndarray, window: int | None) -> SegmentGroup:
    start, stop, origin, prefix_start, prefix_stop, earliest = parts_S6.T[:, :, None]
    tokens, of_prefix = stop - start, prefix_stop - prefix_start
    before = _keys_before(parts_S6)[:, None]
    query = np.arange(tokens.max())
    key = np.arange((tokens + before).max())
    queries = np.minimum(start + query, stop - 1)
    position = earliest + key
    keys = np.where(
        position < of_prefix,
        prefix_start + position,
        np.minimum(origin + position - of_prefix, stop - 1),
    )
    mask = None
    if before.any() or (window is not None and len(key) > window):
        own = (before + query)[:, :, None]
        seen = key <= own
        if window is not None:
            seen &= key > own - window
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
