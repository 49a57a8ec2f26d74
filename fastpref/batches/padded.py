"""Padding: rows of a batch beside each other, as long as the longest."""

from collections.abc import Sequence

import torch

from fastpref.batch import Batch, EncodedRow


def pad_rows(rows: Sequence[EncodedRow], *, pad_token_id: int) -> Batch:
    """Lay P rows out as one padded batch: chosen sequences first, then rejected ones.

    Args:
        rows: P encoded rows, all with a rejected response or all without. None of them: a batch
            of one padding token that scores nothing, so that a rank without work still takes part
            in every collective.
        pad_token_id: What fills a row on the right; never scored, never attended to.
    """
    sequences = [(row.prompt_ids, row.chosen_ids, row.chosen_weights) for row in rows]
    sequences += [
        (row.prompt_ids, row.rejected_ids, row.rejected_weights)
        for row in rows
        if len(row.rejected_ids)
    ]
    B = max(1, len(sequences))
    L = max([1, *(len(prompt) + len(response) for prompt, response, _ in sequences)])
    input_ids = torch.full((B, L), pad_token_id, dtype=torch.int64)
    attention_mask = torch.zeros((B, L), dtype=torch.int64)
    # an empty batch attends to its one padding token: a row without any key is NaN in softmax
    attention_mask[:, 0] = 1
    score_index, target, token_weights, sequence_ids = [], [], [], []
    for i, (prompt, response, weights) in enumerate(sequences):
        assert len(prompt), "the first response token is predicted from the prompt's last one"
        ids = torch.tensor([*prompt, *response], dtype=torch.int64)
        input_ids[i, : len(ids)] = ids
        attention_mask[i, : len(ids)] = 1
        first = i * L + len(prompt) - 1
        score_index.append(torch.arange(first, first + len(response)))
        target.append(ids[len(prompt) :])
        sequence_ids.append(torch.full((len(response),), i))
        if weights is not None:
            token_weights.append(torch.tensor(weights, dtype=torch.float32))
    empty = torch.zeros(0, dtype=torch.int64)
    return Batch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        score_index=torch.cat(score_index or [empty]),
        target=torch.cat(target or [empty]),
        token_weights=torch.cat(token_weights) if token_weights else None,
        sequence_ids=torch.cat(sequence_ids or [empty]),
        num_sequences=len(sequences),
    )
