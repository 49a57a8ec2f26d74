"""Messages that a file has as a struct of lists or as JSON text are those of the list."""

import json

import pytest

from fastpref.data.layouts.layout_reader import LayoutReader
from fastpref.data.layouts.row_values import RowError

ASKED = [{"role": "user", "content": "Q"}]
YES, NO = ([{"role": "assistant", "content": text}] for text in ("yes", "no"))
ROWS = [
    {"prompt": ASKED, "chosen": YES, "rejected": NO},
    {"chosen": ASKED + YES, "rejected": ASKED + NO},
    {"prompt": "Q", "chosen": ASKED + YES, "rejected": ASKED + NO},
    {"conversations": ASKED, "response_0": NO, "response_1": YES, "winner": 1},
]


def read(record, **options):
    reader = LayoutReader({}, single=False, weighted=True, allow_roles=False)
    return reader.parse(record | options)


def changed(record, change):
    return {
        key: change(value) if isinstance(value, list) else value for key, value in record.items()
    }


def as_struct(messages):
    return {key: [message[key] for message in messages] for key in ("role", "content")}


@pytest.mark.parametrize("change", [as_struct, json.dumps])
@pytest.mark.parametrize("record", ROWS)
def test_messages_of_another_form_are_the_same_row(record, change):
    (row, layout), (wanted, as_list) = read(changed(record, change)), read(record)
    assert (row, layout.what) == (wanted, as_list.what)


def test_a_list_in_one_response_is_its_text():
    record = {"prompt": json.dumps(ASKED), "chosen": json.dumps(YES), "rejected": "no"}
    assert read(record)[0]["chosen"] == json.dumps(YES)


def test_weights_may_be_json_text():
    record = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
    row, _ = read(record, chosen_weight="[1, 0.5]", rejected_weight="[2]")
    assert (row["chosen_weights"], row["rejected_weights"]) == ([1.0, 0.5], [2.0])


@pytest.mark.parametrize(
    ("record", "message"),
    [
        (
            {"chosen": {"role": ["user"], "content": []}, "rejected": as_struct(NO)},
            "one element a message each; they have: role 1, content 0",
        ),
        (changed(ROWS[0], str), "a list of messages as Python writes it, got"),
    ],
)
def test_lists_that_are_none_are_refused(record, message):
    with pytest.raises(RowError, match=message) as caught:
        read(record)
    assert caught.value.field == "chosen"
