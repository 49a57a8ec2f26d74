"""Splits held out of data as people have it: shards, other names of splits, the hub."""

import logging

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from small_data import TEMPLATE, byte_tokenizer, make_config, pair, pairs, write_jsonl

from fastpref.config.data import SPLITS
from fastpref.data.announce import read_files, read_splits
from fastpref.data.audit.report import report_split
from fastpref.data.encode import load_split
from fastpref.data.options import data_options
from fastpref.data.parts import check_sources, own_parts
from fastpref.data.selection import COPY
from fastpref.data.source import read_rows
from fastpref.errors import DataError
from fastpref.train.orders import build_train_order

NAMES = {"train": "train_prefs"}


def options_of(tmp_path, *names, **data):
    return data_options(make_config(tmp_path, names=names or ("set",), data=data))


def conversation(row, *, answered=("chosen", "rejected")):
    """A row as UltraFeedback has it: whole conversations beside the question."""
    question = {"role": "user", "content": row["prompt"]}
    answers = {side: [question, {"role": "assistant", "content": row[side]}] for side in answered}
    return {"prompt": row["prompt"], **answers}


def write_shards(folder, rows, *, split="train_prefs", sizes=(30, 10)):
    folder.mkdir(parents=True, exist_ok=True)
    for i, size in enumerate(sizes):
        table = pyarrow.Table.from_pylist(rows[:size])
        pyarrow.parquet.write_table(table, folder / f"{split}-0000{i}-of-0000{len(sizes)}.parquet")
        rows = rows[size:]


def prompts_of(rows):
    return set(rows.dataset["prompt"][:])


@pytest.fixture
def repository(tmp_path, monkeypatch):
    """A repository of the hub without a test split; `datasets` finds it in the current folder."""
    write_shards(tmp_path / "org" / "name" / "data", [conversation(row) for row in pairs(40)])
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_prompts_are_held_out_of_a_hub_data_set_without_a_test_split(repository, caplog):
    caplog.set_level(logging.INFO, logger="fastpref")
    options = options_of(repository, "org/name", split_names=NAMES, test_fraction=0.3)
    [[train], [test]] = read_splits(options, SPLITS, quiet=False).rows
    assert len(prompts_of(train)) + len(prompts_of(test)) == 40
    assert not prompts_of(train) & prompts_of(test)
    assert (train.counts.split, test.counts.split) == SPLITS
    assert test.place(0) == f"org/name:{test.dataset[0]['row']}"
    assert [record["prompt"] for record in test.records()] == [
        f"Q{line - 1}:" for line in test.dataset["row"][:]
    ]
    assert "test: org/name: rows of " in caplog.text
    assert f"org/name has no test split: {len(test.dataset)} of 40" in caplog.text
    # what files and hub have by themselves is what weights are estimated for
    caplog.clear()
    [whole] = read_files(options, quiet=False)
    assert len(whole.dataset) == 40 and "train: org/name: rows of " in caplog.text


def test_a_missing_split_of_the_hub_is_answered_with_its_other_names_and_a_fraction(repository):
    options = options_of(repository, "org/name", split_names=NAMES)
    message = r"no split 'test', only train_prefs; or hold out prompts.*data\.test_fraction=0\.05"
    with pytest.raises(DataError, match=message):
        check_sources(options)
    # without what to train on there is nothing to hold out
    with pytest.raises(DataError) as caught:
        check_sources(options_of(repository, "org/name", test_fraction=0.1))
    assert "no split 'train'" in str(caught.value)
    assert str(caught.value).endswith("data.split_names={train: train_prefs}")
    rows = [conversation(row) for row in pairs(4)]
    write_shards(repository / "org" / "other" / "data", rows, sizes=(4,))
    write_shards(repository / "org" / "other" / "data", rows, split="test_prefs", sizes=(4,))
    with pytest.raises(DataError, match=r"{train: train_prefs, test: test_prefs}; or hold out"):
        check_sources(options_of(repository, "org/other", split_names=NAMES), ["test"])
    # parts of a split are written beside its name
    names = {"train": "train_prefs[:50%]", "test": "train_prefs[50%:]"}
    options = options_of(repository, "org/other", split_names=names, test_fraction=0.1)
    assert [part.split for part in own_parts(options)] == ["train", "test"]
    [[train], [test]] = read_splits(options, SPLITS, quiet=True).rows
    assert (len(train.dataset), len(test.dataset)) == (2, 2)


def test_a_split_of_another_name_and_a_fraction_are_both_offered_for_a_folder(tmp_path):
    for split in ("train", "validation"):
        write_jsonl(tmp_path / "data" / "set", split, pairs(4))
    with pytest.raises(
        DataError, match=r"data\.split_names={test: validation}; or .*data\.test_fraction=0\.05"
    ):
        check_sources(options_of(tmp_path))


def test_a_test_split_with_a_shard_missing_is_not_held_out_from_what_is_trained_on(tmp_path):
    folder = tmp_path / "data" / "set"
    write_shards(folder, pairs(40))
    write_shards(folder, pairs(4), split="test", sizes=(2, 2))
    (folder / "test-00001-of-00002.parquet").unlink()
    for split in SPLITS:
        with pytest.raises(DataError, match="1 of 2 shards of 'test' are there"):
            read_rows(options_of(tmp_path, split_names=NAMES, test_fraction=0.1), split, quiet=True)


def test_rows_held_out_of_shards_and_copies_are_named_by_shard_and_row(tmp_path):
    folder = tmp_path / "data" / "set"
    rows = [*pairs(29), pair("bad", "", ""), *pairs(10)]
    write_shards(folder / "data", rows)
    options = options_of(tmp_path, split_names=NAMES, test_fraction=0.3, deduplicate=True)
    second = str(folder / "data" / "train_prefs-00001-of-00002.parquet")
    lines = {f"Q{i}:": f"{second}:{i + 1}" for i in range(10)}
    held_out = set()
    for split in SPLITS:
        encoded = load_split(options, split, byte_tokenizer(), vocab_size=258, quiet=True)
        [rows] = read_rows(options, split, quiet=True)
        report = report_split(encoded, [rows], byte_tokenizer(), options.encode)
        copies = [row.place for row in report.rows if row.drop == COPY]
        # the first one of each side, on the page as in the account
        assert copies == [rows.counts.first_dropped[COPY]]
        assert copies[0] == next(
            place for prompt, place in lines.items() if prompt in prompts_of(rows)
        )
        assert rows.counts.dropped[COPY] == len(prompts_of(rows) & set(lines))
        held_out |= prompts_of(rows)
    assert len(held_out) == 29


def test_shares_are_of_datasets_however_many_files_each_has(tmp_path):
    write_shards(tmp_path / "data" / "sharded", pairs(40), split="train", sizes=(20, 15, 5))
    write_jsonl(tmp_path / "data" / "small", "train", pairs(8))
    config = make_config(
        tmp_path, names=("sharded", "small"), data={"shares": [0.25, 0.75], "test_fraction": 0.3}
    )
    train = load_split(data_options(config), "train", byte_tokenizer(), vocab_size=258, quiet=True)
    order = build_train_order(
        train, config.data, seed=0, batch_size=4, n_epochs=None, n_examples=40
    )
    places = [train.places.name(row) for row in range(len(train.dataset))]
    is_small = np.array([place.startswith(f"{tmp_path}/data/small/") for place in places])
    for step in range(order.num_steps):
        assert is_small[order.batch(step)].sum() == 3


def test_arguments_of_the_template_reach_the_page(tmp_path):
    template = "{% if shout %}!{{ shout }}!{% endif %}" + TEMPLATE
    rows = [conversation(row) for row in pairs(3)]
    write_jsonl(tmp_path / "data" / "set", "train", rows)
    options = options_of(tmp_path, template_kwargs={"shout": "hey"})
    tokenizer = byte_tokenizer(template)
    encoded = load_split(options, "train", tokenizer, vocab_size=300, quiet=True)
    report = report_split(
        encoded, read_rows(options, "train", quiet=True), tokenizer, options.encode
    )
    for row in report.rows:
        assert "!hey!" in "".join(token.text for part in row.parts for token in part.tokens)
    prompt = report.rows[0].parts[0]
    assert [token.id for token in prompt.tokens] == encoded.dataset[0]["prompt_ids"]
