import bz2
import csv
import gzip
import io
import json
import lzma
import os
from functools import partial
from pathlib import Path

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from small_data import byte_tokenizer, count_calls, make_config, pairs, write_jsonl

from fastpref.data.announce import describe_layout
from fastpref.data.encode import load_split
from fastpref.data.options import data_options
from fastpref.data.parts import check_sources, own_parts
from fastpref.data.source import read_rows
from fastpref.data.sources.delimited import SEPARATORS
from fastpref.data.sources.files import find_source, split_of
from fastpref.errors import DataError

ROWS = pairs(7)


def options_of(tmp_path, names=("set",), **data):
    return data_options(make_config(tmp_path, names=names, data=data))


def read(tmp_path, split="train", **options):
    [rows] = read_rows(options_of(tmp_path, **options), split, quiet=True)
    return rows


def refusal(tmp_path, **options):
    with pytest.raises(DataError) as caught:
        read(tmp_path, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def write(tmp_path, name, rows=ROWS):
    """Rows in the form that the file's name says."""
    path = tmp_path / "data" / "set" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".arrow":
        table = pyarrow.Table.from_pylist(rows)
        with pyarrow.ipc.new_file(path, table.schema) as file:
            file.write_table(table)
        return path
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        return path
    form = path.name.split(".")[1]
    if form in SEPARATORS:
        with io.StringIO() as file:
            table = csv.DictWriter(file, rows[0], delimiter=SEPARATORS[form])
            table.writeheader()
            table.writerows(rows)
            text = file.getvalue()
    elif form == "json":
        text = json.dumps(rows, indent=1)
    else:
        text = "".join(json.dumps(row) + "\n" for row in rows)
    compress = {".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
    compress[".zst"] = partial(pyarrow.compress, codec="zstd", asbytes=True)
    path.write_bytes(compress.get(path.suffix, bytes)(text.encode()))
    return path


@pytest.mark.parametrize(
    "name",
    [
        *("train.jsonl", "train.jsonl.gz", "train.parquet", "train.json", "train.json.gz"),
        *("train.jsonl.zst", "train.json.zst", "train.csv", "train.csv.gz", "train.tsv.zst"),
        *("train.ndjson", "train.ndjson.bz2", "train.json.bz2", "train.jsonl.xz", "train.csv.xz"),
        *("data/train.parquet", "train/0000.parquet", "data/train/part.jsonl"),
        *("data/train-00000-of-00001.parquet", "data/train-00000-of-00001-a1b2c3.parquet"),
    ],
)
def test_a_file_is_found_wherever_people_and_the_hub_put_it(tmp_path, name):
    path = write(tmp_path, name)
    rows = read(tmp_path)
    assert rows.dataset["chosen"][:] == [row["chosen"] for row in ROWS]
    assert (rows.source, rows.location.paths) == (str(path), (str(path),))
    assert list(rows.records()) == ROWS


@pytest.mark.parametrize(
    "names",
    [
        [f"data/train-0000{i}-of-00003.parquet" for i in range(3)],
        [f"train-0000{i}-of-00003.jsonl" for i in (1, 2, 3)],
        ["train_2.jsonl", "train_9.jsonl", "train_10.jsonl"],
        ["train/a.jsonl.gz", "train/b.jsonl.gz", "train/c.jsonl.gz"],
        ["train_0.jsonl", "train_1.jsonl.gz", "train_2.parquet"],
        ["train/a.parquet", "train/b.jsonl", "train/c.json"],
        ["train-00000-of-00003.json", "train-00001-of-00003.arrow", "train-00002-of-00003.jsonl"],
    ],
)
def test_shards_are_read_in_their_order_and_rows_named_by_shard_and_row(tmp_path, names):
    paths = [
        write(tmp_path, name, part)
        for name, part in zip(names, (ROWS[:3], ROWS[3:4], ROWS[4:]), strict=True)
    ]
    rows = read(tmp_path)
    assert rows.dataset["prompt"][:] == [row["prompt"] for row in ROWS]
    assert list(rows.records()) == ROWS
    assert [rows.place(i) for i in (2, 3, 5)] == [f"{paths[0]}:3", f"{paths[1]}:1", f"{paths[2]}:2"]
    assert rows.source == f"{paths[0]} … {paths[2].name} (3 files)"
    split = load_split(options_of(tmp_path), "train", byte_tokenizer(), vocab_size=258, quiet=True)
    assert [split.places.name(i) for i in (0, 6)] == [f"{paths[0]}:1", f"{paths[2]}:3"]
    write(tmp_path, names[2], [ROWS[0], {**ROWS[1], "chosen": None}])
    assert f"{paths[2]}:2:chosen: chosen is null" in refusal(tmp_path)
    skipped = read(tmp_path, on_error="skip").counts
    assert skipped.first_dropped["malformed row"].startswith(f"{paths[2]}:2:chosen")


def test_a_shard_that_is_missing_or_of_another_set_is_refused(tmp_path):
    write(tmp_path, "data/train-00000-of-00003.parquet")
    write(tmp_path, "data/train-00002-of-00003.parquet")
    assert "2 of 3 shards of 'train' are there: train-00000-of-00003" in refusal(tmp_path)
    write(tmp_path, "data/train-00000-of-00002.parquet")
    assert "shards of 'train' that do not belong together" in refusal(tmp_path)


def test_a_shard_that_is_missing_in_the_folder_of_a_split_is_refused(tmp_path):
    names = ("extra", "part-00000-of-00002", "part-00001-of-00002")
    _, first, _ = (write(tmp_path, f"train/{name}.jsonl") for name in names)
    assert len(read(tmp_path).dataset) == 3 * len(ROWS)
    first.unlink()
    assert "1 of 2 shards of 'train' are there: part-00001-of-00002" in refusal(tmp_path)


def test_whole_files_come_before_shards_and_the_folder_before_its_folder_data(tmp_path):
    write(tmp_path, "data/train-00000-of-00001.parquet", ROWS[:1])
    write(tmp_path, "train-00000-of-00001.jsonl", ROWS[:2])
    assert len(read(tmp_path).dataset) == 2
    write(tmp_path, "train.json", ROWS[:3])
    assert len(read(tmp_path).dataset) == 3
    write(tmp_path, "train.jsonl", ROWS[:4])
    assert len(read(tmp_path).dataset) == 4


def test_what_is_there_and_not_read_is_said(tmp_path):
    write(tmp_path, "train_0.jsonl", ROWS[:2])
    write(tmp_path, "train_0.parquet", ROWS[:3])
    write(tmp_path, "train_1.parquet", ROWS[3:4])
    rows = read(tmp_path)
    assert rows.dataset["prompt"][:] == [ROWS[i]["prompt"] for i in (0, 1, 3)]
    assert describe_layout(rows).endswith("; not read, as they come after it: train_0.parquet")
    write(tmp_path, "data/train.json")
    write(tmp_path, "train/a.jsonl")
    write(tmp_path, "train.jsonl", ROWS[:1])
    rows = read(tmp_path)
    assert describe_layout(rows).endswith(
        ": train_0.jsonl, train_1.parquet, train_0.parquet, train/a.jsonl, data/train.json"
    )
    # the cache is that of what is read
    (tmp_path / "data" / "set" / "train" / "a.jsonl").unlink()
    assert read(tmp_path).fingerprint == rows.fingerprint


def test_what_datasets_saved_to_disk_is_read(tmp_path):
    folder, saved = tmp_path / "data" / "set", datasets.Dataset.from_list(ROWS)
    splits = {"train": saved, "test": saved.select([4, 2])}
    datasets.DatasetDict(splits).save_to_disk(folder, num_shards={"train": 2, "test": 1})
    # a cache file of its own, which a loaded one leaves beside it
    loaded = datasets.load_from_disk(folder)
    loaded["train"].map(lambda row: row | {"chosen": "another"})
    assert len(list((folder / "train").iterdir())) == 5
    assert list(read(tmp_path).records()) == ROWS
    assert list(read(tmp_path, "test").records()) == [ROWS[4], ROWS[2]]
    for name in ("data-00000-of-00002", "data-00001-of-00002"):
        (folder / "train" / f"{name}.arrow").unlink()
    assert "no file" in refusal(tmp_path)


def test_what_a_data_file_may_end_with_is_said_where_there_is_none(tmp_path):
    (tmp_path / "data" / "set").mkdir(parents=True)
    (tmp_path / "data" / "set" / "train.xlsx").write_text("prompt,chosen,rejected\n")
    endings = (
        "train.jsonl (or .ndjson, .parquet, .json, .arrow, .csv, .tsv, those of text also .gz, "
        ".bz2, .xz or .zst, or shards of one)"
    )
    message = refusal(tmp_path)
    assert f"{endings}; found train.xlsx" in message
    # what cannot be read is no file that may be meant
    assert "nearest" not in message
    assert f"expected {endings} in it" in refusal(tmp_path, names=["other"])


def test_how_to_read_files_of_another_name_is_said(tmp_path):
    # a `Dataset` that is no `DatasetDict` is saved without a split
    datasets.Dataset.from_list(ROWS).save_to_disk(tmp_path / "data" / "set")
    assert refusal(tmp_path).endswith("called otherwise: data.split_names={train: data}")
    assert list(read(tmp_path, split_names={"train": "data"}).records()) == ROWS
    write(tmp_path, "mine.csv")
    assert refusal(tmp_path).endswith("data.split_names={train: one of data, mine}")
    # near enough to train.jsonl to be taken for a slip
    write(tmp_path, "raw.jsonl")
    assert refusal(tmp_path).endswith("data.split_names={train: one of data, mine, raw}")


def test_folders_that_are_data_sets_by_themselves_are_offered(tmp_path):
    # as Anthropic/hh-rlhf lies on the hub
    for name in ("helpful/train.jsonl", "harmless/data/train-00000-of-00001.parquet"):
        write(tmp_path, name)
    write(tmp_path, "test.jsonl")
    message = refusal(tmp_path)
    assert message.endswith("; folders in it that have one: datasets=[set/harmless,set/helpful]")
    assert read(tmp_path, names=["set/helpful"]).name == "set/helpful"
    assert "nearest: test.jsonl" in refusal(tmp_path, split_names={"train": "tests"})


def test_what_is_no_data_and_the_other_split_are_not_the_nearest(tmp_path):
    write(tmp_path, "test.jsonl")
    (tmp_path / "data" / "set" / "state.json").write_text("{}")
    assert "nearest" not in refusal(tmp_path)


def test_splits_of_other_names_are_offered_and_read(tmp_path):
    for name in ("train_prefs", "test_prefs", "train_sft"):
        write(tmp_path, f"data/{name}-00000-of-00001.parquet")
    message = refusal(tmp_path)
    assert "found data/test_prefs-00000-of-00001.parquet, data/train_prefs" in message
    offer = "data.split_names={train: one of train_prefs train_sft, test: test_prefs}"
    assert offer in message
    names = {"train": "train_prefs", "test": "test_prefs"}
    rows = read(tmp_path, split="test", split_names=names)
    assert rows.source.endswith("test_prefs-00000-of-00001.parquet")
    assert rows.counts.split == "test"
    for called, splits in ((names, ["train", "test"]), ({"train": "train_sft"}, ["train"])):
        parts = own_parts(options_of(tmp_path, split_names=called))
        assert [part.split for part in parts] == splits


def test_a_validation_split_is_offered_for_test(tmp_path):
    write(tmp_path, "train.json")
    write(tmp_path, "validation.json")
    with pytest.raises(DataError, match=r"data\.split_names=\{test: validation\}"):
        check_sources(options_of(tmp_path))


def test_the_cache_knows_splits_of_other_names_and_shards_from_each_other(tmp_path):
    write(tmp_path, "train_a.jsonl", ROWS[:2])
    write(tmp_path, "train_b.jsonl", ROWS[:3])
    assert len(read(tmp_path, split_names={"train": "train_a"}).dataset) == 2
    assert len(read(tmp_path, split_names={"train": "train_b"}).dataset) == 3
    write(tmp_path, "train_a.jsonl", ROWS[:4])
    assert len(read(tmp_path, split_names={"train": "train_a"}).dataset) == 4


def test_a_json_file_may_hold_lines_too(tmp_path):
    path = tmp_path / "data" / "set" / "train.json"
    write_jsonl(path.parent, "lines", ROWS).rename(path)
    assert read(tmp_path).dataset["row"][:] == [1, 2, 3, 4, 5, 6, 7]
    for bad in (b"{cut off", b"\xff", b"// rows"):
        path.write_bytes(b"\n".join([bad, *(json.dumps(row).encode() for row in ROWS)]))
        assert f"{path}:1: invalid " in refusal(tmp_path)
        rows = read(tmp_path, on_error="skip")
        assert rows.counts.dropped == {"malformed row": 1}
        assert rows.dataset["row"][:] == [2, 3, 4, 5, 6, 7, 8]


@pytest.mark.parametrize(
    ("content", "says"),
    [
        ('{\n "data": [],\n "version": 1\n}', "one object per line, got object with data, version"),
        ('{"data": [\n{"prompt": "Q"}\n]}', "one object per line, got object with data"),
        ("3", "train.json:1: a row must be an object"),
        ('[{"prompt": "Q"},\n {"prompt": ]', r"train.json:2: invalid JSON: .* at column 13"),
        ('[{"prompt": "Q", "chosen": "a", "rejected": "b"}, 3]', "train.json:2: a row must be an"),
        ("[]", "0 rows in split 'train' of .*train.json"),
        ("", "0 rows in split 'train' of .*train.json"),
        (b'[{"prompt": "\xe9"}]', "train.json: invalid UTF-8: byte 0xe9 at offset 13"),
        ("[" * 100_000, "train.json: invalid JSON"),
        ("hello", "train.json:1: invalid JSON: .*expected one array of objects, or one object per"),
    ],
)
def test_a_json_file_that_is_no_array_of_objects_is_named(tmp_path, content, says):
    path = tmp_path / "data" / "set" / "train.json"
    path.parent.mkdir(parents=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    with pytest.raises(DataError, match=says):
        read(tmp_path)


def test_damaged_files_are_named(tmp_path):
    names = ("train.parquet", "train.jsonl.gz", "train.json.gz", "train.arrow")
    for name in (*names, "train.jsonl.bz2", "train.json.xz"):
        path = write(tmp_path, name, ROWS * 50)
        whole = path.read_bytes()
        for content in (whole[:-20], whole[: len(whole) // 2], b""):
            path.write_bytes(content)
            message = refusal(tmp_path)
            assert str(path) in message
            assert "cannot be read" in message or "0 rows" in message
        path.unlink()


def test_split_names_are_what_files_are_called_before_shard_and_suffix():
    names = ("train.json", "train_prefs-00000-of-00003.parquet", "val_2.jsonl", "README.md")
    assert [split_of(Path(name)) for name in names] == ["train", "train_prefs", "val", ""]


def test_a_hub_data_set_that_cannot_be_reached_offers_a_folder(tmp_path):
    with pytest.raises(DataError, match=r"org/name on .*hub.*'train' could not .*DIR/org/name/"):
        read(tmp_path, names=["org/name"])
    with pytest.raises(DataError, match="org/name on the Hugging Face hub could not be read"):
        own_parts(options_of(tmp_path, names=["org/name"]))


@pytest.fixture
def hub_folder(tmp_path, monkeypatch):
    """A repository that `datasets` loads by "org/name": it looks into the current folder first."""
    for split, rows in (("train_prefs", ROWS), ("test_prefs", ROWS[:2])):
        path = tmp_path / "org" / "name" / "data" / f"{split}-00000-of-00001.parquet"
        path.parent.mkdir(parents=True, exist_ok=True)
        chats = [
            {
                side: [
                    {"role": "user", "content": r["prompt"], "name": None},
                    {"role": "assistant", "content": r[side], "name": None},
                ]
                for side in ("chosen", "rejected")
            }
            | {"prompt": r["prompt"]}
            for r in rows
        ]
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(chats), path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_a_hub_data_set_is_loaded_by_its_id(hub_folder):
    names = {"train": "train_prefs", "test": "test_prefs"}
    options = options_of(hub_folder, names=["org/name"], split_names=names)
    [rows] = read_rows(options, "train", quiet=True)
    assert len(rows.dataset) == len(ROWS)
    assert json.loads(rows.dataset[3]["prompt"]) == [{"role": "user", "content": "Q3:"}]
    assert (rows.source, rows.place(3), rows.name) == ("org/name", "org/name:4", "org/name")
    [record] = [record for i, record in enumerate(rows.records()) if i == 3]
    assert record["prompt"] == "Q3:"
    # a second start finds what the first one read
    assert count_calls(lambda: read_rows(options, "train", quiet=True), "parse_row") == 0
    assert [part.split for part in own_parts(options)] == ["train", "test"]
    message = refusal(hub_folder, names=["org/name"])
    assert "whose split 'train' could not be read" in message
    assert "train_prefs" in message and "data.split_names={train: NAME}" in message


def test_the_hub_is_asked_for_id_split_and_cache(tmp_path, monkeypatch):
    asked = []

    def load_dataset(path, name, *, split, cache_dir):
        asked.append((path, name, split, cache_dir))
        return datasets.Dataset.from_list(ROWS if len(asked) < 4 else ROWS[:3])

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    options = {"names": ["org/name"], "split_names": {"train": "train_prefs"}}
    assert len(read(tmp_path, **options).dataset) == 7
    assert set(asked) == {("org/name", None, "train_prefs", str(tmp_path / "cache"))}
    asked += [None] * 4
    # another revision: the cache of rows is not taken
    assert len(read(tmp_path, **options).dataset) == 3


def test_a_configuration_of_a_hub_data_set_is_chosen_and_others_are_offered(tmp_path, monkeypatch):
    repository = tmp_path / "org" / "several"
    for name, rows in (("long", ROWS), ("short", ROWS[:3])):
        for split in ("train", "test"):
            write_jsonl(repository / name, split, rows)
    configs = "".join(
        f"- config_name: {name}\n  data_files:\n"
        f"  - {{split: train, path: {name}/train.jsonl}}\n"
        f"  - {{split: test, path: {name}/test.jsonl}}\n"
        for name in ("long", "short")
    )
    (repository / "README.md").write_text(f"---\nconfigs:\n{configs}---\n")
    monkeypatch.chdir(tmp_path)
    several = {"names": ["org/several"]}
    for name, num_rows in (("long", len(ROWS)), ("short", 3)):
        options = options_of(tmp_path, **several, config_names={"org/several": name})
        check_sources(options)
        [rows] = read_rows(options, "train", quiet=True)
        assert (len(rows.dataset), rows.place(1)) == (num_rows, "org/several:2")
        assert len(list(rows.records())) == num_rows
    offer = r"data\.config_names={org/several: NAME} chooses one"
    with pytest.raises(DataError, match=rf"has several configurations: long, short; {offer}"):
        check_sources(options_of(tmp_path, **several))
    with pytest.raises(DataError, match=rf"no configuration 'lon', only long, short; {offer}"):
        check_sources(options_of(tmp_path, **several, config_names={"org/several": "lon"}))
    write_jsonl(tmp_path / "data" / "set", "train", ROWS)
    with pytest.raises(DataError, match=r"data\.config_names: set is no data set of the hub"):
        check_sources(options_of(tmp_path, config_names={"set": "long"}), ["train"])


def test_a_path_is_answered_with_the_two_options_that_read_it(tmp_path):
    path = write(tmp_path, "train.json")
    for name in (path, path.parent):
        with pytest.raises(
            DataError, match=rf"datasets=\[set\] base_data_dir={tmp_path}/data reads"
        ):
            find_source(str(name), "train", None, {})


@pytest.mark.parametrize("base", [None, "."])
def test_the_home_of_nobody_is_no_dataset(base):
    with pytest.raises(DataError, match=r"^datasets: no (dataset '|folder )~nobody-of-this-name"):
        find_source("~nobody-of-this-name", "train", base, {})


@pytest.mark.parametrize("base", [None, "."])
def test_a_name_too_long_for_a_folder_is_no_dataset(base):
    name = 300 * "a"
    with pytest.raises(DataError, match=name):
        find_source(name, "train", base, {})


@pytest.mark.parametrize("base", [None, "data"])
@pytest.mark.parametrize("name", ["set/train.jsonl", "{}/data/set/train.jsonl"])
def test_a_file_in_place_of_a_dataset_is_answered_with_the_options_that_read_it(
    tmp_path, monkeypatch, base, name
):
    write(tmp_path, "train.jsonl")
    # without base_data_dir a file is named from here
    monkeypatch.chdir(tmp_path if base else tmp_path / "data")
    said = rf"is a path; .* datasets=\[set\] base_data_dir={tmp_path}/data reads"
    with pytest.raises(DataError, match=said):
        find_source(name.format(tmp_path), "train", base and str(tmp_path / base), {})


def test_a_file_of_another_name_is_answered_with_its_split(tmp_path):
    write(tmp_path, "pairs.jsonl")
    with pytest.raises(DataError, match=r"; for pairs.jsonl add data.split_names={train: pairs}$"):
        find_source("set/pairs.jsonl", "train", str(tmp_path / "data"), {})
    location = find_source("set", "train", str(tmp_path / "data"), {"train": "pairs"})
    assert location.source.endswith("pairs.jsonl")


def test_options_of_files_are_refused_where_all_data_is_built_in(tmp_path):
    for data in ({"columns": {"prompt": "ask"}}, {"split_names": {"train": "a"}}):
        with pytest.raises(
            DataError, match=rf"data\.{next(iter(data))} is for files and data sets"
        ):
            check_sources(options_of(tmp_path, names=["planted"], **data))
    write(tmp_path, "a.json")
    options = options_of(tmp_path, names=["planted", "set"], split_names={"train": "a"})
    check_sources(options, ["train"])


def test_a_local_folder_comes_before_the_hub(tmp_path):
    write_jsonl(tmp_path / "data" / "org" / "name", "train", ROWS)
    assert find_source("org/name", "train", str(tmp_path / "data"), {}).paths
    assert find_source("org/name", "train", None, {}).is_hub
    assert find_source("org/other", "train", str(tmp_path / "data"), {}).is_hub


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        # of no date: it is part of the test's name, which is the same in all processes
        ("train.jsonl", gzip.compress(b"{}", mtime=0), "compressed by gzip"),
        ("train.csv", b"PK\x03\x04 a sheet", "a zip archive"),
        ("train.json", "[]".encode("utf-16"), "text in UTF-16"),
        ("train.parquet", b"version https://git-lfs.github.com/spec/v1\n", "a pointer of Git LFS"),
        ("train.jsonl.zst", b"PAR1", "a parquet file"),
    ],
)
def test_a_file_of_another_form_than_its_name_says_is_called_what_it_is(
    tmp_path, name, content, message
):
    path = write(tmp_path, name)
    path.write_bytes(content)
    assert refusal(tmp_path).startswith(
        f"{path}: must be {path.suffix} as its name says; it is {message}"
    )


@pytest.mark.parametrize(
    ("make", "what"),
    [
        (Path.mkdir, "a folder"),
        (os.mkfifo, "no regular file"),
        (lambda path: path.symlink_to("gone.jsonl"), "a link to nothing"),
    ],
)
def test_what_has_the_name_of_a_file_and_is_none_is_called_what_it_is(tmp_path, make, what):
    path = write(tmp_path, "train.jsonl")
    path.unlink()
    make(path)
    assert refusal(tmp_path).endswith(f"found train.jsonl ({what})")


@pytest.mark.parametrize("name", ["train.jsonl", "train.json"])
def test_a_key_that_stands_twice_is_refused(tmp_path, name):
    path = write(tmp_path, name)
    path.write_text(path.read_text(encoding="utf-8").replace('"rejected"', '"chosen"'), "utf-8")
    assert "invalid JSON: 'chosen' stands twice" in refusal(tmp_path)
