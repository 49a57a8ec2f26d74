"""Rows filled up to a few lengths give the numbers of rows as long as they come."""

from functools import partial

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_pairs import PAIRS, assert_same, build, random_pairs, scores_and_gradients
from tiny_models import FAMILIES, build_model

from fastpref.batch import IGNORED, EncodedRow
from fastpref.batches.columns import EncodedColumns
from fastpref.batches.filled import (
    NUM_LENGTHS,
    PADDING_SEGMENT,
    SCORED_MULTIPLE,
    fill_up,
    filled_length,
)
from fastpref.batches.layouts import PackedRows
from fastpref.batches.packed import pack_rows
from fastpref.batches.padded import pad_rows
from fastpref.model import scorer
from fastpref.model.attention.backends import PackedAttention, attend_varlen
from fastpref.model.attention.interface import build_attention
from fastpref.model.scorer import TokenScorer

LLAMA = build_model("llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_a_row_filled_up_gives_the_same_scores_and_gradients(family):
    model = build(family)
    for share_prompt in (True, False):
        batch = pack_rows(PAIRS, pad_token_id=0, share_prompt=share_prompt)
        expected = scores_and_gradients(model, batch)
        for more in (1, 2 * PADDING_SEGMENT + 7):
            filled = fill_up(batch, batch.input_ids.shape[1] + more, pad_token_id=0)
            assert len(filled.target) > len(batch.target) and filled.num_scored == batch.num_scored
            assert_same(scores_and_gradients(model, filled), expected)


@settings(max_examples=20, deadline=None)
@given(random_pairs(), st.booleans(), st.integers(0, 150))
def test_any_row_filled_up_is_the_same(rows, share_prompt, more):
    batch = pack_rows(rows, pad_token_id=0, share_prompt=share_prompt)
    filled = fill_up(batch, batch.input_ids.shape[1] + more, pad_token_id=0)
    assert_same(scores_and_gradients(LLAMA, filled), scores_and_gradients(LLAMA, batch))


def varlen_in_math(q, k, v, layout, rules):
    """What a library's variable-length attention does with a layout's offsets."""
    outputs = []
    queries, keys = layout.query_offsets.tolist(), layout.key_offsets.tolist()
    for i in range(len(queries) - 1):
        of_q, of_k = slice(*queries[i : i + 2]), slice(*keys[i : i + 2])
        scores = torch.einsum("qhe,khe->hqk", q[of_q], k[of_k].repeat_interleave(2, 1))
        R, K = scores.shape[1:]
        hidden = torch.ones(R, K, dtype=torch.bool).triu(K - R + 1)
        weights = (scores * rules.scale).masked_fill(hidden, float("-inf")).softmax(-1)
        outputs.append(torch.einsum("hqk,khe->qhe", weights, v[of_k].repeat_interleave(2, 1)))
    return torch.cat(outputs)


@pytest.mark.parametrize("share_prompt", [True, False])
def test_offsets_and_gathered_keys_of_variable_length_attention_cover_the_padding(share_prompt):
    model = build_model("llama", num_attention_heads=4, num_key_value_heads=2)
    attention = PackedAttention(name="varlen", attend=attend_varlen(varlen_in_math))
    batch = pack_rows(PAIRS, pad_token_id=0, share_prompt=share_prompt)
    filled = fill_up(batch, batch.input_ids.shape[1] + 100, pad_token_id=0)
    results = []
    for attend, rows in ((build_attention("eager"), batch), (attention, filled)):
        model.zero_grad()
        logps_N = TokenScorer(model, attend)(rows)
        logps_N.sum().backward()
        results.append((logps_N.detach(), {n: p.grad.clone() for n, p in model.named_parameters()}))
    assert_same(*results)


def test_every_score_of_a_filled_batch_is_as_long_as_its_targets():
    model, batch = build_model("llama"), pack_rows(PAIRS, pad_token_id=0)
    filled = fill_up(batch, 200, pad_token_id=0)
    assert (filled.target[batch.num_scored :] == IGNORED).all()
    padding = filled.score_index[batch.num_scored :]
    assert len(padding.unique()) == len(padding) == SCORED_MULTIPLE - batch.num_scored
    scorer = TokenScorer(model, build_attention("sdpa"))
    for call in (
        lambda b: scorer(b, scorer.states(b)).kl,
        lambda b: scorer(b, scorer.states(b)).reference_logps,
        lambda b: scorer.tdpo1_values(b, scorer.states(b)),
    ):
        torch.testing.assert_close(call(filled), call(batch), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("layout", ["padded", "packed", "filled"])
def test_the_head_computes_what_is_in_the_loss_alone(layout, monkeypatch):
    build_rows = partial(pad_rows if layout == "padded" else pack_rows, pad_token_id=0)
    rows = [
        row._replace(
            chosen_scored=[i % 2 == 0 for i in range(len(row.chosen_ids))],
            rejected_scored=[i % 3 == 0 for i in range(len(row.rejected_ids))],
        )
        for row in PAIRS
    ]
    masked, whole = build_rows(rows), build_rows(PAIRS)
    is_scored = masked.target != IGNORED
    M = int(is_scored.sum())
    if layout == "filled":
        masked = fill_up(masked, masked.input_ids.shape[1] + 9, pad_token_id=0)
        M = SCORED_MULTIPLE
    head_rows = []
    ops = ("token_logps", "token_logps_and_kl", "tdpo1_token_values")
    for op in (getattr(scorer, name) for name in ops):

        def count_rows(hidden, *args, op=op, **options):
            head_rows.append(len(hidden))
            return op(hidden, *args, **options)

        monkeypatch.setattr(scorer, op.__name__, count_rows)
    policy = TokenScorer(LLAMA, None if layout == "padded" else build_attention("sdpa"))
    for call in (
        policy,
        lambda b: policy(b, policy.states(b)).kl,
        lambda b: policy.tdpo1_values(b, policy.states(b)),
    ):
        results = []
        for batch in (masked, whole):
            LLAMA.zero_grad()
            values_N = call(batch).where(is_scored, 0)
            values_N.sum().backward()
            gradients = {name: p.grad.clone() for name, p in LLAMA.named_parameters()}
            results.append((values_N.detach(), gradients))
        assert_same(*results)
        assert (call(masked)[~is_scored] == 0).all()
    assert set(head_rows) == {M, len(is_scored)} and head_rows.count(M) == 6


def test_lengths_are_few_and_pass_the_limit_only_where_a_row_does():
    for most in (7, 100, 8192, 30_001):
        lengths = {filled_length(n, max_tokens=most) for n in range(1, most + 1)}
        assert len(lengths) <= NUM_LENGTHS and max(lengths) == most
        assert all(n <= filled_length(n, max_tokens=most) for n in range(1, 2 * most, 13))
        assert all(filled_length(n, max_tokens=most) == n for n in lengths)


def test_pairs_share_prompts_among_themselves_where_layers_compute_each_response():
    pairs = [EncodedRow([5] * 20, [6, 7, i], [8, i]) for i in range(9, 19)]
    columns = EncodedColumns.of_rows(pairs)
    for among_rows, computed in ((True, 20 + 10 * 3), (False, 10 * 23)):
        layout = PackedRows(share_prompt=True, max_tokens=100, among_rows=among_rows)
        plan = layout.plan(columns, num_ranks=1, min_micro_batches=1)
        assert sum(batch.num_tokens for [batch] in plan) == computed
        built = [layout.build(columns, batch, pad_token_id=0) for [batch] in plan]
        assert sum(batch.input_ids.numel() for batch in built) == computed
        assert layout.build_rows(pairs, pad_token_id=0).input_ids.numel() == computed
        for [batch] in plan:
            # what such a layer computes, every response with its prompt
            alone = len(batch.rows) * (2 * 20 + 3)
            assert among_rows or alone < 2 * batch.num_tokens
        [first, *_] = layout.split(columns, plan[0][0], 50)
        assert first.num_tokens <= 50


def test_a_plan_says_how_long_its_rows_are_built():
    generator = np.random.default_rng(0)

    def ids() -> list[int]:
        return generator.integers(3, 90, generator.integers(2, 40)).tolist()

    columns = EncodedColumns.of_rows([EncodedRow(ids(), ids(), ids()) for _ in range(40)])
    layout = PackedRows(share_prompt=True, max_tokens=500, few_lengths=True)
    plan = layout.plan(columns, num_ranks=2, min_micro_batches=1)
    parts = layout.split(columns, plan[0][0], 200)
    assert len(parts) > 1 and all(part.num_tokens <= 200 for part in parts)
    [[with_row, without]] = layout.plan(
        columns.take(np.arange(1)), num_ranks=2, min_micro_batches=1
    )
    assert len(with_row.rows) == 1 and not len(without.rows)
    for batch in [*plan[0], *plan[-1], *parts, with_row, without]:
        built = layout.build(columns, batch, pad_token_id=0)
        assert built.input_ids.shape == built.position_ids.shape == (1, batch.num_tokens)
        assert built.layout.segments[-1].stop == batch.num_tokens <= 500
