"""What tables of text hold, and what their readers say of those that are none."""

import csv
import io
import json

import numpy
import pandas
import pytest

from fastpref.data.layouts.row_values import RowError
from fastpref.data.sources.readers import read_records
from fastpref.errors import DataError

HEADER = b"prompt,chosen,rejected\n"


def records(tmp_path, content, name="train.csv"):
    path = tmp_path / name
    path.write_bytes(content)
    return [
        (number, str(record) if isinstance(record, RowError) else tuple(record.values()))
        for number, record in read_records(path)
    ]


def test_values_of_a_table_are_texts_as_they_stand(tmp_path):
    content = b'\xef\xbb\xbf,prompt,chosen\r\n0,"a ""b"",\r\nc",NA\r\n\r\n1, 5,\r\n'
    assert records(tmp_path, content) == [(2, ('a "b",\r\nc', "NA")), (5, (" 5", ""))]
    assert records(tmp_path, b'prompt\tchosen\n\'a,\t"b"\n', "train.tsv") == [(2, ("'a,", "b"))]
    assert records(tmp_path, b"prompt\tchosen\na,\tb\n", "a.csv.tsv") == [(2, ("a,", "b"))]
    assert records(tmp_path, b"") == []


def test_messages_and_weights_of_a_table_are_what_their_json_text_stands_for(tmp_path):
    messages = [{"role": "user", "content": 'a "b", c'}]
    with io.StringIO() as file:
        table = csv.writer(file)
        table.writerow(["chosen", "chosen_weight"])
        table.writerow([json.dumps(messages), "[1, 0.5]"])
        table.writerow(['[{"x": 1}]', "[2]"])
        content = file.getvalue().encode()
    assert records(tmp_path, content) == [(2, (messages, [1, 0.5])), (3, ('[{"x": 1}]', [2]))]


def test_messages_of_a_table_may_be_as_pandas_writes_them(tmp_path):
    said = [{"role": "user", "content": "it's \n "}, {"role": "assistant", "content": 'a "b"'}]
    frame = pandas.DataFrame({"prompt": [said], "chosen": [said[1:]]})
    assert records(tmp_path, frame.to_csv(index=False).encode()) == [(2, (said, said[1:]))]
    # between what an array holds numpy prints no commas
    array = numpy.array([*said, None], object)[:2]
    printed = pandas.DataFrame({"prompt": [array]}).to_csv(index=False).encode()
    [(number, error)] = records(tmp_path, printed)
    assert number == 2 and "json.dumps of the list writes it" in error


def test_a_row_that_is_none_is_told_with_its_line(tmp_path):
    found = records(tmp_path, HEADER + b'Q,"a\nb"\nQ,a,b\nQ,\x93a\x94,b\nQ,"a,b\n')
    assert [number for number, _ in found] == [2, 4, 5, 6]
    assert found[0][1] == "2 values, where the first line names 3 columns"
    assert found[2][1] == "chosen is no UTF-8: byte 0x93"
    assert found[3][1].startswith("cannot be read: ")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"prompt;chosen;rejected\n", "must be separated by ',', got 'prompt;chosen;rejected'"),
        (b"prompt,chosen,chosen\n", "several columns of one name: chosen"),
        (b"prompt,ch\xf6sen\n", "invalid UTF-8: byte 0xf6"),
    ],
)
def test_a_first_line_that_names_no_columns_is_refused(tmp_path, content, message):
    with pytest.raises(DataError, match=r"train\.csv:1: ") as caught:
        records(tmp_path, content)
    assert message in str(caught.value)
