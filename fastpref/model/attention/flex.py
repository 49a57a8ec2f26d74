"""FlexAttention over a packed row: which blocks of the scores it computes, and with which mask."""

from collections.abc import Sequence
from importlib import import_module
from typing import Any

import numpy as np
import torch
from torch import Tensor

from fastpref.batch import Segment, SegmentLayout, send
from fastpref.model.attention.backends import Attend, ByWindow
from fastpref.model.attention.rules import ScoreRules

BLOCK = 128
"""Queries and keys of a block, FlexAttention's default."""


def block_mask(layout: SegmentLayout, window: int | None) -> Any:
    """FlexAttention's block mask: a token attends to its segment's prefix and earlier tokens.

    The blocks follow from the segments: torch's `create_block_mask` computes the mask of every
    query and key, T x T several times over, which takes gigabytes from 16,384 tokens on.
    """
    flex = import_module("torch.nn.attention.flex_attention")
    device = layout.query_offsets.device
    table = send(torch.tensor(layout.segments), device)
    T = layout.segments[-1].stop
    segment_of = torch.repeat_interleave(table[:, 1] - table[:, 0], output_size=T)
    start, prefix_start, prefix_stop = (
        table[segment_of, 0],
        table[segment_of, 2],
        table[segment_of, 3],
    )
    # position of each token in its own sequence, prefix included
    position = torch.arange(T, device=device) - start + prefix_stop - prefix_start

    def attends(batch: Tensor, head: Tensor, q: Tensor, k: Tensor) -> Tensor:
        own = (segment_of[q] == segment_of[k]) & (k <= q)
        of_prefix = (k >= prefix_start[q]) & (k < prefix_stop[q])
        if window is not None:
            # no in-place operations: the function is compiled for a single element
            own = own & (q - k < window)
            of_prefix = of_prefix & (position[q] - (k - prefix_start[q]) < window)
        return own | of_prefix

    blocks = []
    for is_block in attended_blocks(layout.segments, window):
        # first in each row the blocks to compute, in order, as `from_kv_blocks` takes them
        order = np.argsort(~is_block, axis=1, kind="stable").astype(np.int32)
        for of_rows in (is_block.sum(axis=1, dtype=np.int32), order):
            blocks.append(send(torch.from_numpy(of_rows)[None, None], device))
    return flex.BlockMask.from_kv_blocks(
        *blocks, BLOCK_SIZE=BLOCK, mask_mod=attends, seq_lengths=(T, T)
    )


def attended_blocks(
    segments: Sequence[Segment], window: int | None
) -> tuple[np.ndarray, np.ndarray]:
    """Blocks of `BLOCK` queries x `BLOCK` keys in which tokens attend.

    Args:
        segments: Of a packed row, in order.
        window: Sliding window in tokens; None: all earlier tokens.

    Returns:
        Two (blocks, blocks) bool, queries first: some of a block's queries attend to some of its
        keys; all of them to all, so that it needs no mask. A block is in one of the two or none.
    """
    num_blocks = -(-segments[-1].stop // BLOCK)
    attended = np.zeros((num_blocks, num_blocks), bool)
    num_scores = np.zeros((num_blocks, num_blocks), np.int32)
    """Scores in the parts of a block, one for each segment in it, that need no mask."""
    for start, stop, prefix_start, prefix_stop in segments:
        # keys, and how much further away they are than their places say
        ranges = [(start, stop, 0), (prefix_start, prefix_stop, prefix_stop - start)]
        for first, end, distance in ranges:
            if first == end:
                continue
            queries, q_first, q_last = _blocks_of(start, stop)
            keys, k_first, k_last = _blocks_of(first, end)
            # a query attends to a key at distances from 0 to window - 1
            nearest = q_first[:, None] - k_last + distance
            farthest = q_last[:, None] - k_first + distance
            within = True if window is None else nearest < window
            attended[queries, keys] |= (farthest >= 0) & within
            needs_no_mask = (nearest >= 0) & (True if window is None else farthest < window)
            scores = (q_last - q_first + 1)[:, None] * (k_last - k_first + 1)
            num_scores[queries, keys] += np.where(needs_no_mask, scores, 0)
    is_full = num_scores == BLOCK * BLOCK
    return attended & ~is_full, is_full


def _blocks_of(first: int, end: int) -> tuple[slice, np.ndarray, np.ndarray]:
    """The blocks that tokens from `first` to before `end` lie in, and each block's first and last
    of these tokens."""
    blocks = slice(first // BLOCK, (end - 1) // BLOCK + 1)
    starts = BLOCK * np.arange(blocks.start, blocks.stop)
    return blocks, np.maximum(starts, first), np.minimum(starts + BLOCK, end) - 1


def flex_attend() -> Attend:
    """FlexAttention, compiled where it runs on a GPU."""
    flex_attention = import_module("torch.nn.attention.flex_attention").flex_attention
    compiled = torch.compile(flex_attention, dynamic=True)

    def attend(
        query: Tensor, key: Tensor, value: Tensor, masks: ByWindow, rules: ScoreRules
    ) -> Tensor:
        if rules.sinks is not None:
            raise ValueError("FlexAttention has no sinks")

        def cap(score: Tensor, *_: Tensor) -> Tensor:
            assert rules.softcap is not None
            return rules.softcap * torch.tanh(score / rules.softcap)

        function = compiled if query.is_cuda else flex_attention
        output = function(
            query,
            key,
            value,
            score_mod=None if rules.softcap is None else cap,
            block_mask=masks.made(rules.window),
            scale=rules.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )
        return output.transpose(1, 2)

    return attend
