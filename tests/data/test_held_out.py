"""Prompts held out of a dataset without a test split, and copies left out."""

import logging
import random

import pytest
from datasets import Dataset
from small_data import byte_tokenizer, make_config, pair, pairs, write_jsonl

from fastpref.config import DataConfig, SFTConfig
from fastpref.config.data import SPLITS
from fastpref.data.announce import read_files, read_splits
from fastpref.data.encode import load_split
from fastpref.data.options import data_options
from fastpref.data.parts import own_parts
from fastpref.data.selection import COPY, HeldOut, select_rows
from fastpref.data.source import read_rows
from fastpref.errors import DataError
from fastpref.train.orders import build_train_order
from fastpref.train.resume.fingerprints import split_digest


def write(tmp_path, rows, name="set", split="train"):
    return write_jsonl(tmp_path / "data" / name, split, rows)


def options_of(tmp_path, *names, fraction=0.25, seed=0, **data):
    config = make_config(
        tmp_path,
        names=names or ("set",),
        seed=seed,
        data={"test_fraction": fraction, **data},
    )
    return data_options(config)


def prompts_of(options, split):
    return [
        prompt
        for rows in read_rows(options, split, quiet=True)
        for prompt in rows.dataset["prompt"][:]
    ]


def sides(options):
    return [set(prompts_of(options, split)) for split in SPLITS]


def two_of_each(number):
    """Rows of which each prompt has two, the second ones far behind the first."""
    return [*pairs(number), *(pair(f"Q{i}:", f" yes {i}!", f" no {i}") for i in range(number))]


def test_a_prompt_with_all_its_rows_is_on_one_side(tmp_path):
    write(tmp_path, two_of_each(200))
    options = options_of(tmp_path)
    train, test = sides(options)
    assert train | test == {f"Q{i}:" for i in range(200)} and not train & test
    for split, prompts in zip(SPLITS, (train, test), strict=True):
        assert len(prompts_of(options, split)) == 2 * len(prompts)


@pytest.mark.parametrize("fraction", [0.05, 0.5, 0.9])
def test_about_the_fraction_of_the_prompts_is_held_out(tmp_path, fraction):
    # however many rows they have
    rows = [row for i, row in enumerate(pairs(2000)) for _ in range(1 + i % 3)]
    write(tmp_path, rows)
    _, test = sides(options_of(tmp_path, fraction=fraction))
    # five standard deviations of a draw
    assert abs(len(test) / 2000 - fraction) < 5 * (fraction * (1 - fraction) / 2000) ** 0.5


def test_the_draw_knows_of_no_other_row_order_or_dataset(tmp_path):
    rows = two_of_each(100)
    write(tmp_path, rows)
    _, test = sides(options_of(tmp_path))
    random.Random(0).shuffle(rows)
    write(tmp_path, rows[:150], "shuffled")
    write(tmp_path, [pair("another", " yes", " no"), *pairs(60)], "other")
    options = options_of(tmp_path, "other", "shuffled")
    for part in read_rows(options, "test", quiet=True):
        assert set(part.dataset["prompt"][:]) & {f"Q{i}:" for i in range(100)} <= test
    # a prompt of two datasets is on one side of both
    train, held_out = sides(options)
    assert not train & held_out


def test_the_seed_draws_others_and_a_larger_fraction_more(tmp_path):
    write(tmp_path, pairs(300))
    _, test = sides(options_of(tmp_path))
    _, larger = sides(options_of(tmp_path, fraction=0.5))
    _, other = sides(options_of(tmp_path, seed=1))
    assert test < larger
    assert test != other
    # a stage of another version must not train on what this one holds out
    drawn = sides(options_of(tmp_path, fraction=0.01))[1]
    assert drawn == {"Q124:", "Q138:", "Q165:", "Q198:", "Q202:", "Q233:"}


def test_a_conversation_is_drawn_by_its_messages(tmp_path):
    def chat(i, answer):
        return {
            "prompt": [{"role": "user", "content": f"Q{i}"}],
            "chosen": [{"role": "assistant", "content": answer}],
            "rejected": [{"content": "no", "role": "assistant"}],
        }

    write(tmp_path, [chat(i, answer) for answer in ("a", "b") for i in range(80)])
    train, test = sides(options_of(tmp_path))
    assert len(train) + len(test) == 80 and not train & test and test


def test_prompts_that_say_the_same_are_on_one_side_and_warned_about(tmp_path, caplog):
    composed = [pair(f"Is caf\u00e9 {i} good?", " yes", " no") for i in range(80)]
    spaced = [pair(f" Is  cafe\u0301 {i}\tgood? \n", " sure", " no") for i in range(80)]
    write(tmp_path, [*composed, *spaced])

    def chat(i, **more):
        turns = [{"role": "user", "content": f"Q{i}"}], [{"role": "assistant", "content": "a"}]
        turns[0][0].update(more)
        return {
            "prompt": turns[0],
            "chosen": turns[1],
            "rejected": [turns[1][0] | {"content": "b"}],
        }

    write(tmp_path, [row for i in range(80) for row in (chat(i), chat(i, id=str(i)))], "chats")
    for name in ("set", "chats"):
        sizes = []
        for split in SPLITS:
            [rows] = read_rows(options_of(tmp_path, name), split, quiet=True)
            sizes.append(len(rows.dataset))
            assert len(set(rows.dataset["prompt_hash"][:])) * 2 == len(rows.dataset)
            # their numbers, by which SFT takes one row of each, tell them apart as before
            assert rows.num_prompts == 160
        assert sum(sizes) == 160 and sizes[1]
    write(tmp_path, spaced[:1], split="test")
    write(tmp_path, [chat(1, speaker=3), chat(99, name="Ann")], "chats", "test")
    read_splits(options_of(tmp_path, "set", "chats"), SPLITS, quiet=False)
    assert "test: 1 of 1 (100 %) prompts of" in caplog.text
    assert "test: 1 of 2 (50 %) prompts of" in caplog.text


def test_a_test_split_that_is_there_is_taken_as_it_is(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="fastpref")
    write(tmp_path, pairs(40), "whole")
    write(tmp_path, pairs(40), "divided")
    write(tmp_path, [pair("T", " yes", " no")], "whole", "test")
    options = options_of(tmp_path, "whole", "divided")
    (whole, divided), (test, held_out) = read_splits(options, SPLITS, quiet=False).rows
    assert (len(whole.dataset), len(test.dataset)) == (40, 1)
    assert len(divided.dataset) + len(held_out.dataset) == 40 and len(held_out.dataset)
    assert "whole has a test split, taken as it is" in caplog.text
    share = f"{len(held_out.dataset)} of 40"
    assert f"divided has no test split: {share}" in caplog.text
    # what is held out of one is trained on in the other
    assert f"test: {share} (100 %) prompts of" not in caplog.text
    assert "prompts of" in caplog.text and "are in the train split too" in caplog.text


def test_without_a_fraction_a_missing_split_is_an_error_that_names_it(tmp_path):
    write(tmp_path, pairs(4))
    with pytest.raises(DataError, match=r"no file .*test\.jsonl.*data\.test_fraction=0\.05"):
        read_rows(options_of(tmp_path, fraction=0.0), "test", quiet=True)
    with pytest.raises(DataError, match=r"no folder .*nothing"):
        read_rows(options_of(tmp_path, "nothing"), "test", quiet=True)


@pytest.mark.parametrize(("fraction", "test", "train"), [(1e-6, 0, 30), (0.999999, 30, 0)])
def test_a_fraction_that_leaves_a_side_without_prompts_is_refused(tmp_path, fraction, test, train):
    write(tmp_path, [*pairs(30), pair("only empty", "", "")])
    rule = rf"of the 30 different prompts of .* {test} would be held out and {train} trained on"
    for split in SPLITS:
        with pytest.raises(DataError, match=rule):
            read_rows(options_of(tmp_path, fraction=fraction), split, quiet=True)


def test_weights_are_estimated_for_the_rows_as_the_files_have_them(tmp_path):
    write(tmp_path, [*pairs(20), *pairs(20)])
    options = options_of(tmp_path, deduplicate=True)
    assert [part.split for part in own_parts(options)] == ["train"]
    [rows] = read_files(options, quiet=True)
    assert len(rows.dataset) == 40
    assert len(list(rows.records())) == 40


def test_every_split_that_a_dataset_has_gets_weights_whatever_the_others_have(tmp_path):
    for name, split in (("whole", "train"), ("whole", "test"), ("divided", "train")):
        write(tmp_path, pairs(6), name, split)
    options = options_of(tmp_path, "whole", "divided")
    read = [(rows.name, rows.counts.split) for rows in read_files(options, quiet=True)]
    assert read == [("whole", "train"), ("divided", "train"), ("whole", "test")]
    # under these names a run on the weights holds out what a run on the rows does
    for name, split in read:
        write(tmp_path / "weights", pairs(6), name, split)
    assert sides(options_of(tmp_path / "weights", "whole", "divided")) == sides(options)
    write(tmp_path, pairs(6), "none", "other")
    with pytest.raises(DataError, match=r"none.train\.jsonl"):
        read_files(options_of(tmp_path, "whole", "none"), quiet=True)


def test_records_of_held_out_rows_are_theirs(tmp_path):
    write(tmp_path, pairs(40))
    for split in SPLITS:
        [rows] = read_rows(options_of(tmp_path), split, quiet=True)
        assert [record["prompt"] for record in rows.records()] == rows.dataset["prompt"][:]


def encoded(tmp_path, split="train", **options):
    return load_split(
        options_of(tmp_path, **options), split, byte_tokenizer(), vocab_size=258, quiet=True
    )


def test_another_fraction_is_other_data_for_caches_and_for_a_resumed_run(tmp_path):
    write(tmp_path, pairs(60))
    digests = set()
    for fraction in (0.0, 0.2, 0.4):
        split = encoded(tmp_path, fraction=fraction)
        [rows] = read_rows(options_of(tmp_path, fraction=fraction), "train", quiet=True)
        # not what the cache has of the other fractions
        assert len(split.dataset) == len(rows.dataset) == split.audit.kept
        digests.add(split_digest(split))
    assert len(digests) == 3
    test = encoded(tmp_path, "test", fraction=0.4)
    assert len(test.dataset) == 60 - len(split.dataset)
    assert {test.places.name(row) for row in range(3)} <= {
        f"{tmp_path}/data/set/train.jsonl:{line}" for line in range(1, 61)
    }


def test_copies_are_counted_and_warned_about(tmp_path, caplog):
    swapped = pair("Q0:", " no 0", " yes 0")
    write(tmp_path, [*pairs(5), *pairs(2), swapped])
    write(tmp_path, pairs(3), split="test")
    with caplog.at_level(logging.WARNING, logger="fastpref"):
        read_splits(options_of(tmp_path), SPLITS, quiet=False)
        load_split(options_of(tmp_path), "train", byte_tokenizer(), vocab_size=258, quiet=False)
    assert "train: pair seen before: 2 of 8 (25 %) rows (first:" in caplog.text
    assert "with chosen and rejected swapped: 1 of 8 (12.5 %) rows" in caplog.text
    assert "test: 3 of 3 (100 %) prompts of" in caplog.text


def test_deduplicating_leaves_later_copies_out_and_counts_them(tmp_path):
    swapped = pair("Q0:", " no 0", " yes 0")
    path = write(tmp_path, [*pairs(3), *pairs(2), swapped, *pairs(4)])
    [rows] = read_rows(options_of(tmp_path, fraction=0, deduplicate=True), "train", quiet=True)
    assert rows.dataset["row"][:] == [1, 2, 3, 6, 10]
    assert rows.counts.dropped == {COPY: 5}
    assert rows.counts.first_dropped == {COPY: f"{path}:4"}
    # more than data.max_dropped, but asked for
    many = write(tmp_path, [pair()] * 9, "many")
    [rows] = read_rows(
        options_of(tmp_path, "many", fraction=0, deduplicate=True), "train", quiet=True
    )
    assert len(rows.dataset) == 1 and many.is_file()


def test_a_row_that_is_dropped_is_no_copy_and_has_none():
    columns = {"drop": ["", "no text", "", "no text", ""], "group": [0, -1, 1, -1, 0]}
    columns |= {"prompt_hash": [1, 0, 2, 0, 1], "pair_hash": [5, 7, 7, 5, 5]}
    selected = select_rows(
        Dataset.from_dict(columns), "set", held_out=None, is_test=False, earlier=set()
    )
    assert selected.is_copy.tolist() == [False, False, False, False, True]


def test_rows_without_a_prompt_are_not_held_out():
    hashes = list(range(40))
    columns = {"drop": [""] * 40 + ["no prompt"] * 40, "group": hashes + [-1] * 40}
    columns |= {"prompt_hash": hashes * 2, "pair_hash": hashes * 2}
    sides = [
        select_rows(
            Dataset.from_dict(columns),
            "set",
            held_out=HeldOut(fraction=0.5, seed=0),
            is_test=is_test,
            earlier=None,
        ).rows.tolist()
        for is_test in (False, True)
    ]
    assert sides[0][-40:] == list(range(40, 80)) and 0 < len(sides[1]) < 40
    assert sorted(sides[0] + sides[1]) == list(range(80))


def test_copies_in_another_dataset_are_warned_about_and_left_out(tmp_path, caplog):
    write(tmp_path, pairs(3), "one")
    other = write(tmp_path, [pair(), *pairs(5)], "other")
    names = ("one", "other")
    with caplog.at_level(logging.WARNING, logger="fastpref"):
        read_splits(options_of(tmp_path, *names, fraction=0), ["train"], quiet=False)
    assert f"train: 3 of 6 (50 %) rows of {other} are in" in caplog.text
    options = options_of(tmp_path, *names, fraction=0, deduplicate=True)
    one, two = read_rows(options, "train", quiet=True)
    assert (len(one.dataset), two.dataset["row"][:]) == (3, [1, 5, 6])
    # which rows stay depends on the other dataset, and so does what is cached of them
    [alone] = read_rows(
        options_of(tmp_path, "other", fraction=0, deduplicate=True), "train", quiet=True
    )
    assert alone.fingerprint != two.fingerprint


def test_a_dataset_that_lies_in_an_earlier_one_is_told_of_and_left_out(tmp_path, caplog):
    empty = pair("E:", "", "")
    one = write(tmp_path, [*pairs(30), empty], "one")
    write(tmp_path, [*pairs(20), empty], "other")
    names = ("one", "other")
    options = options_of(tmp_path, *names, fraction=0, deduplicate=True, max_dropped=0.1)
    read_splits(options, ["train"], quiet=False)
    assert "train: every row of other is a copy of one of an earlier dataset" in caplog.text
    train = load_split(options, "train", byte_tokenizer(), vocab_size=258, quiet=True)
    assert (train.sizes, train.audit.sources) == ((30,), [str(one)])
    mixed = DataConfig(shares=[0.5, 0.5], deduplicate=True)
    with pytest.raises(DataError, match=r"2 shares, .* left of 1 datasets only, .*one.train"):
        build_train_order(train, mixed, seed=0, batch_size=2, n_epochs=1, n_examples=None)
    # other reasons to leave rows out are judged as ever
    strict = options_of(tmp_path, *names, fraction=0, deduplicate=True, max_dropped=0.04)
    with pytest.raises(DataError, match=r"other.*data.max_dropped=0.04: .*empty response 1"):
        read_rows(strict, "train", quiet=True)


def test_held_out_prompts_of_sft_are_not_among_the_demonstrations(tmp_path):
    write(tmp_path, two_of_each(50))
    config = make_config(tmp_path, loss=SFTConfig(), data={"test_fraction": 0.3})
    splits = [
        load_split(data_options(config), split, byte_tokenizer(), vocab_size=258, quiet=True)
        for split in SPLITS
    ]
    prompts = [{tuple(ids) for ids in split.dataset["prompt_ids"][:]} for split in splits]
    assert not prompts[0] & prompts[1]
    assert [len(split.dataset) for split in splits] == [len(side) for side in prompts]
    assert sum(map(len, prompts)) == 50
