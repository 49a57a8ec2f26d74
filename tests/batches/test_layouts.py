"""How rows lie in batches, and how these are divided among micro-batches and ranks."""

from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import datasets
import numpy as np
import pytest
import torch

from fastpref.batch import EncodedRow
from fastpref.batches.columns import EncodedColumns
from fastpref.batches.layouts import PackedRows, PaddedRows, RowLayout
from fastpref.batches.loader import Loader
from fastpref.batches.order import GlobalOrder

LENGTHS = [(3, 2, 4), (5, 1, 2), (2, 6, 3), (4, 4, 1), (6, 2, 2), (1, 3, 3), (2, 2, 5)]
"""Tokens of the prompt, the chosen and the rejected response of each row."""
LAYOUTS = {"packed": PackedRows(share_prompt=False, max_tokens=50), "padded": PaddedRows()}


def loader_of(lengths: list[tuple[int, int, int]], layout: RowLayout, **options: Any) -> Loader:
    """A loader of rows of these lengths, in steps of five."""
    ids = iter(range(10, 10_000))
    names = ("prompt_ids", "chosen_ids", "rejected_ids")
    table = {
        name: [[next(ids) for _ in range(of_row[i])] for of_row in lengths]
        for i, name in enumerate(names)
    }
    order = GlobalOrder(np.arange(len(lengths)), batch_size=5, seed=0, n_epochs=1, drop_last=False)
    data: Any = SimpleNamespace(dataset=datasets.Dataset.from_dict(table))
    return Loader(data=data, order=order, layout=layout, pad_token_id=0, **options)


def worlds(size: int) -> list[Any]:
    device = torch.device("cpu")
    return [SimpleNamespace(data_rank=i, data_size=size, device=device) for i in range(size)]


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


@pytest.mark.parametrize(
    ("lengths", "num_ranks", "sizes"),
    [
        ([50] * 8, 2, [[2, 2], [2, 2]]),
        # three would hold the tokens, but not with the padding of a short row to a long one
        ([10] * 4 + [50] * 4, 1, [[2]] * 4),
    ],
)
def test_padded_rows_take_as_few_micro_batches_as_hold_them(lengths, num_ranks, sizes):
    columns = EncodedColumns.of_rows([EncodedRow([1] * n, [2] * n, [3] * n) for n in lengths])
    plan = PaddedRows(max_tokens=400).plan(columns, num_ranks=num_ranks, min_micro_batches=1)
    assert [[len(part.rows) for part in of_ranks] for of_ranks in plan] == sizes


def test_a_padded_batch_has_a_row_for_each_sequence_and_is_one_token_without_any():
    for rows, shape in (([], (1, 1)), ([EncodedRow([1, 2], [3, 4], [])], (1, 4))):
        batch = PaddedRows().build_rows(rows, pad_token_id=0)
        assert batch.input_ids.shape == batch.attention_mask.shape == shape
        assert (batch.attention_mask == 1).all()


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_ranks_share_the_rows_of_a_step_in_no_more_micro_batches_than_have_rows(layout):
    loader, ranks = loader_of(LENGTHS, layout, min_micro_batches=4), worlds(2)
    in_data = [2 * p + chosen + rejected for p, chosen, rejected in LENGTHS]
    computed = []
    for index, num_micro_batches in enumerate((3, 1)):
        rows = loader.order.batch(index)
        steps = [loader.step(index, world) for world in ranks]
        seen = [x for step in steps for part in step.micro_batches for x in part.rows]
        assert sorted(seen) == list(range(len(rows)))
        batches = [batch for step in steps for batch in step.batches]
        computed.append(sum(batch.input_ids.numel() for batch in batches if batch.num_sequences))
        for step in steps:
            assert len(step.batches) == len(step.micro_batches) == num_micro_batches
            assert step.num_examples == len(rows)
            assert step.num_tokens == sum(in_data[row] for row in rows)
            assert step.num_computed == computed[-1]
    assert loader.savings(2, 2) == (sum(in_data), sum(computed))
    assert loader.savings(2, 1)[1] == computed[0]
    with loader.steps(ranks[0], 1) as rest:
        assert [step.num_examples for step in rest] == [2]


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_a_step_is_split_where_its_micro_batches_are_too_large(layout):
    loader, [world] = loader_of(LENGTHS[:5], layout, min_micro_batches=2), worlds(1)
    step = loader.step(0, world)
    sizes = [part.num_tokens for part in step.micro_batches]
    assert step.most_tokens == max(sizes) and sizes[0] != sizes[1]
    halves = loader.split(step, min(sizes), world)
    kept = step.micro_batches[sizes.index(min(sizes))]
    assert len(halves.batches) == 3
    assert any(part is kept for part in halves.micro_batches)
    assert len(kept.rows) == 2 and halves.most_tokens == kept.num_tokens
    singles = loader.split(step, 1, world)
    assert singles.most_tokens == 0
    for parts in (halves, singles):
        assert sorted(x for part in parts.micro_batches for x in part.rows) == list(range(5))
        assert parts.num_computed == sum(batch.input_ids.numel() for batch in parts.batches)
        assert (parts.num_examples, parts.num_tokens) == (5, step.num_tokens)


@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_known_log_probabilities_stand_beside_their_targets(layout):
    def known(columns: EncodedColumns) -> EncodedColumns:
        return replace(columns, reference_logps=-columns.ids.astype(np.float32))

    [world] = worlds(1)
    loader = loader_of(LENGTHS, layout, known=known, min_micro_batches=2)
    for batch in loader.step(0, world).batches:
        assert torch.equal(batch.reference_logps, -batch.target.float())
    for batch in loader_of(LENGTHS, layout).step(0, world).batches:
        assert batch.reference_logps is None
