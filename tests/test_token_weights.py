import math
import random

import pytest
from hypothesis import given
from hypothesis import strategies as st

from fastpref.token_weights import (
    align_weights,
    prepare_weights,
    token_digest,
    transform_weights,
)

LISTS = st.lists(st.floats(-50, 50), max_size=40)


@pytest.mark.parametrize(
    ("weights", "method", "params", "expected"),
    [
        ([-3.0, 0.25], "origin", {}, [-3.0, 0.25]),
        ([3, 1, 2], "binary", {}, [1, 1, 1]),
        ([5, 4, 3, 2, 1], "binary", {"top_percent": 50}, [1, 1, 0, 0, 0]),
        # a value tied across the cut gets 0 everywhere, as the map by value of the seed has it
        ([1, 1, 1, 0], "binary", {"top_percent": 50}, [0, 0, 0, 0]),
        ([2, 1, 1, 0], "binary", {"top_percent": 50}, [1, 0, 0, 0]),
        ([1, 1, 0, 0], "binary", {"top_percent": 50}, [1, 1, 0, 0]),
        ([1, 1, 1, 0], "binary", {"top_percent": 50, "ties": "equal"}, [1, 1, 1, 0]),
        ([3, 2, 1, 0], "binary", {"top_percent": 50, "ties": "equal"}, [1, 1, 0, 0]),
        ([2, 1, 1, 0], "binary", {"top_percent": 50, "ties": "equal"}, [1, 1, 1, 0]),
        ([2, 1, 1, 0], "binary", {"top_percent": 20, "ties": "equal"}, [0, 0, 0, 0]),
        ([-5, 0.5, 7], "threshold", {}, [-1, 0.5, 1]),
        ([-5, 7], "threshold", {"lower_threshold": 0.5, "upper_threshold": 0.5}, [0.5, 0.5]),
        ([0, 0.75, 9, -9], "threshold_and_scale", {}, [1.0, 1.15, 1.3, 0.7]),
        ([1, 1, 1], "rank_based", {}, [0.7, 1.0, 1.3]),
        ([0.3, -1, 2, -1], "rank_based", {}, [1.1, 0.7, 1.3, 0.9]),
        ([1, 1, 1], "rank_based", {"ties": "equal"}, [1.0, 1.0, 1.0]),
        ([0.3, -1, 2, -1], "rank_based", {"ties": "equal"}, [1.1, 0.8, 1.3, 0.8]),
        ([], "rank_based", {"ties": "equal"}, []),
        ([4.0], "rank_based", {}, [1.0]),
        ([], "rank_based", {}, []),
        ([0, 1, -9, 9], "paper", {}, [1, math.e, math.exp(-0.5), math.exp(1.5)]),
        ([0.0], "paper", {"k": 2.0, "L": 0.5, "U": 1.0}, [2 * math.exp(0.5)]),
    ],
)
def test_transforms_reproduce_the_golden_values(weights, method, params, expected):
    assert transform_weights(weights, method, **params) == pytest.approx(expected, abs=1e-12)


@given(LISTS)
def test_every_transform_keeps_length_and_stays_in_its_range(weights):
    ranges = {
        "binary": (0, 1),
        "threshold": (-1, 1),
        "threshold_and_scale": (0.7, 1.3),
        "random": (0.7, 1.3),
        "rank_based": (0.7, 1.3),
        "paper": (math.exp(-0.5), math.exp(1.5)),
    }
    for method, (low, high) in ranges.items():
        transformed = transform_weights(weights, method)
        assert len(transformed) == len(weights)
        assert all(low - 1e-9 <= weight <= high + 1e-9 for weight in transformed), method


@given(LISTS)
def test_rank_based_weights_ascend_with_the_log_ratio(weights):
    transformed = transform_weights(weights, "rank_based")
    ranked = sorted(range(len(weights)), key=weights.__getitem__)
    assert [transformed[i] for i in ranked] == sorted(transformed)


@pytest.mark.parametrize(
    ("method", "params", "named"),
    [
        ("rank_base", {}, "rank_based"),
        ("threshold", {"lower_threshold": 2.0}, "lower_threshold"),
        ("threshold_and_scale", {"min_val": 1.0, "max_val": 1.0}, "min_val"),
        ("threshold_and_scale", {"min_val": 2.0}, "min_val=2.0 must not exceed max_val=1.5"),
        ("random", {"min_val": 2.0}, "min_val"),
        ("paper", {"L": 3.0}, "L=3.0"),
        ("rank_based", {"ties": "sed"}, "rank_based.ties .*nearest: seed"),
        ("binary", {"ties": "equl"}, "binary.ties .*nearest: equal"),
        ("rank_based", {"min_scale": 2.0}, "min_scale"),
        ("threshold_and_scale", {"max_scale": 0.0}, "max_scale"),
        ("binary", {"top_percent": -20}, "top_percent must be >= 0"),
        ("binary", {"top_percent": 120}, "top_percent must be .*<= 100"),
        ("binary", {"top_percent": math.nan}, "top_percent must be"),
        ("binary", {"percent": 20}, "no parameter 'percent'.*top_percent"),
        ("origin", {"k": 1.0}, "no parameter 'k', only none"),
        ("paper", {"U": math.inf}, "paper.U must be finite"),
        ("paper", {"k": -1.0}, "paper.k must be > 0"),
        ("paper", {"k": None}, "paper.k must be a number, got None"),
        ("random", {"rng": 5}, "random.rng must be a random.Random, got 5"),
        (None, {}, "transform.method must be a name, got None"),
        ("paper", {"U": 1000.0, "L": 900.0}, r"paper makes inf of the weight 1.0 .*'U': 1000.0"),
        ("random", {"min_val": -1e308, "max_val": 1.7e308}, "random makes inf .*'max_val'"),
        ("threshold_and_scale", {"min_val": 0, "max_val": 5e-324}, "scale makes inf .*'max_val'"),
    ],
)
def test_an_unknown_method_or_reversed_bounds_are_refused_by_name(method, params, named):
    with pytest.raises(ValueError, match=named):
        transform_weights([1.0], method, **params)


@pytest.mark.parametrize("method", ["origin", "binary", "rank_based", "paper", "random"])
@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ([0.5, math.nan], "finite, got nan at place 1"),
        ([-math.inf], "finite, got -inf at place 0"),
        ([[0.5, 1.0]], r"list of numbers, got the shape \(1, 2\)"),
        ([10**400], "list of finite numbers: int too large"),
    ],
)
def test_weights_that_are_no_list_of_finite_numbers_are_refused(method, weights, named):
    with pytest.raises(ValueError, match=named):
        transform_weights(weights, method)


def test_a_weight_that_a_transform_makes_infinite_is_named_with_its_place():
    with pytest.raises(ValueError, match=r"makes inf of the weight 800\.0 at place 2 with"):
        transform_weights([1.0, 2.0, 800.0, 3.0], "paper", U=1000.0)


def test_random_follows_the_global_generator_unless_given_one():
    random.seed(5)
    drawn = transform_weights([0.0] * 3, "random")
    random.seed(5)
    assert transform_weights([9.0] * 3, "random") == drawn
    assert transform_weights([0.0] * 3, "random", rng=random.Random(5)) == drawn


def test_the_chosen_list_changes_sign_before_the_transform():
    chosen, rejected = prepare_weights([2.0, -3.0], [2.0, -3.0], "threshold", {}, row_seed="0")
    assert chosen == [-1.0, 1.0]
    assert rejected == [1.0, -1.0]


def test_random_weights_depend_on_the_row_seed_alone():
    random.seed(0)
    first = prepare_weights([0.0] * 4, [0.0] * 4, "random", {}, row_seed="0:7")
    random.random()
    assert prepare_weights([0.0] * 4, [0.0] * 4, "random", {}, row_seed="0:7") == first
    assert prepare_weights([0.0] * 4, [0.0] * 4, "random", {}, row_seed="0:8") != first
    assert first[0] != first[1]


def test_the_last_kept_token_weighs_zero_unless_eos_has_a_weight():
    weights = [1.0, 2.0, 3.0]
    assert align_weights(weights, 4, None) == [1.0, 2.0, 3.0, 0.0]
    # a truncation silences the last survivor
    assert align_weights(weights, 2, None) == [1.0, 0.0]
    assert align_weights(weights, 4, 0.5) == [1.0, 2.0, 3.0, 0.5]
    assert align_weights(weights, 2, 0.5) == [1.0, 2.0]


@given(st.lists(st.integers(-3, 3).map(float), min_size=1, max_size=30))
def test_with_equal_ties_equal_values_get_equal_weights_and_the_mean_stays(weights):
    ranked = transform_weights(weights, "rank_based", ties="equal")
    assert len(set(zip(weights, ranked, strict=True))) == len(set(weights))
    assert sum(ranked) == pytest.approx(sum(transform_weights(weights, "rank_based")))
    top = transform_weights(weights, "binary", top_percent=40, ties="equal")
    assert len(set(zip(weights, top, strict=True))) == len(set(weights))
    assert sum(top) >= int(len(weights) * 0.4)


def test_a_weight_of_eos_from_the_file_stays_with_eos():
    weights = [1.0, 2.0, 3.0]
    assert align_weights(weights, 3, None, has_eos=True) == weights
    assert align_weights(weights, 3, 0.5, has_eos=True) == [1.0, 2.0, 0.5]
    # cut: EOS went, and nothing stands for it
    assert align_weights(weights, 2, None, has_eos=True) == [1.0, 2.0]


def test_a_token_digest_tells_other_tokens_and_other_borders():
    # as in files that earlier versions have written
    assert token_digest([1, 2], [3], [4]) == "c19adb290ce35902"
    others = [([1], [2, 3], [4]), ([1, 2], [3], [5]), ([1, 2], [4], [3]), ([1, 2], [3, 4], [])]
    assert len({token_digest(*ids) for ids in [([1, 2], [3], [4]), *others]}) == 5
