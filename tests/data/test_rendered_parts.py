import json

import pytest
from chat_templates import CHATML_TOOLS, MISTRAL, QWEN3
from small_data import byte_tokenizer

from fastpref.data.chat import ChatFormat
from fastpref.data.rendered_parts import field_left_out, prompt_is_left_out

USER = {"role": "user", "content": "yes?"}


def answer(content="yes", **fields):
    return {"role": "assistant", "content": content, **fields}


def calling(arguments, name="trip"):
    return answer("", tool_calls=[{"id": "c7", "function": {"name": name, "arguments": arguments}}])


def left_out(template, *messages):
    chat = ChatFormat(tokenizer=byte_tokenizer(template), template=None)
    prompt = chat.render([USER], generation_prompt=True)
    text = chat.render([USER, *messages])
    return field_left_out("chosen", list(messages), text, len(prompt))


@pytest.mark.parametrize(
    ("template", "messages", "expected"),
    [
        (QWEN3, [answer("<think>hm</think>\nyes")], "chosen.content"),
        (QWEN3, [answer(reasoning_content="because")], "chosen.reasoning_content"),
        (QWEN3, [calling({"x": "1"})], "chosen.tool_calls.function.name"),
        (QWEN3, [answer(), {"role": "tool", "content": "ok", "name": "trip"}], "chosen.name"),
        (
            CHATML_TOOLS.replace("call.function.arguments | tojson", "'{}'"),
            [calling({"by": [{"id": "rail"}]})],
            "chosen.tool_calls.function.arguments.by.id",
        ),
        (
            CHATML_TOOLS.replace("call.function.arguments | tojson", "'{}'"),
            [calling('{"by": "rail"}')],
            "chosen.tool_calls.function.arguments.by",
        ),
    ],
)
def test_a_part_of_a_response_that_is_not_rendered_is_named(template, messages, expected):
    assert left_out(template, *messages) == expected


@pytest.mark.parametrize(
    ("template", "messages"),
    [
        (QWEN3, [answer("  yes\n\nor no ")]),
        (QWEN3.replace("+ content +", "+ content | trim +"), [answer("\nyes\n")]),
        (CHATML_TOOLS, [calling({"a": 'say "Ü"\n', "b": {"type": "x", "n": 3}})]),
        (CHATML_TOOLS, [calling('{"a":"say","b":2}')]),
        (CHATML_TOOLS.replace("tojson", "tojson(ensure_ascii=true)"), [calling({"a": "Ü"})]),
        (CHATML_TOOLS.replace("tojson", "string"), [calling({"a": "say\n'"})]),
        (MISTRAL, [calling({"to": "Rom"}), {"role": "tool", "content": "ok", "tool_call_id": "9"}]),
    ],
)
def test_what_is_trimmed_or_escaped_or_an_identifier_is_not_left_out(template, messages):
    assert left_out(template, *messages) == ""


def test_what_stands_in_the_prompt_does_not_stand_for_the_response():
    text = "[user]yes [assistant]no"
    assert field_left_out("chosen", [answer("yes")], text, text.index("no")) == "chosen.content"
    # the prompt may end with the beginning of the response
    assert field_left_out("chosen", [answer("[assistant]no")], text, text.index("no")) == ""


def test_tools_and_system_messages_are_looked_for_in_the_prompt():
    tool = {"type": "function", "function": {"name": "trip"}}
    system = {"role": "system", "content": "Be\nbrief."}
    text = json.dumps(tool) + " Be brief."
    assert not prompt_is_left_out([system, USER], [tool], text)
    assert prompt_is_left_out([USER], [tool, {"name": "other"}], text)
    assert prompt_is_left_out([system | {"content": "Be long."}], None, text)
    assert not prompt_is_left_out([USER], None, "")
