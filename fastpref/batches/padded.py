"""Padded batches: one sequence per row, padded on the right to the longest."""

from collections.abc import Sequence

import numpy as np
import torch

from fastpref.batch import Batch, EncodedRow
from fastpref.batches.columns import EncodedColumns, Ranges


def pad_rows(rows: Sequence[EncodedRow], *, pad_token_id: int) -> Batch:
    """Build one padded batch of P rows, see `pad`; either all rows are pairs or none is."""
    return pad(EncodedColumns.of_rows(rows), np.arange(len(rows)), pad_token_id=pad_token_id)


def pad(columns: EncodedColumns, rows: np.ndarray, *, pad_token_id: int) -> Batch:
    """Build one padded batch of some rows: chosen sequences first, then rejected ones.

    Args:
        rows: (P,) int64 indices into the columns. If empty, the batch is one padding token that
            scores nothing, so that a rank without rows still takes part in every collective.
        pad_token_id: Padding on the right; never scored, never attended to.
    """
    responses = columns.responses(rows)
    prompts = columns.prompt.take(np.tile(rows, columns.num_sides))
    lengths = prompts.lengths + responses.lengths
    S, L = len(lengths), int(lengths.max(initial=1))
    starts = np.arange(S) * L
    input_ids = np.full(max(1, S) * L, pad_token_id)
    input_ids[Ranges(starts, prompts.lengths).flat()] = columns.ids[prompts.flat()]
    response_starts = starts + prompts.lengths
    input_ids[Ranges(response_starts, responses.lengths).flat()] = columns.ids[responses.flat()]
    attention_mask = np.zeros_like(input_ids)
    attention_mask[Ranges(starts, lengths).flat()] = 1
    # an empty batch attends to its one padding token: softmax over no keys is NaN
    attention_mask[0] = 1
    score_index = Ranges(response_starts - 1, responses.lengths).flat()
    return Batch(
        input_ids=torch.from_numpy(input_ids).view(-1, L),
        attention_mask=torch.from_numpy(attention_mask).view(-1, L),
        score_index=torch.from_numpy(score_index),
        target=columns.targets(rows),
        in_loss=columns.in_loss(rows),
        token_weights=columns.token_weights(rows),
        sequence_ids=torch.from_numpy(np.repeat(np.arange(S), responses.lengths)),
        num_sequences=S,
    )
