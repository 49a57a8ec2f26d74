"""Rows of every kind, and what a model makes of a batch of them."""

import pytest
import torch
import transformers
from hypothesis import strategies as st
from tiny_models import build_model

from fastpref.batch import Batch, EncodedRow
from fastpref.model.attention.interface import build_attention
from fastpref.model.scorer import TokenScorer

PAIRS = [
    EncodedRow([5, 6, 7, 8], [9, 10, 11, 2], [12, 2]),
    # a prompt of one token, and responses of one
    EncodedRow([13], [14], [15]),
    EncodedRow([5, 6, 7, 8], [9, 10, 11, 2], [9, 10, 11, 2]),
    EncodedRow([16, 17], [18, 19, 20], [21, 22, 23, 24, 25]),
    EncodedRow([5, 6, 7, 8], [26], [27, 28, 29]),
]


def scores_and_gradients(model, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Log-probabilities in the order of (sequence, token), and gradients of a weighted sum."""
    model.zero_grad()
    logps_N = TokenScorer(model, build_attention("sdpa"))(batch)
    upstream_N = torch.randn(len(logps_N), generator=torch.Generator().manual_seed(0))
    (logps_N * upstream_N).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logps_N.detach(), grads


def assert_same(ours, expected, *, floor: float = 1e-2, of_gradients: float = 1e-5) -> None:
    """Hold scores to 1e-5 and gradients to `of_gradients`, one that is next to nothing to a share
    `floor` of the largest one's."""
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-5)
    assert ours[1].keys() == expected[1].keys()
    largest = max(grad.abs().max().item() for grad in expected[1].values())
    for name, grad in expected[1].items():
        scale = max(grad.norm().item(), floor * largest)
        error = (ours[1][name] - grad).norm().item()
        assert error <= of_gradients * scale, f"{name}: {error:.2e} of {scale:.2e}"


def skip_what_does_not_pack(family: str) -> None:
    if family == "gpt-j" and tuple(map(int, transformers.__version__.split(".")[:2])) < (5, 24):
        pytest.skip("GPT-J packs in newer versions of transformers only")


def build(family: str):
    skip_what_does_not_pack(family)
    # Gemma 2's window reaches over every sequence here, and its softcap bends the scores
    wide = {"sliding_window": 64, "attn_logit_softcapping": 2.0} if family == "gemma2" else {}
    return build_model(family, **wide)


@st.composite
def random_pairs(draw) -> list[EncodedRow]:
    # of two tokens alone, responses begin alike
    ids = draw(st.sampled_from([st.integers(3, 4), st.integers(3, 96)]))
    prompts = draw(st.lists(st.lists(ids, min_size=1, max_size=9), min_size=1, max_size=3))
    responses = st.lists(ids, min_size=1, max_size=9)
    rows = draw(
        st.lists(st.tuples(st.sampled_from(prompts), responses, responses), min_size=1, max_size=6)
    )
    return [EncodedRow(*row) for row in rows]
