import pytest

from fastpref.data.layouts.messages import add_system, content_text, read_messages, read_tools
from fastpref.data.layouts.row_values import RowError
from fastpref.data.layouts.rows import EMPTY_RESPONSE, parse_row


def say(role, content, **fields):
    return {"role": role, "content": content, **fields}


CALL = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}


def parse(**changed):
    record = {
        "prompt": [say("user", "Q")],
        "chosen": [say("assistant", "yes")],
        "rejected": [say("assistant", "no")],
    }
    return parse_row(record | changed, weighted=False, allow_roles=False)


@pytest.mark.parametrize(
    "message",
    [
        {"role": "assistant", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "tool_calls": [CALL]},
        {"role": "assistant", "content": "", "tool_calls": [CALL]},
        {"role": "assistant", "content": None, "reasoning_content": "hm"},
        {"role": "assistant", "content": "", "function_call": CALL["function"]},
    ],
)
def test_a_message_needs_no_content_beside_something_else(message):
    assert not parse(chosen=[message])["drop"]


@pytest.mark.parametrize("extra", [{}, {"tool_calls": []}, {"tool_calls": None}, {"name": ""}])
def test_a_message_that_says_nothing_at_all_is_refused_or_an_empty_response(extra):
    with pytest.raises(RowError, match=r"chosen\[0\].content is null"):
        parse(chosen=[say("assistant", None, **extra)])
    with pytest.raises(RowError, match=r"chosen\[0\] has no content; keys found: "):
        parse(chosen=[{"role": "assistant", **extra}])
    assert parse(chosen=[say("assistant", " ", **extra)])["drop"] == EMPTY_RESPONSE


def test_keys_of_a_message_that_are_null_are_left_out_and_those_in_its_arguments_stay():
    call = {"function": {"name": "f", "arguments": {"x": None}}}
    messages = [say("assistant", None, tool_calls=[call], name=None)]
    assert read_messages("chosen", messages) == [{"role": "assistant", "tool_calls": [call]}]


@pytest.mark.parametrize(
    ("content", "text"),
    [
        ([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}], "ab"),
        (["a", {"text": "b"}], "ab"),
        ([{"type": "output_text", "text": "a"}], "a"),
        ([], ""),
    ],
)
def test_a_list_of_text_parts_is_their_text(content, text):
    assert content_text(content) == text
    kept = read_messages("chosen", [{"content": content, "role": "assistant", "name": "n"}])
    assert list(kept[0].items()) == [("content", text), ("role", "assistant"), ("name", "n")]


@pytest.mark.parametrize(
    ("part", "named"),
    [
        ({"type": "image_url", "image_url": "x"}, "is a part of type 'image_url': only text"),
        ({"type": "text"}, "must have text, got null"),
        (3, "must be text or a text part, got number"),
    ],
)
def test_a_part_that_is_no_text_is_refused_by_name(part, named):
    with pytest.raises(RowError, match=rf"prompt\[0\].content\[1\] {named}") as caught:
        parse(prompt=[say("user", ["Q", part])])
    assert caught.value.field == "prompt"


def test_a_system_column_becomes_the_first_message():
    user, system = say("user", "Q"), say("system", "S")
    assert add_system([user], "S") == [system, user]
    assert add_system([system, user], "S") == [system, user]
    assert add_system([user], None) == add_system([user], " ") == [user]
    whole = parse(
        prompt=[user], chosen=[user, say("assistant", "a")], rejected=[user, say("assistant", "b")]
    )
    assert parse(system="S", chosen=[say("assistant", "a")], rejected=[say("assistant", "b")])[
        "prompt"
    ] == whole["prompt"].replace("[", '[{"role": "system", "content": "S"}, ', 1)


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"system": ["S"]}, "system must be text, got list"),
        ({"system": "S", "prompt": [say("system", "T"), say("user", "Q")]}, "two system messages"),
        ({"tools": {"name": "f"}}, "tools must be a list of tool schemas, got object"),
        ({"tools": [3]}, r"tools\[0\] must be a tool schema, got number"),
        ({"tools": "[{"}, "tools is text but not JSON"),
        ({"tools": [{"name": "\ud800"}]}, "tools.name holds half a surrogate pair"),
        ({"chosen": [say("assistant", "a", x=["\ud800"])]}, r"chosen\[0\].x holds half a surr"),
        ({"chosen": [say("assistant", "a", **{"\ud800": 1})]}, "chosen holds half a surrogate"),
    ],
)
def test_columns_beside_the_messages_are_checked(fields, named):
    with pytest.raises(RowError, match=named):
        parse(**fields)


def test_tools_may_be_a_list_or_json_text():
    schema = {"type": "function", "function": {"name": "f"}}
    texts = ('[{"type": "function", "function": {"name": "f"}}]', [str(schema).replace("'", '"')])
    assert all(read_tools(tools) == [schema] for tools in ([schema], *texts))
    assert read_tools(None) is read_tools("null") is read_tools(" ") is None
    assert read_tools([]) == []
