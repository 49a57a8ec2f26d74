"""Layers that look back some tokens, or add sinks: packed as padded, beyond the window."""

import sys
from pathlib import Path

import pytest
import torch
from torch import Tensor

from fastpref.batch import Batch, EncodedRow
from fastpref.batches.packed import pack_rows
from fastpref.batches.padded import pad_rows
from fastpref.model.attention.interface import build_attention
from fastpref.model.logit_path import measure_logit_path
from fastpref.model.scorer import TokenScorer

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from tiny_families import build_tiny

WINDOW = 8
FAMILIES = [
    "cohere2",
    "exaone4",
    "gemma2",
    "gemma3_text",
    "gpt_oss",
    "mistral",
    "mixtral",
    "olmo3",
    "phi3",
]


def build(family: str) -> object:
    torch.manual_seed(0)
    model = build_tiny(family).eval()
    config = model.config.get_text_config()
    windowed = [m for m in model.modules() if isinstance(vars(m).get("sliding_window"), int)]
    # some layers read it there
    assert hasattr(config, "sliding_window")
    for holder in (config, *windowed):
        holder.sliding_window = WINDOW
    return model


def rows() -> list[EncodedRow]:
    """Prompts shorter and longer than the window, branches of one token and of many."""
    generator = torch.Generator().manual_seed(0)

    def ids(length: int) -> list[int]:
        return torch.randint(5, 90, (length,), generator=generator).tolist()

    lengths = [(21, 13, 30), (3, 1, 25), (30, 1, 1), (8, 9, 2), (1, 40, 17)]
    encoded = [EncodedRow(*(ids(length) for length in row)) for row in lengths]
    return [*encoded, encoded[0]._replace(chosen_ids=ids(11))]


def values_and_gradients(scorer: TokenScorer, batch: Batch) -> list[Tensor]:
    """Log-probabilities sequence by sequence, and gradients of what some sum of them makes."""
    scorer.zero_grad()
    logps = scorer(batch)[torch.argsort(batch.sequence_ids, stable=True)]
    logps.backward(torch.linspace(-1, 1, len(logps)))
    return [logps.detach(), *(p.grad.clone() for p in scorer.parameters() if p.grad is not None)]


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_beyond_the_window_are_the_padded_ones(family):
    model = build(family)
    path = measure_logit_path(model)
    expected = values_and_gradients(TokenScorer(model, path=path), pad_rows(rows(), pad_token_id=0))
    for attention in ("sdpa", "eager"):
        scorer = TokenScorer(model, build_attention(attention), path)
        for share_prompt in (False, True):
            batch = pack_rows(rows(), pad_token_id=0, share_prompt=share_prompt)
            found = values_and_gradients(scorer, batch)
            for ours, theirs in zip(found, expected, strict=True):
                # a sum of float32 is as exact as its largest terms
                atol = max(1e-5, 2e-6 * theirs.abs().max().item())
                torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=atol)
