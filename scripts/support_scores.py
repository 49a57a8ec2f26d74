"""Log-probabilities of held-out responses, by a run's policy and by transformers' own forward."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tiny_families import plain_class
from torch import Tensor
from torch.nn import functional as F
from transformers import AutoConfig

from fastpref.batches.columns import Ranges
from fastpref.model.scorer import TokenScorer
from fastpref.train.run import Run

Sequences = list[tuple[list[int], list[int]]]
"""Prompt and response token ids of each sequence."""


def score_held_out(run: Run) -> tuple[Sequences, list[Tensor]]:
    """The held-out sequences, and the policy's log-probabilities of their response tokens."""
    assert run.eval is not None
    columns, plan = run.eval.plan(0, 1)
    sequences: Sequences = []
    scores: list[Tensor] = []
    for [micro_batch] in plan:
        prompts = columns.prompt.take(np.tile(micro_batch.rows, columns.num_sides))
        responses = columns.responses(micro_batch.rows)
        sequences += zip(_lists(columns.ids, prompts), _lists(columns.ids, responses), strict=True)
        batch = run.eval.build(columns, micro_batch)
        scores += _by_sequence(run.policy, batch)
    return sequences, scores


def _lists(ids: np.ndarray, ranges: Ranges) -> list[list[int]]:
    return [ids[start : start + length].tolist() for start, length in zip(*ranges, strict=True)]


@torch.no_grad()
def _by_sequence(policy: TokenScorer, batch: Any) -> list[Tensor]:
    logps_N = policy(batch).double()
    return [logps_N[batch.sequence_ids == i] for i in range(batch.num_sequences)]


@torch.no_grad()
def plain_scores(folder: Path, source: Path, sequences: Sequences) -> list[Tensor]:
    """Log-probabilities by transformers' own forward, sequence by sequence, in float64 if possible.

    Args:
        folder: Folder of a model or an adapter.
        source: Folder of the model, or of the adapter's base.
        sequences: Sequences to score.
    """
    family = plain_class(AutoConfig.from_pretrained(source))
    model = family.from_pretrained(folder, dtype=torch.float32).eval()
    try:
        return _plain_scores(model.double(), sequences)
    # some families compute parts in float32 regardless of the model's dtype
    except RuntimeError:
        return _plain_scores(model.float(), sequences)


def _plain_scores(model: Any, sequences: Sequences) -> list[Tensor]:
    scores = []
    for prompt, response in sequences:
        ids = torch.tensor([[*prompt, *response]])
        try:
            logits = model(input_ids=ids, use_cache=False).logits[0]
        # Llama 4's wrapper fails in transformers 5.24 after the logits, BLIP-2's requires images
        except (AttributeError, TypeError):
            logits = model.language_model(input_ids=ids, use_cache=False).logits[0]
        logps = F.log_softmax(logits.double(), -1)[len(prompt) - 1 : -1]
        scores.append(logps.gather(1, torch.tensor(response)[:, None])[:, 0])
    return scores


def largest_difference(ours: Sequence[Tensor], theirs: Sequence[Tensor]) -> float:
    """Largest absolute difference of a token's log-probability, in nats."""
    return max((a - b).abs().max().item() for a, b in zip(ours, theirs, strict=True))
