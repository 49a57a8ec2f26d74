"""How rows lie in batches, and how these are divided."""

import pytest

from fastpref.batch import EncodedRow
from fastpref.batches.columns import EncodedColumns
from fastpref.batches.layouts import PaddedRows


@pytest.mark.parametrize(("max_tokens", "sizes"), [(500, [2, 2, 1]), (1000, [5]), (30, [1] * 5)])
def test_padded_parts_have_no_more_tokens_than_they_may_where_rows_can_be_divided(
    max_tokens, sizes
):
    columns = EncodedColumns.of_rows([EncodedRow([1] * 50, [2] * 50, [3] * 50)] * 5)
    layout = PaddedRows(max_tokens=1000)
    [[micro_batch]] = layout.plan(columns, num_ranks=1, min_micro_batches=1)
    parts = layout.split(columns, micro_batch, max_tokens)
    assert [len(part.rows) for part in parts] == sizes
    assert [part.num_tokens for part in parts] == [200 * size for size in sizes]
