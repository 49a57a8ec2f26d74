import logging
import re

import pytest
from small_data import byte_tokenizer, make_config, pair, pairs, write_jsonl

from fastpref.config import SFTConfig, TISDPOConfig, TransformConfig
from fastpref.data.audit.account import describe_example, run_audit
from fastpref.data.audit.html import histogram_svg
from fastpref.data.audit.lengths import Histogram
from fastpref.data.encode import load_split
from fastpref.data.options import data_options
from fastpref.errors import DataError


def write_splits(tmp_path, train, test):
    for split, rows in (("train", train), ("test", test)):
        write_jsonl(tmp_path / "data" / "set", split, rows)


def test_the_audit_accounts_for_both_splits_and_shows_a_row(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="fastpref")
    write_splits(tmp_path, [*pairs(3), pair("Q0:", " no 0", " yes 0")], pairs(2))
    splits = run_audit(data_options(make_config(tmp_path)), byte_tokenizer(), vocab_size=258)
    assert [(split.name, split.audit.kept) for split in splits] == [("train", 4), ("test", 2)]
    assert "swapped: 1 of 4 (25 %) rows" in caplog.text
    assert "' yes 0</s>'" in caplog.text


def test_the_audit_refuses_what_training_would(tmp_path):
    write_splits(tmp_path, pairs(2), [pair("Q", "same", "same")])
    with pytest.raises(DataError, match=r"split 'test'.*chosen equals rejected"):
        run_audit(data_options(make_config(tmp_path)), byte_tokenizer(), vocab_size=258)


def example(tmp_path, row, **options):
    write_splits(tmp_path, [row], [row])
    config = make_config(tmp_path, **options)
    split = load_split(data_options(config), "train", byte_tokenizer(), vocab_size=258, quiet=True)
    return describe_example(split, byte_tokenizer()).splitlines()


def test_an_example_shows_its_parts_and_what_the_loss_counts(tmp_path):
    prompt, chosen, rejected = example(
        tmp_path, pair("Q" * 300, "yes", "n" * 40), max_length=300, max_prompt_length=280
    )
    assert "prompt (280 tokens, not in the loss)" in prompt
    assert "Q … Q" in prompt
    assert "chosen (4 tokens, in the loss, EOS last): 'yes</s>'" in chosen
    assert "rejected (20 tokens, in the loss, cut, no EOS)" in rejected


def test_an_example_shows_the_range_of_its_weights(tmp_path):
    row = pair("Q", "yes", "no", chosen_weight=[1, -2, 3], rejected_weight=[1, 2])
    options = {"loss": TISDPOConfig(), "transform": TransformConfig(method="origin")}
    _, chosen, rejected = example(tmp_path, row, **options)
    assert "weights -3 to 2, last 0" in chosen
    assert "weights 0 to 2, last 0" in rejected


def test_an_example_of_sft_has_one_response(tmp_path):
    assert len(example(tmp_path, pair(), loss=SFTConfig())) == 2


def test_a_bar_says_which_lengths_it_has():
    histogram = Histogram("prompt", [1, 2, 4], [0, 1, 2, 5], 2, 5, 5, 9, "max_length", 0, 7)
    titles = re.findall("<title>(.*?)</title>", histogram_svg(histogram))
    assert titles == ["1 token: 1 rows", "2 tokens: 2 rows", "3 to 5 tokens: 4 rows"]
