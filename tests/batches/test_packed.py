"""Packed rows give the numbers of padded ones, prompts shared or not; plans keep the budget."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from packed_pairs import PAIRS, assert_same, build, random_pairs, scores_and_gradients
from tiny_models import FAMILIES, build_model

from fastpref.batch import IGNORED, EncodedRow
from fastpref.batches.columns import EncodedColumns
from fastpref.batches.packed import pack, pack_rows
from fastpref.batches.packing_plan import plan_step
from fastpref.batches.padded import pad_rows
from fastpref.model.attention.interface import build_attention
from fastpref.model.scorer import TokenScorer

LLAMA = build_model("llama")


@pytest.mark.parametrize("family", FAMILIES)
def test_packed_rows_give_the_scores_and_gradients_of_padded_ones(family):
    model = build(family)
    padded = scores_and_gradients(model, pad_rows(PAIRS, pad_token_id=0))
    for share_prompt in (True, False):
        batch = pack_rows(PAIRS, pad_token_id=0, share_prompt=share_prompt)
        assert batch.layout.has_branches == share_prompt
        assert_same(scores_and_gradients(model, batch), padded)


@settings(max_examples=30, deadline=None)
@given(random_pairs(), st.booleans())
def test_any_pairs_packed_give_the_scores_and_gradients_of_padded_rows(rows, share_prompt):
    packed = pack_rows(rows, pad_token_id=0, share_prompt=share_prompt)
    padded = pad_rows(rows, pad_token_id=0)
    for name in ("target", "sequence_ids", "num_sequences"):
        ours, theirs = getattr(packed, name), getattr(padded, name)
        assert ours == theirs if isinstance(ours, int) else torch.equal(ours, theirs)
    assert_same(scores_and_gradients(LLAMA, packed), scores_and_gradients(LLAMA, padded))


def test_sft_rows_pack_and_equal_prompts_are_shared():
    rows = [row._replace(rejected_ids=[]) for row in PAIRS]
    padded = scores_and_gradients(LLAMA, pad_rows(rows, pad_token_id=0))
    batch = pack_rows(rows, pad_token_id=0)
    assert batch.num_sequences == len(rows) and batch.layout.has_branches
    assert_same(scores_and_gradients(LLAMA, batch), padded)


def test_token_weights_stand_beside_their_targets():
    rows = [
        row._replace(
            chosen_weights=[0.1 * id for id in row.chosen_ids],
            rejected_weights=[0.1 * id for id in row.rejected_ids],
        )
        for row in PAIRS
    ]
    batch = pack_rows(rows, pad_token_id=0)
    torch.testing.assert_close(batch.token_weights, 0.1 * batch.target)


def test_rows_without_a_mask_are_learned_whole_beside_rows_with_one():
    masked = EncodedRow([3], [4, 5], [6, 7], chosen_scored=[False, True])
    columns = EncodedColumns.of_rows([EncodedRow([3], [8, 9], [10]), masked])
    assert columns.targets(np.arange(2)).tolist() == [8, 9, IGNORED, 5, 10, 6, 7]
    assert columns.num_scored == 6


def test_the_layout_computes_each_prompt_once_and_no_last_token():
    batch = pack_rows(PAIRS, pad_token_id=0)
    # three prompts, and every response without its last token
    assert batch.input_ids.shape[1] == 4 + 1 + 2 + (3 + 1 + 0 + 0 + 3 + 3 + 2 + 4 + 0 + 2)
    assert batch.layout.segments[-1].stop == batch.input_ids.shape[1]
    assert all(segment.stop > segment.start for segment in batch.layout.segments)
    # the prompt's last position is scored once for each of its six branches
    assert (batch.score_index == 3).sum() == 6


def test_what_responses_begin_with_is_computed_once_and_scored_for_each():
    pair = EncodedRow([5, 6], [7, 8, 9, 10, 2], [7, 8, 11, 2])
    batch = pack_rows([pair], pad_token_id=0)
    assert batch.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 11]]
    assert batch.position_ids.tolist() == [[0, 1, 2, 3, 4, 5, 4]]
    assert batch.layout.segments == ((0, 6, 0, 0), (6, 7, 0, 4))
    assert batch.score_index.tolist() == [1, 2, 3, 4, 5, 1, 2, 3, 6]
    # a third response leaves one token in common
    third = pair._replace(rejected_ids=[7, 12, 13, 2])
    assert pack_rows([pair, third], pad_token_id=0).input_ids.shape[1] == 2 + 1 + 3 + 2 + 3 + 2
    # equal responses are one
    same = pair._replace(rejected_ids=pair.chosen_ids)
    assert not pack_rows([same], pad_token_id=0).layout.has_branches
    apart = pack_rows([pair], pad_token_id=0, share_prompt=False)
    assert apart.input_ids.tolist() == [[5, 6, 7, 8, 9, 10, 5, 6, 7, 8, 11]]


def test_a_batch_without_rows_keeps_the_graph_and_gives_zero_gradients():
    logps_N, grads = scores_and_gradients(LLAMA, pack_rows([], pad_token_id=0))
    assert logps_N.shape == (0,) and grads
    assert not any(grad.any() for grad in grads.values())


@pytest.mark.parametrize(
    ("row", "message"),
    [
        (EncodedRow([], [3], [4]), "prompt_ids must not be empty, row 1"),
        (EncodedRow([3], [], [4]), "chosen_ids must not be empty, row 1"),
        (EncodedRow([3], [4], []), "rejected_ids must be given in all rows or none, row 1"),
    ],
)
def test_an_empty_side_is_refused(row, message):
    with pytest.raises(ValueError, match=message):
        pack_rows([PAIRS[0], row], pad_token_id=0)


def hh_like_rows(number: int) -> list[EncodedRow]:
    """Lengths with the medians of Anthropic HH, every fourth prompt once more."""
    rng = np.random.default_rng(0)

    def ids(median: float) -> list[int]:
        length = int(np.clip(rng.lognormal(math.log(median), 0.8), 1, 256))
        return rng.integers(3, 96, length).tolist()

    rows: list[EncodedRow] = []
    for i in range(number):
        prompt = rows[i - 1].prompt_ids if i % 4 == 3 else ids(90)
        rows.append(EncodedRow(prompt, ids(35), ids(35)))
    return rows


def test_hh_like_rows_need_three_quarters_of_their_tokens_and_less_than_half_of_padded_ones():
    in_data, computed, padded = 0, 0, 0
    rows = hh_like_rows(256)
    for start in range(0, len(rows), 8):
        step = rows[start : start + 8]
        columns = EncodedColumns.of_rows(step)
        in_data += int(columns.num_tokens.sum())
        plan = plan_step(columns, max_tokens=8192)
        computed += sum(batch.num_tokens for of_ranks in plan for batch in of_ranks)
        padded += pad_rows(step, pad_token_id=0).input_ids.numel()
    assert computed <= 0.75 * in_data
    assert computed <= 0.45 * padded


@settings(max_examples=60, deadline=None)
@given(
    random_pairs(),
    st.integers(1, 60),
    st.integers(1, 3),
    st.integers(1, 3),
    st.booleans(),
)
def test_a_plan_holds_every_row_once_and_keeps_the_budget(
    rows, max_tokens, num_ranks, min_micro_batches, share_prompt
):
    columns = EncodedColumns.of_rows(rows)
    options = {
        "max_tokens": max_tokens,
        "num_ranks": num_ranks,
        "min_micro_batches": min_micro_batches,
        "share_prompt": share_prompt,
    }
    plan = plan_step(columns, **options)
    assert min_micro_batches <= len(plan) <= max(min_micro_batches, -(-len(rows) // num_ranks))
    assert {len(of_ranks) for of_ranks in plan} == {num_ranks}
    parts = [batch for of_ranks in plan for batch in of_ranks]
    assert sorted(np.concatenate([part.rows for part in parts])) == list(range(len(rows)))
    for part in parts:
        batch = pack(columns, part, pad_token_id=0, share_prompt=share_prompt)
        if len(part.rows):
            assert batch.input_ids.numel() == part.num_tokens
        assert part.num_tokens <= max_tokens or len(part.rows) == 1
    again = plan_step(columns, **options)
    for part, same in zip(parts, (b for of_ranks in again for b in of_ranks), strict=True):
        assert part.rows.tolist() == same.rows.tolist()


# without regard to prompts, rows would be dealt in turn
@pytest.mark.parametrize(("number", "in_a_row"), [(4, 1), (3, 2)])
def test_equal_prompts_meet_in_one_micro_batch(number, in_a_row):
    prompts = [i // in_a_row % number for i in range(12)]
    rows = [EncodedRow([prompt + 3] * 20, [7, 2], [8, 2]) for prompt in prompts]
    plan = plan_step(EncodedColumns.of_rows(rows), max_tokens=60)
    for (part,) in plan:
        assert len(part.rows) == 12 // number * len(set(part.prompts))
    assert sum(part.num_tokens for (part,) in plan) == number * 20 + 12 * 2


def test_a_prompt_is_counted_once_where_its_rows_meet_again():
    # all three rows together are too large a piece for two ranks, so each is dealt by itself
    columns = EncodedColumns.of_rows([EncodedRow([3] * 30, [7] * 5, [8] * 5)] * 3)
    [of_ranks] = plan_step(columns, max_tokens=46, num_ranks=2)
    assert [part.num_tokens for part in of_ranks] == [30 + 2 * 8, 30 + 8]


def test_one_prompt_of_all_rows_keeps_every_rank_busy():
    columns = EncodedColumns.of_rows([EncodedRow([3, 4], [7] * 9, [8] * 9)] * 8)
    [of_ranks] = plan_step(columns, max_tokens=2048, num_ranks=4)
    assert [len(part.rows) for part in of_ranks] == [2] * 4


def test_ranks_get_equal_loads_of_unequal_rows():
    columns = EncodedColumns.of_rows(hh_like_rows(64))
    for of_ranks in plan_step(columns, max_tokens=2048, num_ranks=4):
        loads = [batch.num_tokens for batch in of_ranks]
        assert max(loads) <= 1.1 * sum(loads) / len(loads)


def test_any_split_into_micro_batches_and_ranks_gives_the_same_gradient():
    columns = EncodedColumns.of_rows(PAIRS)

    def gradients(**options) -> dict[str, torch.Tensor]:
        LLAMA.zero_grad()
        plan = plan_step(columns, **options)
        for of_ranks in plan:
            for part in of_ranks:
                batch = pack(columns, part, pad_token_id=0, share_prompt=True)
                logps_N = TokenScorer(LLAMA, build_attention("sdpa"))(batch)
                (logps_N.sum() / len(PAIRS)).backward()
        return {name: parameter.grad.clone() for name, parameter in LLAMA.named_parameters()}

    whole = gradients(max_tokens=1000)
    splits = [{"max_tokens": 12}, {"max_tokens": 1}, {"max_tokens": 1000, "min_micro_batches": 3}]
    for options in [*splits, {"max_tokens": 15, "num_ranks": 3}]:
        for name, grad in gradients(**options).items():
            error = (grad - whole[name]).norm() / whole[name].norm()
            assert error <= 1e-6, f"{options} {name}: {error:.2e}"
