"""Packed rows filled up to a few lengths, for code that is compiled for every length apart."""

from dataclasses import replace

import torch
from torch.nn import functional as F

from fastpref.batch import IGNORED, Batch, Segment, SegmentLayout

NUM_LENGTHS = 16
"""Lengths of rows up to the limit of a micro-batch, in equal steps. The micro-batches of a step are
balanced, so a run sees two or three of them; 3 % of a full row is padding in the mean."""
PADDING_SEGMENT = 64
"""Tokens of padding that attend to each other: a short segment costs as good as nothing."""
SCORED_MULTIPLE = 128
"""Rows of the head's tiles, which computes as many where some are missing."""


def filled_length(num_tokens: int, *, max_tokens: int) -> int:
    """Tokens of a row of `num_tokens` with its padding: at most the limit, if it has no more.

    Args:
        num_tokens: >= 1.
        max_tokens: Most tokens of a micro-batch; a row that cannot be divided may have more.
    """
    step = -(-max_tokens // NUM_LENGTHS)
    length = -(-num_tokens // step) * step
    return length if num_tokens > max_tokens else min(length, max_tokens)


def fill_up(batch: Batch, length: int, *, pad_token_id: int) -> Batch:
    """A packed row with padding behind it, and its scored positions as many as tiles have.

    Padding attends to itself alone and is not scored: values and gradients of everything else stay
    what they are.

    Args:
        batch: Packed.
        length: Of the row, no less than it has.
        pad_token_id: The padding.
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
        # each of them another token, so that a backward never adds many to one
        score_index=torch.cat([batch.score_index, filler % length]),
        target=F.pad(batch.target, (0, missing), value=IGNORED),
        in_loss=None if in_loss is None else torch.cat([in_loss, batch.num_scored + filler]),
    )


def _with_padding(layout: SegmentLayout, T: int, length: int) -> SegmentLayout:
    """The layout of a row of T tokens, then of one with padding behind it."""
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
