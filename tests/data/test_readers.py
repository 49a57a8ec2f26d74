"""What a parquet file holds beside what JSON lines do."""

import datetime
import errno
import json
import struct

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from exhaustion import no_more_files
from small_data import make_config, write_jsonl

from fastpref.data.layouts.row_values import RowError
from fastpref.data.options import data_options
from fastpref.data.source import read_rows
from fastpref.data.sources.readers import read_records
from fastpref.errors import DataError


def read(tmp_path):
    [rows] = read_rows(data_options(make_config(tmp_path)), "train", quiet=True)
    return rows


def write_parquet(tmp_path, table):
    path = tmp_path / "data" / "set" / "train.parquet"
    path.parent.mkdir(parents=True)
    pyarrow.parquet.write_table(table, path)
    return path


def test_a_file_that_no_descriptor_is_left_for_is_not_called_unreadable(tmp_path):
    write_jsonl(tmp_path / "data" / "set", "train", [{"prompt": "Q"}])
    path = tmp_path / "data" / "set" / "train.jsonl"
    with pytest.raises(OSError) as raised, no_more_files():
        list(read_records(path))
    assert raised.value.errno == errno.EMFILE


def test_conversations_in_parquet_read_like_those_in_json(tmp_path):
    def call(**arguments):
        call = {"function": {"name": "f", "arguments": arguments}}
        return [{"role": "assistant", "tool_calls": [call]}]

    tools = [{"function": {"name": "f"}}, {"function": {"name": "g", "description": "G"}}]
    asked = [{"role": "user", "content": "Q"}]
    rows = [
        {"prompt": asked, "chosen": call(to="Zürich", at=[1.5]), "rejected": call(by="rail")},
        {"prompt": asked, "chosen": [{"role": "assistant", "content": "a"}], "rejected": call(n=3)},
    ]
    rows = [row | {"tools": tools} for row in rows]
    write_jsonl(tmp_path / "lines" / "data" / "set", "train", rows)
    write_parquet(tmp_path / "parquet", pyarrow.Table.from_pylist(rows))
    datasets = [read(tmp_path / form).dataset for form in ("lines", "parquet")]
    fields = ("prompt", "chosen", "rejected", "tools")
    texts = [[dataset[field][:] for field in fields] for dataset in datasets]
    # of keys alone: a struct of parquet has one order of them for all rows
    loaded = [[[json.loads(text) for text in column] for column in form] for form in texts]
    assert loaded[0] == loaded[1]


def test_maps_of_a_parquet_file_are_objects_and_other_values_are_text(tmp_path):
    arguments = pyarrow.map_(pyarrow.string(), pyarrow.date32())
    function = pyarrow.struct([("name", pyarrow.string()), ("arguments", arguments)])
    message = pyarrow.struct([("role", pyarrow.string()), ("tool_calls", pyarrow.list_(function))])
    day = datetime.date(2026, 3, 5)
    answers = [
        [{"role": "assistant", "tool_calls": [{"name": name, "arguments": [("on", day)]}]}]
        for name in ("f", "g")
    ]
    row = {"prompt": [{"role": "user", "content": "Q"}]}
    schema = pyarrow.schema(
        [
            ("prompt", pyarrow.list_(pyarrow.struct({"role": "string", "content": "string"}))),
            ("chosen", pyarrow.list_(message)),
            ("rejected", pyarrow.list_(message)),
        ]
    )
    record = row | {"chosen": answers[0], "rejected": answers[1]}
    write_parquet(tmp_path, pyarrow.Table.from_pylist([record], schema=schema))
    [chosen] = read(tmp_path).dataset["chosen"][:]
    assert json.loads(chosen)[0]["tool_calls"] == [{"name": "f", "arguments": {"on": "2026-03-05"}}]


def test_null_columns_of_a_parquet_file_stay_and_null_keys_of_structs_go(tmp_path):
    records = [
        {"prompt": "Q", "chosen": "a", "rejected": "b", "meta": None, "list": [1, None]},
        {"prompt": "R", "chosen": "a", "rejected": "b", "meta": {"x": [{"y": 1}, {"z": 2}]}},
    ]
    path = write_parquet(tmp_path, pyarrow.Table.from_pylist(records))
    assert [record for _, record in read_records(path)] == [records[0], records[1] | {"list": None}]


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="these datasets have no type of JSON")
def test_what_datasets_declares_as_json_is_what_its_text_stands_for(tmp_path):
    call = {"function": {"name": "f", "arguments": {"to": "Zürich", "via": None}}}
    turns = [{"role": "user", "content": "Q"}, {"role": "assistant", "tool_calls": [call]}]
    record = {"messages": turns, "said": turns, "tools": [{"name": "f"}], "at": [[1.0, 2.0]]}
    json_type = datasets.Json()
    message = {"role": datasets.Value("string"), "content": datasets.Value("string")}
    features = {
        "messages": datasets.List(message | {"tool_calls": json_type}),
        "said": datasets.List(json_type),
        "tools": json_type,
        "at": datasets.Array2D((1, 2), "float64"),
    }
    table = datasets.Dataset.from_list([record], features=datasets.Features(features))
    table.to_parquet(tmp_path / "train.parquet")
    table.save_to_disk(tmp_path / "saved")
    for path in (tmp_path / "train.parquet", *(tmp_path / "saved").glob("*.arrow")):
        assert [found for _, found in read_records(path)] == [record]


@pytest.mark.skipif(not hasattr(pyarrow, "json_"), reason="this pyarrow has no type of JSON")
def test_a_value_declared_as_json_that_is_none_is_a_bad_row(tmp_path):
    column = pyarrow.ExtensionArray.from_storage(pyarrow.json_(), pyarrow.array(["{}", "{"]))
    path = write_parquet(tmp_path, pyarrow.table({"tools": column}))
    (_, whole), (number, error) = read_records(path)
    assert (whole, number) == ({"tools": {}}, 2)
    assert isinstance(error, RowError)
    assert error.at("f:2").startswith("f:2:tools: tools is declared as JSON and is none: ")


def test_a_value_of_parquet_that_python_cannot_hold_is_an_error_of_its_row(tmp_path):
    texts = pyarrow.array([b"fine", b"caf\xe9", b"fine"], pyarrow.binary()).view(pyarrow.string())
    days = pyarrow.array([0, 0, 10**7], pyarrow.int32()).cast(pyarrow.date32())
    path = write_parquet(tmp_path, pyarrow.table({"prompt": texts, "day": days}))
    (_, first), (_, second), (number, third) = read_records(path)
    assert first == {"prompt": "fine", "day": datetime.date(1970, 1, 1)}
    assert str(second) == "prompt is no UTF-8: byte 0xe9"
    assert isinstance(third, RowError) and third.field == "day" and number == 3


def test_two_columns_of_one_name_are_refused(tmp_path):
    prompts = [pyarrow.array([text]) for text in ("one", "other")]
    path = write_parquet(tmp_path, pyarrow.table(prompts, names=["prompt", "prompt"]))
    with pytest.raises(DataError, match=r"train\.parquet: several columns of one name: prompt"):
        list(read_records(path))


def test_damaged_offsets_of_an_arrow_file_are_refused_and_bad_text_is_an_error_of_its_row(tmp_path):
    texts = pyarrow.array([b"one", b"caf\xe9", b"three"], pyarrow.binary()).view(pyarrow.string())
    path = tmp_path / "train.arrow"
    with pyarrow.OSFile(str(path), "wb") as file:
        table = pyarrow.table({"prompt": texts})
        with pyarrow.ipc.new_stream(file, table.schema) as writer:
            writer.write_table(table)
    errors = [isinstance(record, RowError) for _, record in read_records(path)]
    assert errors == [False, True, False]
    offsets = struct.pack("<4i", 0, 3, 7, 12)
    far = struct.pack("<4i", 0, 2**30, 7, 12)
    path.write_bytes(path.read_bytes().replace(offsets, far))
    with pytest.raises(DataError, match=r"train\.arrow: cannot be read: .*[Oo]ffset"):
        list(read_records(path))
