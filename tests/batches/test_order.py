import functools
import random
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from fastpref.batches.order import GlobalOrder, compatible_shuffle_seeds
from fastpref.config import DataConfig
from fastpref.errors import ConfigError
from fastpref.train.orders import build_eval_order, build_train_order

GROUPS = np.array([0, 1, 0, 2, 3, 3, 3, 4, 5, 1, 6])
SIZES = st.lists(st.integers(1, 4), min_size=1, max_size=25)


def groups_of(sizes):
    return np.repeat(np.arange(len(sizes)), sizes)


@given(SIZES, st.integers(0, 2**32 - 1), st.integers(0, 3))
def test_an_epoch_holds_every_row_once_with_the_pairs_of_a_prompt_adjacent(sizes, seed, epoch):
    groups = np.random.default_rng(0).permutation(groups_of(sizes))
    order = GlobalOrder(groups, batch_size=2, seed=seed, n_epochs=4, drop_last=False)
    rows = order.epoch_rows(epoch)
    assert sorted(rows) == list(range(len(groups)))
    visited = groups[rows]
    assert np.count_nonzero(np.diff(visited)) == len(sizes) - 1
    # within a prompt, rows keep the order of the file
    assert all(np.diff(rows[visited == group]).min(initial=1) > 0 for group in groups)


@given(SIZES, st.integers(1, 9), st.integers(1, 3), st.booleans(), st.data())
def test_a_batch_is_a_pure_function_of_seed_and_step(sizes, batch_size, n_epochs, drop_last, data):
    options = {"batch_size": batch_size, "n_epochs": n_epochs, "drop_last": drop_last, "seed": 3}
    groups = groups_of(sizes)
    if drop_last and len(groups) < batch_size:
        return
    walked = GlobalOrder(groups, **options)
    batches = [walked.batch(step).tolist() for step in range(walked.num_steps)]
    step = data.draw(st.integers(0, walked.num_steps - 1))
    assert GlobalOrder(groups, **options).batch(step).tolist() == batches[step]
    assert walked.batch(step).tolist() == batches[step]
    # the batches of an epoch are its rows, cut one after another
    per_epoch = walked.steps_per_epoch
    joined = [row for batch in batches[:per_epoch] for row in batch]
    assert joined == walked.epoch_rows(0)[: len(joined)].tolist()
    assert len(batches) == n_epochs * per_epoch


def test_seed_and_epoch_change_the_order():
    def rows(seed, epoch):
        order = GlobalOrder(np.arange(50), batch_size=5, seed=seed, n_epochs=2)
        return order.epoch_rows(epoch).tolist()

    assert rows(0, 0) != rows(1, 0)
    assert rows(0, 0) != rows(0, 1)


def test_the_order_never_changes_between_versions():
    order = GlobalOrder(np.arange(8), batch_size=4, seed=0, n_epochs=2)
    expected = [[6, 3, 1, 4], [5, 2, 7, 0], [1, 3, 6, 2], [0, 7, 5, 4]]
    assert [order.batch(step).tolist() for step in range(4)] == expected


@functools.cache
def permutation_seeds_of(repository):
    upper = {"dpo": 2**32, "tdpo": 2**31, "tisdpo": 2**31}[repository]
    np.random.seed(0)
    return np.random.randint(0, upper, size=1_000_000).tolist()


def simulate(groups, repository, *, batch_size, n_epochs, n_examples):
    """What the batch iterators of the three repositories do, written down plainly."""
    permutation_seeds = iter(permutation_seeds_of(repository))
    prompts = {}
    for row, group in enumerate(groups):
        prompts.setdefault(group, []).append(row)
    flat_data = list(prompts.values())
    epoch = num_examples = 0
    batches = []
    while n_epochs is None or epoch < n_epochs:
        shuffle_seed = next(permutation_seeds)
        random.seed(71 if repository == "tisdpo" else shuffle_seed)
        random.shuffle(flat_data)
        batch = []
        for rows in flat_data:
            for row in rows:
                batch.append(row)
                num_examples += 1
                if len(batch) == batch_size:
                    batches.append(batch)
                    if n_examples is not None and num_examples >= n_examples:
                        return batches
                    batch = []
        epoch += 1
    return batches


@pytest.mark.parametrize("repository", ["dpo", "tdpo", "tisdpo"])
@pytest.mark.parametrize("batch_size", [1, 3, 4, 11])
@pytest.mark.parametrize(
    ("n_epochs", "n_examples"), [(1, None), (3, None), (None, 11), (None, 12), (2, 10), (5, 33)]
)
def test_compatible_orders_give_the_batches_of_the_repositories(
    repository, batch_size, n_epochs, n_examples
):
    expected = simulate(
        GROUPS, repository, batch_size=batch_size, n_epochs=n_epochs, n_examples=n_examples
    )
    order = GlobalOrder(
        GROUPS,
        batch_size=batch_size,
        seed=123,
        n_epochs=n_epochs,
        n_examples=n_examples,
        order=repository,
    )
    assert [order.batch(step).tolist() for step in range(order.num_steps)] == expected


@settings(max_examples=60)
@given(SIZES, st.integers(1, 6), st.integers(1, 80))
def test_compatible_orders_count_examples_as_the_repositories(sizes, batch_size, n_examples):
    groups = groups_of(sizes)
    if len(groups) < batch_size:
        return
    limits = {"batch_size": batch_size, "n_epochs": None, "n_examples": n_examples}
    order = GlobalOrder(groups, seed=0, order="tdpo", **limits)
    assert order.num_steps == len(simulate(groups, "tdpo", **limits))


@given(st.integers(1, 30), st.integers(1, 9), st.integers(1, 100), st.booleans())
def test_n_examples_is_reached_and_not_overshot_by_a_whole_batch(
    num_rows, batch_size, n_examples, drop_last
):
    if drop_last and num_rows < batch_size:
        return
    order = GlobalOrder(
        np.arange(num_rows),
        batch_size=batch_size,
        seed=0,
        n_examples=n_examples,
        drop_last=drop_last,
    )
    sizes = [len(order.batch(step)) for step in range(order.num_steps)]
    assert sum(sizes) >= n_examples > sum(sizes[:-1])


def test_not_a_single_step_is_a_config_error_that_names_the_way_out():
    with pytest.raises(ConfigError, match=r"data\.drop_last=false or batch_size <= 3"):
        GlobalOrder(np.arange(3), batch_size=4, seed=0, n_epochs=1)
    with pytest.raises(ConfigError, match="n_epochs or n_examples"):
        GlobalOrder(np.arange(3), batch_size=2, seed=0)


def test_rows_left_out_and_small_datasets_are_warned_about():
    def warning(num_rows, drop_last):
        options = {"batch_size": 4, "seed": 0, "n_epochs": 1, "drop_last": drop_last}
        return GlobalOrder(np.arange(num_rows), **options).warning

    assert "2 of 10 rows are left out" in warning(10, True)
    assert "only 3 rows for batch_size=4" in warning(3, False)
    assert warning(8, True) is None
    assert warning(10, False) is warning(4, False) is None


def test_a_step_out_of_range_is_refused():
    order = GlobalOrder(np.arange(8), batch_size=4, seed=0, n_epochs=1)
    with pytest.raises(IndexError, match=r"\[0, 2\), got 2"):
        order.batch(2)


@pytest.mark.parametrize("repository", ["dpo", "tdpo", "tisdpo"])
def test_a_prompt_without_rows_keeps_its_place_in_a_compatible_order(repository):
    limits = {"batch_size": 1, "n_epochs": 3, "n_examples": None}
    [*expected] = simulate(np.arange(12), repository, **limits)
    left_out = [0, 5, 11]
    kept = np.delete(np.arange(12), left_out)
    order = GlobalOrder(kept, seed=0, order=repository, num_prompts=12, **limits)
    visited = [kept[row] for step in range(order.num_steps) for row in order.batch(step)]
    assert visited == [row for [row] in expected if row not in left_out]


@pytest.mark.parametrize("repository", ["dpo", "tdpo", "tisdpo"])
def test_rows_of_a_run_and_held_out_ones_come_in_the_order_that_was_asked_for(repository):
    split: Any = SimpleNamespace(groups=np.delete(np.arange(12), [0, 5]), num_prompts=12)
    options, limits = DataConfig(order=repository), {"seed": 0, "batch_size": 3}
    orders = [
        build_train_order(split, options, n_epochs=1, n_examples=None, **limits),
        build_eval_order(split, options, n_examples=10, **limits),
    ]
    expected = GlobalOrder(split.groups, order=repository, num_prompts=12, n_epochs=1, **limits)
    for order in orders:
        assert order.epoch_rows(0).tolist() == expected.epoch_rows(0).tolist()


@pytest.mark.parametrize("shares", [None, [0.5, 0.5]], ids=["together", "mixed"])
def test_a_run_ends_with_its_epochs_and_an_evaluation_with_the_held_out_rows(shares):
    split: Any = SimpleNamespace(groups=np.arange(10), num_prompts=10, sizes=(6, 4))
    limits = {"seed": 0, "batch_size": 3}
    for drop_last, num_steps in ((True, 6), (False, 8)):
        options = DataConfig(shares=shares, drop_last=drop_last)
        for n_examples in (None, 99):
            order = build_train_order(split, options, n_epochs=2, n_examples=n_examples, **limits)
            assert order.num_steps == num_steps
        # no row twice, and the last ones too
        for n_examples, of_eval in ((99, 4), (4, 2)):
            held_out = build_eval_order(split, options, n_examples=n_examples, **limits)
            assert held_out.num_steps == of_eval


def test_the_order_by_seed_does_not_know_of_prompts_without_rows():
    kept = np.array([1, 1, 4, 2, 9, 4])
    limits = {"batch_size": 2, "seed": 3, "n_epochs": 2}
    with_gaps = GlobalOrder(kept, num_prompts=20, **limits)
    compact = GlobalOrder(np.array([0, 0, 1, 2, 3, 1]), **limits)
    for step in range(compact.num_steps):
        assert with_gaps.batch(step).tolist() == compact.batch(step).tolist()


def test_an_order_that_no_repository_has_is_not_taken_for_one():
    with pytest.raises(KeyError, match="short_first"):
        compatible_shuffle_seeds("short_first", 1)
