"""The records that travel from the encoder to the model and on to the losses."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor


class EncodedRow(NamedTuple):
    """One preference pair (or, for SFT, one prompt and response) as token ids.

    A response ends in EOS unless truncation took it. Token weights stand one beside each response
    token; None weighs every token 1. `rejected_ids` is empty in SFT.
    """

    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]
    chosen_weights: Sequence[float] | None = None
    rejected_weights: Sequence[float] | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenBatch:
    """A micro-batch: B right-padded rows of L tokens, and the N response tokens they score.

    Rows are sequences: all chosen responses first, then all rejected ones, so sequence p and
    sequence P + p are one pair. A dataclass and not a tuple on purpose: FSDP2 looks into tuples
    and would cast the token weights to the compute dtype.
    """

    input_ids: Tensor
    """(B, L) int64, padded on the right."""
    attention_mask: Tensor
    """(B, L) int64: 1 for a token, 0 for padding."""
    score_index: Tensor
    """(N,) int64: the position, in the flattened (B·L,), whose hidden state predicts a target."""
    target: Tensor
    """(N,) int64: the response tokens, in the order of `score_index`."""
    token_weights: Tensor | None
    """(N,) float32, or None when every token weighs 1."""
    sequence_ids: Tensor
    """(N,) int64 in [0, num_sequences): the sequence a target belongs to."""
    num_sequences: int
    """2P for P pairs, P in SFT; 0 for a rank without work, which then scores nothing."""

    def to(self, device: torch.device) -> "TokenBatch":
        """The same batch on `device`; the copies do not wait for the host."""
        moved: dict[str, Any] = {
            field.name: value.to(device, non_blocking=True)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Tensor)
        }
        return replace(self, **moved)


def pad_rows(rows: Sequence[EncodedRow], *, pad_token_id: int) -> TokenBatch:
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
    return TokenBatch(
        input_ids=input_ids,
        attention_mask=attention_mask,
        score_index=torch.cat(score_index or [empty]),
        target=torch.cat(target or [empty]),
        token_weights=torch.cat(token_weights) if token_weights else None,
        sequence_ids=torch.cat(sequence_ids or [empty]),
        num_sequences=len(sequences),
    )
