"""The rows of the trial fill the tokens they are to take, with sequences as long as any."""

import pytest
from tiny_models import build_model

from fastpref.batches.layouts import PackedRows, PaddedRows, RowLayout
from fastpref.memory.worst_rows import LONG_PROMPT, Rows
from fastpref.model.scorer import TokenScorer

LONGEST = 32
SCORER = TokenScorer(build_model("llama"))
PACKED = {
    "shared": PackedRows(share_prompt=True, max_tokens=4096),
    "of one pair": PackedRows(share_prompt=True, max_tokens=4096, among_rows=False),
    "unshared": PackedRows(share_prompt=False, max_tokens=4096),
}


@pytest.mark.parametrize("pairs", [True, False])
@pytest.mark.parametrize("layout", [*PACKED.values(), PaddedRows()], ids=[*PACKED, "padded"])
def test_the_rows_of_a_trial_take_its_tokens_and_are_as_long_as_any(layout: RowLayout, pairs: bool):
    kind = Rows(layout, LONGEST, pairs=pairs, gathers_keys=False)
    parts = LONG_PROMPT if layout.repeats_prompts else 1
    for num_tokens in (1024, 24):
        rows = kind.worst(SCORER, num_tokens, weighted=True)
        batch = layout.build_rows(rows, pad_token_id=0)
        unscored = batch.num_sequences if isinstance(layout, PackedRows) else 0
        # whole tokens for each part of a sequence
        computed = batch.input_ids.numel() + unscored
        assert 0.7 * num_tokens < computed <= num_tokens + parts * len(rows)
        lengths = {len(row.prompt_ids) + len(row.chosen_ids) for row in rows}
        assert len(lengths) == 1 and max(lengths) <= LONGEST
        assert all(len(row.prompt_ids) == parts * len(row.chosen_ids) for row in rows)
        assert all(len(row.rejected_ids) == pairs * len(row.chosen_ids) for row in rows)
        assert len({tuple(row.prompt_ids) for row in rows}) == len(rows)
        assert batch.num_sequences == len(rows) * (1 + pairs)
        assert len(batch.token_weights) == len(batch.target)
    # what is less than one row is one
    assert len(rows) == 1
