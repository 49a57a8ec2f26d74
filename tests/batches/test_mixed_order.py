"""Sources mixed by shares: how many examples are of each, and that a step's rows are known."""

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from fastpref.batches.mixed_order import MixedOrder, interleave, whole_weights
from fastpref.errors import ConfigError

WEIGHTS = st.lists(st.integers(1, 40), min_size=1, max_size=5)
OPTIONS = {"batch_size": 4, "seed": 3, "n_epochs": 3}


def mixed(sizes, shares, **options):
    """An order over sources of that many prompts of one row each."""
    sources = np.repeat(np.arange(len(sizes)), sizes)
    rows = np.arange(len(sources))
    return MixedOrder(rows, sources=sources, shares=shares, **{**OPTIONS, **options}), sources


def visited(order):
    return np.concatenate([order.batch(step) for step in range(order.num_steps)])


@given(WEIGHTS)
def test_any_start_of_the_turns_has_each_source_to_within_one(weights):
    turns, total = interleave(weights), sum(weights)
    lengths = np.arange(1, total + 1)
    for source, weight in enumerate(weights):
        counts = np.cumsum(turns == source)
        assert np.abs(counts * total - lengths * weight).max() < total
        assert counts[-1] == weight


@settings(max_examples=50)
@given(
    st.lists(st.tuples(st.integers(1, 30), st.integers(1, 9)), min_size=1, max_size=4),
    st.booleans(),
    st.integers(1, 5),
    st.just(3),
)
# to a millionth, which is what shares are taken to: as many turns, in seconds
@example([(30, 1), (7, 9), (1, 3)], False, 3, 6)
def test_any_number_of_examples_is_in_the_shares_to_within_one(
    parts, drop_last, batch_size, digits
):
    sizes, weights = zip(*parts, strict=True)
    if sum(sizes) < batch_size:
        return
    shares = [round(weight / sum(weights), digits) for weight in weights]
    order, sources = mixed(sizes, shares, drop_last=drop_last, batch_size=batch_size)
    rows = visited(order)
    lengths = np.arange(1, len(rows) + 1)
    for source, share in enumerate(shares):
        counts = np.cumsum(sources[rows] == source)
        assert np.abs(counts - lengths * share / sum(shares)).max() < 1
    assert len(rows) == order.num_examples == 3 * order.examples_per_epoch


@pytest.mark.parametrize("shares", [[0.5, 0.5], [0.6, 0.4]])
def test_no_row_comes_again_before_all_others_of_its_source(shares):
    order, sources = mixed([50, 6], shares, n_epochs=5)
    rows = visited(order)
    for source, size in ((0, 50), (1, 6)):
        own = rows[sources[rows] == source]
        passes = [own[start : start + size] for start in range(0, len(own) - size + 1, size)]
        assert len(passes) == round(280 * shares[source]) // size
        for one in passes:
            assert len(set(one.tolist())) == size
        # every pass in an order of its own
        assert len({tuple(one.tolist()) for one in passes}) == len(passes)


def test_an_epoch_has_as_many_examples_as_there_are_rows():
    order, _ = mixed([50, 7], [0.5, 0.5], drop_last=False)
    assert (order.examples_per_epoch, order.steps_per_epoch, order.num_steps) == (57, 15, 45)
    order, _ = mixed([50, 7], [0.5, 0.5])
    assert (order.examples_per_epoch, order.steps_per_epoch, order.num_steps) == (56, 14, 42)
    # the incomplete batch is no loss: what did not come is next
    assert order.warning is None
    order, _ = mixed([50, 7], [0.5, 0.5], n_epochs=None, n_examples=61)
    assert (order.num_steps, order.num_examples) == (16, 64)


def test_the_mix_says_how_often_each_source_is_passed():
    order, sources = mixed([50, 7], [0.25, 0.75])
    rows = visited(order)
    for num_examples in (len(rows), 2, 7):
        for share, expected, size, source in zip(
            order.mix(num_examples), (0.25, 0.75), (50, 7), (0, 1), strict=True
        ):
            assert (share.num_rows, share.share) == (size, expected)
            own = sources[rows[:num_examples]] == source
            assert share.passes == np.count_nonzero(own) / size


@given(st.integers(0, 100))
def test_a_step_is_known_without_those_before_it(step):
    sizes, shares = [9, 200, 2], [0.2, 0.5, 0.3]
    options = {"n_epochs": 2}
    step %= mixed(sizes, shares, **options)[0].num_steps
    alone = mixed(sizes, shares, **options)[0].batch(step)
    walked = visited(mixed(sizes, shares, **options)[0])
    assert alone.tolist() == walked[4 * step : 4 * step + 4].tolist()


def test_the_pairs_of_a_prompt_follow_one_another_within_their_source():
    groups = np.array([0, 1, 0, 2, 1, 3, 3, 4])
    sources = np.array([0, 0, 0, 0, 0, 1, 1, 1])
    order = MixedOrder(groups, sources=sources, shares=[0.5, 0.5], batch_size=1, seed=0, n_epochs=2)
    rows = visited(order)
    for source in (0, 1):
        [size] = np.bincount(sources)[[source]]
        own = groups[rows[sources[rows] == source]][:size]
        assert np.count_nonzero(np.diff(own)) == len(set(own.tolist())) - 1


def test_the_seed_changes_the_rows_and_not_whose_they_are():
    one, sources = mixed([20, 30], [0.4, 0.6])
    other, _ = mixed([20, 30], [0.4, 0.6], seed=4)
    assert visited(one).tolist() != visited(other).tolist()
    assert sources[visited(one)].tolist() == sources[visited(other)].tolist()


def test_the_order_never_changes_between_versions():
    order, _ = mixed([3, 5], [0.5, 0.5], n_epochs=1)
    assert visited(order).tolist() == [2, 7, 1, 6, 0, 4, 2, 3]
    assert interleave([3, 2, 2]).tolist() == [0, 1, 2, 0, 0, 1, 2]
    assert interleave([5, 3, 1]).tolist() == [0, 1, 0, 0, 1, 0, 1, 0, 2]


def test_shares_are_taken_to_a_millionth():
    assert whole_weights([0.7, 0.3]) == [7, 3]
    assert whole_weights([0.333333, 0.333333, 0.333333]) == [1, 1, 1]
    assert whole_weights([0.999999, 0.000001]) == [999_999, 1]


def test_not_a_single_step_is_a_config_error():
    with pytest.raises(ConfigError, match="batch_size <= 3"):
        mixed([2, 1], [0.5, 0.5])
