"""Files of every layout that people have, the rows that they hold, and what a bad row says."""

import json
from collections.abc import Mapping
from types import MappingProxyType
from typing import Any, NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
from small_data import make_config, pair, write_jsonl

from fastpref.config import DPOConfig, SFTConfig, TISDPOConfig
from fastpref.data.announce import log_layouts
from fastpref.data.layouts.layout_reader import LayoutReader
from fastpref.data.layouts.row_values import RowError
from fastpref.data.options import data_options
from fastpref.data.source import read_rows
from fastpref.errors import DataError

SIDES = ("chosen", "rejected")


def say(role, content):
    return {"role": role, "content": content}


def tell(speaker, value):
    return {"from": speaker, "value": value}


USER, YES, NO = say("user", "Q"), say("assistant", "yes"), say("assistant", "no")
SYSTEM = say("system", "S")


class Case(NamedTuple):
    """Rows of one layout, what they come to, and a second row of it that is bad."""

    record: dict[str, Any]
    prompt: Any
    """A text, or a list of messages."""
    chosen: Any
    rejected: Any
    bad: dict[str, Any]
    """What a bad row has instead."""
    says: str
    """Field and message of its error."""
    loss: type = DPOConfig
    data: Mapping[str, Any] = MappingProxyType({})


CHAT = ([USER], [YES], [NO])
ONE = ([USER], [YES], [])
CASES = {
    "ultrafeedback": Case(
        {"prompt": "Q", "chosen": [USER, YES], "rejected": [USER, NO], "messages": [USER, YES]},
        *CHAT,
        bad={"rejected": [say("user", "R"), NO]},
        says="rejected: two readings: whole conversations begin with prompt, and no message",
    ),
    "text prompt, responses as messages": Case(
        {"prompt": "Q", "chosen": [YES], "rejected": NO},
        *CHAT,
        bad={"chosen": [say("assistant", 3)]},
        says=r"chosen: chosen\[0\]\.content must be text",
    ),
    "prompt repeated by both conversations": Case(
        {"prompt": [SYSTEM, USER], "chosen": [SYSTEM, USER, YES], "rejected": [SYSTEM, USER, NO]},
        [SYSTEM, USER],
        [YES],
        [NO],
        bad={"chosen": [SYSTEM, USER]},
        says="chosen: chosen is the messages of prompt and nothing more",
    ),
    "one message as response": Case(
        {"prompt": [USER], "chosen": YES, "rejected": NO},
        *CHAT,
        bad={"rejected": {"role": "assistant"}},
        says=r"rejected: rejected\[0\] has no content",
    ),
    "messages as prompt, texts as responses": Case(
        {"prompt": [SYSTEM, USER], "chosen": "yes", "rejected": "no"},
        [SYSTEM, USER],
        [YES],
        [NO],
        bad={"rejected": 3},
        says="rejected: rejected must be text or a list of messages, got number",
    ),
    "sharegpt": Case(
        {
            "conversations": [tell("human", "Q")],
            "chosen": tell("gpt", "yes"),
            "rejected": tell("gpt", "no"),
        },
        *CHAT,
        bad={"conversations": [tell("humn", "Q")]},
        says=r"conversations: conversations\[0\]\.from is 'humn'; known: .*nearest: human",
    ),
    "sharegpt lists with system": Case(
        {
            "conversations": [tell("human", "P"), tell("gpt", "p"), tell("human", "Q")],
            "system": "S",
            "chosen": [tell("gpt", "yes")],
            "rejected": [tell("gpt", "no")],
        },
        [SYSTEM, say("user", "P"), say("assistant", "p"), USER],
        [YES],
        [NO],
        bad={"chosen": [{"from": "gpt"}]},
        says=r"chosen: chosen\[0\]\.value is missing",
    ),
    "axolotl's messages beside responses": Case(
        {"messages": [SYSTEM, USER], "chosen": YES, "rejected": "no"},
        [SYSTEM, USER],
        [YES],
        [NO],
        bad={"messages": [USER, YES]},
        says="messages: messages ends with a message of the assistant: it is the prompt",
    ),
    "conversations that messages repeat": Case(
        {"chosen": [USER, YES], "rejected": [USER, NO], "messages": [USER, YES]},
        *CHAT,
        bad={"chosen": [USER, say("assistant", 3)]},
        says=r"chosen: chosen\[1\]\.content must be text",
    ),
    "a question that messages repeat": Case(
        {"question": "Q", "chosen": "yes", "rejected": "no", "messages": [USER, YES]},
        *CHAT,
        bad={"question": " "},
        says="question: question is empty",
    ),
    "messages by name beside a question": Case(
        {"question": "R", "chosen": "yes", "rejected": "no", "turns": [USER]},
        *CHAT,
        bad={"turns": "Q"},
        says="turns: messages must be a message or a list of messages, got text",
        data={"columns": {"messages": "turns"}},
    ),
    "ms-swift": Case(
        {"messages": [USER, YES, say("tool", "5"), YES], "rejected_response": "no"},
        [USER, YES, say("tool", "5")],
        [YES],
        [NO],
        bad={"messages": [USER]},
        says="messages: messages ends with a message of role 'user': no response follows it",
    ),
    "ms-swift, messages": Case(
        {"messages": [SYSTEM, USER, YES], "rejected_messages": [SYSTEM, USER, NO]}
        | {"prompt": "R", "rejected_response": None},
        [SYSTEM, USER],
        [YES],
        [NO],
        bad={"rejected_messages": [say("assistant", 3)]},
        says=r"rejected_messages: rejected_messages\[0\]\.content must be text",
    ),
    "ms-swift, messages of the assistant": Case(
        {"messages": [USER, YES, say("tool", "5"), YES], "rejected_response": [NO]},
        [USER],
        [YES, say("tool", "5"), YES],
        [NO],
        bad={"rejected_response": [say("assistant", 3)]},
        says=r"rejected_response: rejected_response\[0\]\.content must be text",
    ),
    "ms-swift, several turns": Case(
        {"messages": [USER, YES, USER, YES], "rejected_messages": [USER, YES, USER, NO]},
        [USER, YES, USER],
        [YES],
        [NO],
        bad={"rejected_messages": [USER, NO, USER, NO]},
        says=r"messages: chosen has a message of role 'user'; .* \(chosen is messages\)",
    ),
    "ms-swift for sft": Case(
        {"messages": [USER, YES], "rejected_response": "no"},
        *ONE,
        bad={"messages": None},
        says="messages: messages must be a message or a list of messages, got null",
        loss=SFTConfig,
    ),
    "openai": Case(
        {
            "input": {"messages": [USER], "tools": [], "parallel_tool_calls": True},
            "preferred_output": [YES],
            "non_preferred_output": [NO],
        },
        *CHAT,
        bad={"input": [USER]},
        says="input: input must be an object with messages, got list",
    ),
    "orca": Case(
        {"system": "S", "question": "Q", "chosen": "yes", "rejected": "no"},
        [SYSTEM, USER],
        [YES],
        [NO],
        bad={"question": None},
        says="question: question is null",
    ),
    "alpaca": Case(
        {"instruction": "Add.", "input": "1, 2", "chosen": "yes", "rejected": "no"},
        [say("user", "Add.\n1, 2")],
        [YES],
        [NO],
        bad={"input": 3},
        says="input: input must be text, got number",
    ),
    "responses by number": Case(
        {"prompt": "Q", "response_0": "no", "response_1": "yes", "better_response_id": 1},
        "Q",
        "yes",
        "no",
        bad={"better_response_id": 2},
        says="better_response_id: better_response_id must be 0 or 1, .* got 2",
    ),
    "responses by name": Case(
        {"question": "Q", "response_0": "yes", "response_1": "no", "label": "response_0"},
        *CHAT,
        bad={"response_1": None},
        says="response_1: response_1 is null",
    ),
    "responses by name, one by a number": Case(
        {"question": "Q", "response_0": "yes", "response_1": "no", "preference": "response_0"},
        *CHAT,
        bad={"preference": 10**400},
        says="preference: preference must be response_0 or response_1, got 1000",
    ),
    "columns of any name": Case(
        {"ask": "Q", "good": "yes", "bad": "no"},
        "Q",
        "yes",
        "no",
        bad={"good": 3},
        says=r"good: chosen must be text or a list of messages, got number \(chosen is good\)",
        data={"columns": {"prompt": "ask", "chosen": "good", "rejected": "bad"}},
    ),
    "messages alone": Case(
        {"messages": [USER, say("assistant", "y"), say("user", "Why?"), YES]},
        [USER, say("assistant", "y"), say("user", "Why?")],
        [YES],
        [],
        bad={"messages": [USER]},
        says="messages: messages ends with a message of role 'user': no response follows it",
        loss=SFTConfig,
    ),
    "conversations alone": Case(
        {"conversations": [tell("system", "S"), tell("human", "Q"), tell("gpt", "yes")]},
        [SYSTEM, USER],
        [YES],
        [],
        bad={"conversations": [tell("human", None)]},
        says=r"conversations: conversations\[0\]\.value is null",
        loss=SFTConfig,
    ),
    "prompt and completion": Case(
        {"prompt": "Q:", "completion": " yes"},
        "Q:",
        " yes",
        "",
        bad={"completion": 3},
        says=r"completion: chosen must be text .* \(chosen is completion\)",
        loss=SFTConfig,
    ),
    "prompt and completion as messages": Case(
        {"prompt": [USER], "completion": [YES]},
        *ONE,
        bad={"completion": [USER]},
        says="completion: chosen has a message of role 'user'",
        loss=SFTConfig,
    ),
    "instruction and output": Case(
        {"instruction": "Q", "input": "", "output": "yes"},
        *ONE,
        bad={"instruction": " "},
        says="instruction: instruction is empty",
        loss=SFTConfig,
    ),
}


def options_of(tmp_path, loss=DPOConfig, data=None, **options):
    return data_options(make_config(tmp_path, loss=loss(), data=data or {}, **options))


def write(tmp_path, *records):
    return write_jsonl(tmp_path / "data" / "set", "train", records)


def read(tmp_path, *records, loss=DPOConfig, data=None, **options):
    if records:
        write(tmp_path, *records)
    [rows] = read_rows(options_of(tmp_path, loss, data, **options), "train", quiet=True)
    return rows


def parts(row):
    fields = [row[field] for field in ("prompt", *SIDES)]
    return tuple(json.loads(text) for text in fields) if row["form"] == "chat" else tuple(fields)


def refusal(tmp_path, *records, **options):
    with pytest.raises(DataError) as caught:
        read(tmp_path, *records, **options)
    assert "\n" not in str(caught.value)
    return str(caught.value)


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_file_of_each_layout_has_its_rows(tmp_path, case):
    rows = read(tmp_path, case.record, loss=case.loss, data=dict(case.data))
    assert parts(rows.dataset[0]) == (case.prompt, case.chosen, case.rejected)
    assert not rows.counts.dropped
    assert list(rows.records()) == [case.record]


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_parquet_and_arrays_hold_the_same_rows(tmp_path, case):
    expected = (case.prompt, case.chosen, case.rejected)
    for form in ("parquet", "json"):
        path = tmp_path / form / "data" / "set" / f"train.{form}"
        path.parent.mkdir(parents=True)
        if form == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist([case.record]), path)
        else:
            path.write_text(json.dumps([case.record], indent=2))
        rows = read(tmp_path / form, loss=case.loss, data=dict(case.data))
        assert parts(rows.dataset[0]) == expected


@pytest.mark.parametrize("case", CASES.values(), ids=CASES)
def test_a_bad_row_of_each_layout_is_named_by_file_row_and_field(tmp_path, case):
    path = write(tmp_path, case.record, case.record | case.bad, case.record)
    with pytest.raises(DataError, match=rf"^{path}:2:{case.says}"):
        read(tmp_path, loss=case.loss, data=dict(case.data))
    rows = read(tmp_path, loss=case.loss, data={**case.data, "on_error": "skip"})
    assert rows.counts.dropped == {"malformed row": 1}
    assert rows.dataset["row"][:] == [1, 3]


def test_rows_of_another_layout_than_the_first_are_bad_rows(tmp_path):
    orca, alpaca = CASES["orca"].record, CASES["alpaca"].record
    message = refusal(tmp_path, orca, alpaca)
    assert "train.jsonl:2: the row is laid out as instruction and input as a turn" in message
    assert "the rows before it as question as a turn of the user" in message
    rows = read(tmp_path, orca, alpaca, pair(), orca | {"question": "R"}, data={"on_error": "skip"})
    assert rows.counts.dropped == {"malformed row": 2}
    assert rows.dataset["row"][:] == [1, 4]


@pytest.mark.parametrize("wrong", [3, True, None, ["yes"], {"a": 1}])
@pytest.mark.parametrize("name", ["ultrafeedback", "orca", "sharegpt", "responses by name"])
def test_a_response_of_another_kind_is_named_with_its_column(tmp_path, name, wrong):
    case = CASES[name]
    field = "response_0" if name == "responses by name" else "chosen"
    message = refusal(tmp_path, case.record, case.record | {field: wrong})
    assert f"train.jsonl:2:{field}: " in message


def test_a_bad_first_row_decides_on_no_layout(tmp_path):
    bad = {"prompt": "Q", "chosen": "a", "rejected": None}
    rows = read(tmp_path, bad, CASES["orca"].record, data={"on_error": "skip", "max_dropped": 0.5})
    assert rows.dataset["row"][:] == [2]


def test_the_forms_of_before_may_still_stand_in_one_file(tmp_path):
    start = "\n\nHuman: hi\n\nAssistant:"
    rows = read(
        tmp_path,
        pair("Q", "a", "b"),
        {"chosen": start + " a", "rejected": start + " b"},
        {"prompt": [USER], "chosen": [YES], "rejected": [NO]},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
    )
    assert rows.dataset["form"][:] == ["text", "hh", "chat", "chat"]


@pytest.mark.parametrize(
    "extra", [{"question": "R"}, {"instruction": "R"}, {"conversations": [tell("human", "R")]}]
)
def test_a_column_beside_rows_that_are_complete_changes_nothing(tmp_path, extra):
    start = "\n\nHuman: hi\n\nAssistant:"
    for record in (
        pair("Q", "a", "b"),
        {"chosen": start + " a", "rejected": start + " b"},
        {"chosen": [USER, YES], "rejected": [USER, NO]},
    ):
        plain = parts(read(tmp_path, record).dataset[0])
        beside = read(tmp_path, record | extra)
        assert parts(beside.dataset[0]) == plain
        assert list(beside.counts.unread.values()) == [list(extra)]
    dialogues = {"chosen": start + " a", "rejected": start + " b"}
    other = {"chosen": start + " a", "rejected": start.replace("hi", "ho") + " b"}
    for records in ((dialogues, other), (other, dialogues)):
        read_so = read(tmp_path, *(record | extra for record in records))
        assert read_so.counts.dropped == {"no shared prompt": 1}
        assert parts(read_so.dataset[0]) == (start, " a", " b")


@pytest.mark.parametrize(
    ("record", "loss", "readings"),
    [
        (
            {"prompt": "Q", "response_0": "a", "response_1": "b"}
            | {"better_response_id": 0, "safer_response_id": 1},
            DPOConfig,
            ("better_response_id says", "data.columns={better_response_id: safer_response_id}"),
        ),
        (
            {"prompt": "Q", "response_0": "a", "response_1": "b", "label": 1},
            DPOConfig,
            ("label=1: the number of the chosen", "data.columns={better_response_id: label}"),
        ),
        (
            {"question": "Q", "instruction": "I", "chosen": "a", "rejected": "b"},
            DPOConfig,
            ("the prompt is question, or it is instruction", "data.columns={question: question}"),
        ),
        (
            {"messages": [USER, YES], "conversations": [tell("human", "Q"), tell("gpt", "a")]},
            SFTConfig,
            ("messages, or it is conversations", "data.columns={conversations: conversations}"),
        ),
    ],
)
def test_two_readings_are_refused_whatever_on_error_says_and_can_be_chosen(
    tmp_path, record, loss, readings
):
    message = refusal(tmp_path, record, loss=loss, data={"on_error": "skip"})
    assert "train.jsonl:1: two readings" in message
    for reading in readings:
        assert reading in message
    field, column = readings[1].removeprefix("data.columns={").removesuffix("}").split(": ")
    assert len(read(tmp_path, loss=loss, data={"columns": {field: column}}).dataset) == 1


def test_columns_choose_which_response_is_better(tmp_path):
    record = {"prompt": "Q", "response_0": "zero", "response_1": "one"}
    record |= {"better_response_id": 0, "safer_response_id": 1, "label": 1}

    def chosen(**columns):
        return read(tmp_path, record, data={"columns": columns}).dataset["chosen"][0]

    assert chosen(better_response_id="better_response_id") == "zero"
    assert chosen(better_response_id="safer_response_id") == "one"
    # the other reading of a label: 1 says that response_0 is the better one
    swapped = {"response_0": "response_1", "response_1": "response_0"}
    assert chosen(better_response_id="label", **swapped) == "zero"


@pytest.mark.parametrize(
    ("value", "chosen"), [(1, "b"), (0.0, "a"), ("1", "b"), ("response_0", "a")]
)
def test_the_better_response_is_named_by_number_or_column(tmp_path, value, chosen):
    record = {"prompt": "Q", "response_0": "a", "response_1": "b", "winner": value}
    assert read(tmp_path, record).dataset["chosen"][0] == chosen


@pytest.mark.parametrize("value", [2, True, None, "tie", [1]])
def test_what_names_no_response_is_refused(tmp_path, value):
    record = {"prompt": "Q", "response_0": "a", "response_1": "b", "winner": value}
    assert "train.jsonl:1:winner: winner must be 0 or 1" in refusal(tmp_path, record)


def test_a_column_named_null_is_left_out(tmp_path):
    record = {"prompt": "title", "chosen": [USER, YES], "rejected": [USER, NO]}
    assert "data.columns={prompt: null}" in refusal(tmp_path, record)
    rows = read(tmp_path, data={"columns": {"prompt": None}})
    assert parts(rows.dataset[0]) == CHAT
    assert not rows.counts.unread


def test_a_text_named_question_goes_to_the_chat_template_and_one_named_prompt_does_not(tmp_path):
    record = {"prompt": "Q", "chosen": "yes", "rejected": "no"}
    assert parts(read(tmp_path, record).dataset[0]) == ("Q", "yes", "no")
    as_turn = read(tmp_path, data={"columns": {"question": "prompt"}})
    assert parts(as_turn.dataset[0]) == CHAT
    orca = CASES["orca"].record
    as_text = read(tmp_path, orca, data={"columns": {"prompt": "question"}})
    assert parts(as_text.dataset[0]) == ("Q", "yes", "no")
    assert list(as_text.counts.unread.values()) == [["system"]]


@pytest.mark.parametrize(
    ("columns", "says"),
    [
        ({"prompt": "questin"}, "train.jsonl:1:questin: no column 'questin', which data.columns"),
        ({"output": "system"}, "data.columns.output: the row is laid out as question as a turn"),
    ],
)
def test_columns_that_are_not_there_or_not_read_are_refused(tmp_path, columns, says):
    assert says in refusal(tmp_path, CASES["orca"].record, data={"columns": columns})


@pytest.mark.parametrize("name", ["messages alone", "prompt and completion"])
def test_one_response_a_row_is_for_sft_that_is_not_reversed(tmp_path, name):
    record = CASES[name].record
    assert "is for loss=sft, not reversed; here a row needs" in refusal(tmp_path, record)
    assert "train.jsonl:1:rejected" in refusal(
        tmp_path, record, loss=SFTConfig, reverse_dataset=True
    )


@pytest.mark.parametrize("name", ["messages alone", "prompt and completion"])
def test_responses_labelled_good_or_bad_are_not_imitated_unasked(tmp_path, name):
    case = CASES[name]
    records = [case.record | {"label": label} for label in (True, False)]
    for on_error in ("raise", "skip"):
        message = refusal(tmp_path, *records, loss=SFTConfig, data={"on_error": on_error})
        assert "train.jsonl:1: two readings: label says which responses are good" in message
    # a loss of pairs has no use for them, however labelled
    assert "train.jsonl:1:rejected: one response a row" in refusal(tmp_path)
    response = message.split("data.columns={")[1].split(":")[0]
    rows = read(tmp_path, loss=SFTConfig, data={"columns": {response: response}})
    assert [parts(row)[1] for row in rows.dataset] == [case.chosen] * 2


def test_an_empty_single_response_is_dropped(tmp_path):
    records = [{"prompt": f"Q{i}", "completion": text} for i, text in enumerate(("a", " ", "b"))]
    assert read(tmp_path, *records, loss=SFTConfig).counts.dropped == {"empty response": 1}
    chats = [{"messages": [USER, say("assistant", text)]} for text in ("a", " ")]
    assert read(tmp_path, *chats, loss=SFTConfig).counts.dropped == {"empty response": 1}


@pytest.mark.parametrize(
    "rejected", [{"rejected_response": " "}, {"rejected_response": []}, {"rejected_messages": []}]
)
def test_an_empty_rejected_response_beside_messages_is_dropped(tmp_path, rejected):
    records = [CASES["ms-swift"].record, {"messages": [USER, YES]} | rejected]
    if "rejected_messages" in rejected:
        records[0] = CASES["ms-swift, several turns"].record
    rows = read(tmp_path, *records)
    assert rows.counts.dropped == {"empty response": 1} and rows.dataset["row"][0] == 1


def test_tools_stand_beside_messages_or_in_openai_s_input(tmp_path):
    tools = [{"type": "function", "function": {"name": "f"}}]
    for name in ("ms-swift", "ms-swift, messages of the assistant"):
        swift = read(tmp_path / name, CASES[name].record | {"tools": tools, "system": "S"})
        assert json.loads(swift.dataset["tools"][0]) == tools and not swift.counts.unread
        assert parts(swift.dataset[0])[0] == [SYSTEM, *CASES[name].prompt]
    given: dict[str, Any] = CASES["openai"].record
    openai = [given, given | {"input": {"messages": [say("user", "R")], "tools": tools}}]
    without, beside = read(tmp_path / "openai", *openai).dataset["tools"][:]
    # a template may tell an empty list from none
    assert without is None and json.loads(beside) == tools


def test_a_named_prompt_stands_before_the_prompt_that_two_dialogues_share(tmp_path):
    start = "\n\nHuman: hi\n\nAssistant:"
    record = {"ask": "Q", "chosen": start + " a", "rejected": start + " b"}
    assert parts(read(tmp_path, record).dataset[0]) == (start, " a", " b")
    rows = read(tmp_path, record, data={"columns": {"question": "ask"}})
    sides = ([say("assistant", record[side])] for side in SIDES)
    assert parts(rows.dataset[0]) == ([USER], *sides)


def test_pairs_with_messages_beside_them_are_pairs_for_sft_too_unless_columns_say_messages(
    tmp_path,
):
    record = CASES["ultrafeedback"].record | {"messages": [say("user", "R"), YES]}
    assert parts(read(tmp_path, record, loss=SFTConfig).dataset[0]) == CHAT
    chosen = read(tmp_path, loss=SFTConfig, data={"columns": {"messages": "messages"}})
    assert parts(chosen.dataset[0]) == ([say("user", "R")], [YES], [])


@pytest.mark.parametrize("sides", [SIDES, ("response_1", "response_0")])
def test_conversations_named_beside_pairs_are_their_prompt_for_sft_too(tmp_path, sides):
    record = {"turns": [USER], **dict(zip(sides, ([YES], [NO]), strict=True))}
    if sides != SIDES:
        record["better_response_id"] = 1
    columns = {"columns": {"conversations": "turns"}}
    for loss in (SFTConfig, DPOConfig):
        assert parts(read(tmp_path, record, loss=loss, data=columns).dataset[0]) == CHAT


def test_a_system_message_or_an_earlier_turn_may_come_before_the_text_prompt(tmp_path):
    start = [SYSTEM, say("user", "P"), say("assistant", "p"), USER]
    record = {"prompt": " Q\n", "chosen": [*start, YES], "rejected": [*start, NO]}
    assert parts(read(tmp_path, record).dataset[0]) == (start, [YES], [NO])


def test_calls_and_observations_of_sharegpt_are_tool_calls_and_their_results(tmp_path):
    call = {"name": "f", "arguments": {"x": 1}}
    turns = [tell("human", "Q"), tell("function_call", json.dumps(call)), tell("observation", "7")]
    record = {"conversations": turns, "chosen": tell("gpt", "yes"), "rejected": tell("gpt", "no")}
    prompt, _, _ = parts(read(tmp_path, record).dataset[0])
    assert prompt[1]["tool_calls"] == [{"type": "function", "function": call}]
    assert prompt[2] == say("tool", "7")
    turns[1] = tell("function_call", "f(1)")
    assert r"conversations[1].value of a function_call must be JSON" in refusal(tmp_path, record)


@pytest.mark.parametrize(
    ("turns", "says"),
    [
        ([tell("human", "Q"), USER], r"conversations\[1\] must be a message with from and value"),
        ([tell("human", "Q"), tell("gpt", "a")], "ends with a message of the assistant"),
        ([], "conversations has no messages"),
        ("Q", "conversations must be a message or a list of messages, got text"),
        ([{"from": 3, "value": "Q"}], r"conversations\[0\]\.from must be text, got number"),
        ([tell("human", 3)], r"conversations\[0\]\.value must be text, got number"),
    ],
)
def test_conversations_that_are_no_prompt_are_refused(tmp_path, turns, says):
    record = {"conversations": turns, "chosen": "a", "rejected": "b"}
    with pytest.raises(DataError, match=f"train.jsonl:1:conversations: .*{says}"):
        read(tmp_path, record)


def test_token_weights_stand_beside_rows_of_any_layout(tmp_path):
    weights = {"chosen_weight": [1.0], "rejected_weight": [2.0]}
    for name in ("orca", "responses by number", "sharegpt", "ultrafeedback"):
        rows = read(tmp_path, CASES[name].record | weights, loss=TISDPOConfig)
        assert rows.dataset["chosen_weights"][0] == [1.0]
        assert "chosen_weight" not in str(rows.counts.unread)


def test_a_row_without_known_columns_says_what_is_needed_and_how_to_name_it(tmp_path):
    message = refusal(tmp_path, {"prompt": "Q", "good": "a", "bad": "b"})
    assert "no column 'chosen'; columns found: bad, good, prompt; needed: prompt, chosen" in message
    assert "data.columns={chosen: COLUMN} says which column it is" in message
    sft = refusal(tmp_path, {"text": "Q"}, loss=SFTConfig)
    assert sft.endswith("; or messages, conversations, or prompt and completion")
    # {chosen: text} would be asked for rejected next
    assert "data.columns={completion: COLUMN} says which column the response is" in sft
    assert "chosen: COLUMN" not in sft
    orca = {"system": "S", "input": "Q", "chosen": "a", "rejected": "b"}
    message = refusal(tmp_path, orca)
    assert "turns; columns found: chosen, input, rejected, system; " in message
    assert message.endswith("(question: COLUMN sends it to the chat template)")
    near = refusal(tmp_path, {"prompt": "Q", "chosen": "a", "reject": "b"})
    assert "rename it to rejected or set data.columns={rejected: reject}" in near


def test_a_row_nested_too_deeply_is_refused_in_every_layout(tmp_path):
    deep: Any = "x"
    for _ in range(5000):
        deep = [deep]
    reader = LayoutReader({}, single=False, weighted=False, allow_roles=False)
    message = say("assistant", "a") | {"x": deep}
    for record in ({"question": "Q"}, {"prompt": [USER]}, {"prompt": "Q"}):
        with pytest.raises(RowError, match="nested too deeply"):
            reader.parse(record | {"chosen": [message], "rejected": [NO]})


def test_the_log_says_once_how_rows_were_recognised_with_one_of_them(tmp_path, caplog):
    record = CASES["orca"].record | {"chosen": "y" * 200 + "z" * 200}
    for split in ("train", "test"):
        write_jsonl(tmp_path / "data" / "set", split, [record])
    options = options_of(tmp_path)
    caplog.set_level("INFO", logger="fastpref")
    log_layouts([rows for s in ("train", "test") for rows in read_rows(options, s, quiet=True)])
    what = "question as a turn of the user, chosen and rejected"
    folder = tmp_path / "data" / "set"
    first, second = caplog.messages
    assert first.splitlines() == [
        f"train: {folder}/train.jsonl: rows of {what}",
        "  prompt: '[system] S [user] Q'",
        f"  chosen: '[assistant] {'y' * 68} … {'z' * 80}'",
        "  rejected: '[assistant] no'",
    ]
    assert second == f"test: {folder}/test.jsonl: rows of {what}"


def test_the_cache_knows_columns_from_each_other(tmp_path):
    record = {"a": "A", "b": "B", "chosen": "yes", "rejected": "no"}
    for column, prompt in (("a", "A"), ("b", "B"), ("a", "A")):
        rows = read(tmp_path, record, data={"columns": {"prompt": column}})
        assert rows.dataset["prompt"][0] == prompt


TURN, GOOD, BAD = [say("user", "Q")], [say("assistant", "yes")], [say("assistant", "no")]


@pytest.mark.parametrize(
    "record",
    [
        {"prompt": TURN, "chosen": GOOD, "rejected": BAD},
        {"prompt": "Q", "chosen": TURN + GOOD, "rejected": TURN + BAD},
        {"conversations": TURN, "response_0": BAD, "response_1": GOOD, "winner": 1},
    ],
)
def test_messages_as_a_struct_of_lists_are_the_same_row(record):
    structs = {
        field: {key: [message[key] for message in value] for key in ("role", "content")}
        for field, value in record.items()
        if isinstance(value, list)
    }
    reader = LayoutReader({}, single=False, weighted=False, allow_roles=False)
    (row, layout), (wanted, as_list) = reader.parse(record | structs), reader.parse(record)
    assert (row, layout.what) == (wanted, as_list.what)


def test_a_struct_of_lists_of_several_lengths_is_refused():
    reader = LayoutReader({"chosen": "good"}, single=False, weighted=False, allow_roles=False)
    with pytest.raises(RowError, match="a message each, got role 2, content 1") as found:
        reader.parse({"good": {"role": ["user", "assistant"], "content": ["Q"]}, "rejected": BAD})
    assert found.value.field == "good"
