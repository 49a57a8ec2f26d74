"""State spaces, linear attention and convolutions compute packed rows as they do padded ones."""

import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from packed_pairs import PAIRS, assert_same, random_pairs
from torch import Tensor

from fastpref.batch import Batch, EncodedRow
from fastpref.batches.filled import fill_up
from fastpref.batches.packed import pack_rows
from fastpref.batches.padded import pad_rows
from fastpref.model.attention.interface import build_attention
from fastpref.model.attention.packing_probe import probe_packing
from fastpref.model.blocks import find_blocks
from fastpref.model.logit_path import measure_logit_path
from fastpref.model.mixers import Sequences, find_mixers, isolate_mixers
from fastpref.model.parallelize import wrap_blocks
from fastpref.model.scorer import TokenScorer

sys.path.append(str(Path(__file__).parents[2] / "scripts"))
from tiny_families import build_tiny

FAMILIES = {
    "lfm2": "Lfm2ShortConv",
    "mamba": "MambaMixer",
    "mamba2": "Mamba2Mixer",
    "qwen3_next": "Qwen3NextGatedDeltaNet",
    "falcon_h1": "FalconH1Mixer",
    "granitemoehybrid": "GraniteMoeHybridMambaLayer",
    "nemotron_h": "NemotronHMamba2Mixer",
    "olmo_hybrid": "OlmoHybridGatedDeltaNet",
    "recurrent_gemma": "RecurrentGemmaRecurrentBlock",
    "rwkv": "RwkvFeedForward",
    "minimax": "MiniMaxLightningAttention",
}


def build(family: str) -> Any:
    """A model whose layers all matter to its scores."""
    try:
        torch.manual_seed(0)
        model = build_tiny(family).eval()
    except (ValueError, KeyError):
        pytest.skip(f"this transformers has no {family}")
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            # rates of decay and the like stay what they are
            if parameter.dim() > 1 and "A_log" not in name:
                parameter.normal_(std=0.15)
    return model


def isolated(family: str) -> Any:
    model = build(family)
    isolate_mixers(find_mixers(model, find_blocks(model, None))[0])
    return model


def scores_and_gradients(model: Any, batch: Batch) -> tuple[Tensor, dict[str, Tensor]]:
    model.zero_grad()
    logps_N = TokenScorer(model, build_attention("sdpa"), measure_logit_path(model))(batch)
    upstream_N = torch.randn(len(logps_N), generator=torch.Generator().manual_seed(0))
    (logps_N * upstream_N).sum().backward()
    grads = {name: p.grad.clone() for name, p in model.named_parameters() if p.grad is not None}
    return logps_N.detach(), grads


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_the_scores_and_gradients_of_padded_ones(family):
    model = isolated(family)
    padded = scores_and_gradients(model, pad_rows(PAIRS, pad_token_id=0))
    for share_prompt in (True, False):
        batch = pack_rows(PAIRS, pad_token_id=0, share_prompt=share_prompt)
        assert_same(scores_and_gradients(model, batch), padded)
    filled = fill_up(pack_rows(PAIRS, pad_token_id=0), 200, pad_token_id=0)
    assert_same(scores_and_gradients(model, filled), padded)


@pytest.mark.parametrize("family", FAMILIES)
def test_the_layers_are_found_and_measured_when_a_model_is_loaded(family):
    model = build(family)
    path = measure_logit_path(model)
    for share_prompt in (True, False):
        probe = probe_packing(model, path, share_prompt=share_prompt, longest=64)
        assert probe.obstacle is None and FAMILIES[family] in probe.mixers


@settings(max_examples=15, deadline=None)
@given(random_pairs())
@example([EncodedRow([64, 13], [3], [3])])
def test_any_pairs_are_computed_as_they_would_be_padded(rows):
    model = isolated("qwen3_next")
    packed = scores_and_gradients(model, pack_rows(rows, pad_token_id=0))
    padded = scores_and_gradients(model, pad_rows(rows, pad_token_id=0))
    # of a single key the gradient is rounding alone; of the example, plain transformers in float32
    # gives the embedding's within 1.1e-5 of float64
    assert_same(packed, padded, floor=0.1, of_gradients=3e-5)


@pytest.mark.parametrize("family", ["mamba", "lfm2", "qwen3_next"])
def test_recomputed_blocks_know_their_row_in_the_backward(family):
    batch, other = pack_rows(PAIRS, pad_token_id=0), pack_rows(PAIRS[:2], pad_token_id=0)
    expected = scores_and_gradients(isolated(family), batch)
    model = isolated(family)
    wrap_blocks(model, activation_checkpointing=True)
    scorer = TokenScorer(model, build_attention("sdpa"), measure_logit_path(model))
    logps_N = scorer(batch)
    with torch.no_grad():
        # another row is computed before the backward
        scorer(other)
    upstream_N = torch.randn(len(logps_N), generator=torch.Generator().manual_seed(0))
    (logps_N * upstream_N).sum().backward()
    grads = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    assert torch.equal(logps_N, expected[0])
    assert all(torch.equal(grads[name], expected[1][name]) for name in expected[1])


@pytest.mark.parametrize("family", ["mamba", "lfm2", "qwen3_next"])
def test_no_token_of_a_pair_moves_another_pair_at_all(family):
    model = isolated(family)
    scorer = TokenScorer(model, build_attention("sdpa"), measure_logit_path(model))
    changed = EncodedRow([30, 31], [32, 33, 34], [40, 41, 42, 43, 44])
    rows, others = [PAIRS[0], PAIRS[3], PAIRS[4]], [PAIRS[0], changed, PAIRS[4]]
    with torch.no_grad():
        before, after = (scorer(pack_rows(x, pad_token_id=0)) for x in (rows, others))
    same = pack_rows(rows, pad_token_id=0).sequence_ids % 3 != 1
    assert torch.equal(before[same], after[same]) and not torch.equal(before, after)


def test_sequences_are_taken_apart_and_put_together_again():
    batch = pack_rows(PAIRS, pad_token_id=0)
    sequences = Sequences(batch.layout)
    row = torch.arange(batch.input_ids.shape[1], dtype=torch.float64)[None, :, None]
    groups = sequences.take_apart(row)
    assert torch.equal(sequences.put_together(groups), row)
    # each begins with its prompt
    expected = [
        [*range(s.prefix_start, s.prefix_stop), *range(s.start, s.stop)]
        for s in batch.layout.segments
    ]
    found = []
    for of_group, group in zip(groups, sequences.groups, strict=True):
        is_token = torch.zeros(of_group.numel(), dtype=torch.bool)
        is_token[group.slots] = True
        for sequence, mask in zip(of_group[..., 0], is_token.view(group.shape), strict=True):
            found.append(sequence[mask].long().tolist())
    assert sorted(found) == sorted(expected)


def test_keys_picked_by_an_indexer_and_layers_that_are_whole_blocks_stay_padded():
    for family in ("deepseek_v32", "xlstm"):
        model = build(family)
        mixers, obstacle = find_mixers(model, find_blocks(model, None))
        assert not mixers and obstacle


@pytest.mark.parametrize(("family", "is_own"), [("bloom", True), ("got_ocr2", False)])
def test_a_wrappers_attention_is_that_of_its_text(family, is_own):
    model = build_tiny(family)
    _, obstacle = find_mixers(model, find_blocks(model, None))
    assert (obstacle is not None and "one of its own" in obstacle) == is_own
