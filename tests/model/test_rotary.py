"""Frequencies that follow from the longest sequence: of this forward's rows, packed or padded."""

import pytest
import torch
from packed_pairs import assert_same, scores_and_gradients
from tiny_models import build_model

from fastpref.batch import EncodedRow
from fastpref.batches.packed import pack_rows
from fastpref.batches.padded import pad_rows
from fastpref.model.attention.interface import build_attention
from fastpref.model.scorer import TokenScorer

ORIGINAL = 16
ROPES = {
    "longrope": {
        "rope_type": "longrope",
        "short_factor": [1.0] * 4,
        "long_factor": [3.0] * 4,
        "rope_theta": 1e4,
        "original_max_position_embeddings": ORIGINAL,
        "factor": 4.0,
    },
    "dynamic": {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4},
}


def build(rope_type: str):
    longest = 64 if rope_type == "longrope" else ORIGINAL
    return build_model(
        "llama", rope_parameters=dict(ROPES[rope_type]), max_position_embeddings=longest
    )


def pairs(longest: int) -> list[EncodedRow]:
    return [
        EncodedRow([5, 6, 7, 8], list(range(20, 16 + longest)), [9, 10]),
        EncodedRow([11, 12], [13, 14, 15], [16]),
    ]


@pytest.mark.parametrize("rope_type", ROPES)
@pytest.mark.parametrize("longest", [ORIGINAL, ORIGINAL + 1, ORIGINAL + 9])
def test_packed_rows_are_rotated_as_padded_ones(rope_type, longest):
    model, rows = build(rope_type), pairs(longest)
    expected = scores_and_gradients(model, pad_rows(rows, pad_token_id=0))
    for share_prompt in (False, True):
        batch = pack_rows(rows, pad_token_id=0, share_prompt=share_prompt)
        assert_same(scores_and_gradients(model, batch), expected)
    # and as transformers' own forward rotates a sequence that is alone
    plain = build(rope_type)
    ids = torch.tensor([[*rows[0].prompt_ids, *rows[0].chosen_ids]])
    logps = plain(input_ids=ids).logits[0, 3:-1].log_softmax(-1).gather(1, ids[0, 4:, None])[:, 0]
    torch.testing.assert_close(logps, expected[0][: len(logps)], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("rope_type", ROPES)
def test_what_was_computed_before_moves_nothing(rope_type):
    fresh, used = (TokenScorer(build(rope_type), build_attention("sdpa")) for _ in range(2))
    with torch.no_grad():
        for longest in (ORIGINAL + 20, ORIGINAL):
            used(pack_rows(pairs(longest), pad_token_id=0))
        used.model.generate(torch.full((1, 5), 6), max_length=ORIGINAL + 12, do_sample=False)
        for longest in (ORIGINAL + 5, ORIGINAL, 9):
            batch = pack_rows(pairs(longest), pad_token_id=0)
            again = TokenScorer(build(rope_type), build_attention("sdpa"))(batch)
            assert torch.equal(used(batch), again)
            assert torch.equal(fresh(batch), again)
