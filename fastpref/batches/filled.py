"""Packed rows padded to a few lengths, as torch.compile compiles separately for each length."""

from dataclasses import replace

import torch
from torch.nn import functional as F

from fastpref.batch import IGNORED, Batch, Segment, SegmentLayout

NUM_LENGTHS = 16
"""Number of row lengths up to the token limit, equally spaced. As the micro-batches of a step are
balanced, a run uses two or three of them; on average 3 % of a full row is padding."""
PADDING_SEGMENT = 64
"""Length of padding segments; attention within short segments costs almost nothing."""
SCORED_MULTIPLE = 128
"""Scored positions are padded to a multiple of this, the height of the head's tiles."""


def filled_length(num_tokens: int, *, max_tokens: int) -> int:
    """Padded length of a row; at most `max_tokens` unless the row itself is longer.

    Args:
        num_tokens: Tokens of the row, >= 1.
        max_tokens: Token limit of a micro-batch; a row that cannot be divided may exceed it.
    """
    step = -(-max_tokens // NUM_LENGTHS)
    length = -(-num_tokens // step) * step
    return length if num_tokens > max_tokens else min(length, max_tokens)


def fill_up(batch: Batch, length: int, *, pad_token_id: int) -> Batch:
    """Pad a packed row to `length`, and its scored positions to a multiple of `SCORED_MULTIPLE`.

    Padding attends only to itself and is not scored, so all other values and gradients are
    unchanged.

    Args:
        batch: Packed batch.
        length: New length of the row, at least its present one.
        pad_token_id: Padding token.
    """
    assert batch.layout is not None and batch.position_ids is not None
    T = batch.input_ids.shape[1]
    assert length >= T
    padding, missing = torch.arange(length - T), -len(batch.head_target) % SCORED_MULTIPLE
    filler = torch.arange(missing)
    in_loss = batch.in_loss
    return replace(
        batch,
        input_ids=F.pad(batch.input_ids, (0, length - T), value=pad_token_id),
        position_ids=torch.cat([batch.position_ids, padding[None] % PADDING_SEGMENT], dim=1),
        layout=_with_padding(batch.layout, T, length),
        # distinct positions, so that the backward's scatter-add never adds many rows to one
        score_index=torch.cat([batch.score_index, filler % length]),
        target=F.pad(batch.target, (0, missing), value=IGNORED),
        in_loss=None if in_loss is None else torch.cat([in_loss, batch.num_scored + filler]),
    )


def _with_padding(layout: SegmentLayout, T: int, length: int) -> SegmentLayout:
    """Extend the layout of a row of T tokens by padding segments up to `length`."""
    starts = range(T, length, PADDING_SEGMENT)
    stops = [min(start + PADDING_SEGMENT, length) for start in starts]
    segments = [Segment(start, stop, 0, 0) for start, stop in zip(starts, stops, strict=True)]
    longest = max((stop - start for start, stop, *_ in segments), default=0)
    beyond = torch.tensor(stops, dtype=torch.int32) - T
    keys, uses = layout.keys, layout.uses
    if keys is not None and uses is not None:
        padding = torch.arange(T, length)
        uses = replace(uses, first=torch.cat([uses.first, padding + len(keys) - T]))
        keys = torch.cat([keys, padding])
    return replace(
        layout,
        segments=(*layout.segments, *segments),
        query_offsets=torch.cat([layout.query_offsets, layout.query_offsets[-1] + beyond]),
        key_offsets=torch.cat([layout.key_offsets, layout.key_offsets[-1] + beyond]),
        longest=max(layout.longest, longest),
        longest_keys=max(layout.longest_keys, longest),
        keys=keys,
        uses=uses,
    )
