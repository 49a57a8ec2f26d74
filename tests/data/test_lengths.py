"""Histograms of lengths: every row is in one bin, and the limit parts them."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from small_data import byte_tokenizer, make_config, pair, write_jsonl

from fastpref.cli.length_table import LIMIT, draw
from fastpref.config import SFTConfig
from fastpref.data.audit.lengths import MOST_BINS, _histogram, measure_lengths
from fastpref.data.encode import encode_source
from fastpref.data.options import data_options
from fastpref.data.source import read_rows


@given(st.lists(st.integers(1, 5000), min_size=1, max_size=200), st.integers(1, 3000))
def test_every_row_is_in_the_bin_of_its_length(values, limit):
    histogram = _histogram("prompt", np.array(values), limit, "max_prompt_length")
    edges, counts = histogram.edges, histogram.counts
    for i, count in enumerate(counts):
        end = edges[i + 1] if i + 1 < len(counts) else max(values)
        assert count == sum(edges[i] < value <= max(end, edges[i + 1]) for value in values)
    assert sum(counts) == histogram.num_rows == len(values)
    assert len(counts) <= MOST_BINS + 2
    within = histogram.bins_within
    if within is not None:
        assert sum(counts[within:]) == histogram.num_over
    assert (within is None) == (limit > 3 * max(values))


def test_a_line_of_blocks_has_a_stroke_where_rows_are_cut():
    histogram = _histogram("prompt", np.array([2, 2, 2, 2, 3, 7]), 4, "max_prompt_length")
    assert histogram.edges[:5] == [0, 1, 2, 3, 4]
    assert draw(histogram) == f" █▂ {LIMIT}   "[: histogram.bins_within] + draw(histogram)[4:]
    assert draw(histogram)[:5] == f" █▂ {LIMIT}"


def measured(tmp_path, rows, **options):
    write_jsonl(tmp_path / "data" / "set", "train", rows)
    config = data_options(make_config(tmp_path, **options))
    [source] = read_rows(config, "train", quiet=True)
    _, encoded = encode_source(source, byte_tokenizer(), config.encode)
    return {x.name: x for x in measure_lengths([encoded], config.encode)}


@pytest.mark.parametrize("truncation", ["seed", "fill", "drop"])
def test_lengths_are_those_before_anything_is_cut_or_left_out(tmp_path, truncation):
    rows = [pair("Q" * 40, "y" * 9, "n" * 19), pair("Q", "yes", "no"), pair("Q", "", "no")]
    found = measured(
        tmp_path,
        rows,
        max_length=30,
        max_prompt_length=12,
        data={"truncation": truncation, "max_dropped": 1.0},
    )
    # each response with its EOS; the row without a response has no tokens
    assert {name: (x.longest, x.num_over, x.num_rows) for name, x in found.items()} == {
        "prompt": (40, 1, 2),
        "chosen": (10, 0, 2),
        "rejected": (20, int(truncation == "seed"), 2),
        "longer sequence": (60, 1, 2),
    }
    limits = [30 - 12] * 2 if truncation == "seed" else [30] * 2
    assert [x.limit for x in found.values()] == [12, *limits, 30]


def test_a_prompt_that_nothing_cuts_is_not_too_long(tmp_path):
    rows = [pair("Q" * 20, "yes", "no"), pair("Q" * 20, "y" * 15, "no")]
    found = measured(tmp_path, rows, max_length=30, max_prompt_length=16)
    # a response may be longer than what a prompt of max_prompt_length leaves it
    assert {name: x.num_over for name, x in found.items()} == {
        "prompt": 1,
        "chosen": 1,
        "rejected": 0,
        "longer sequence": 1,
    }
    found = measured(tmp_path, [pair("Q", "y" * 15, "no")], max_length=30, max_prompt_length=16)
    assert found["chosen"].longest > found["chosen"].limit and found["chosen"].num_over == 0


def test_sft_has_one_response(tmp_path):
    found = measured(tmp_path, [pair("Q", "yes", "n" * 9)], loss=SFTConfig())
    assert {name: x.longest for name, x in found.items()} == {
        "prompt": 1,
        "response": 4,
        "sequence": 5,
    }
