import datetime
import json
from dataclasses import replace

import pytest
from chat_templates import CHATML_TOOLS, LLAMA3, MISTRAL
from small_data import TEMPLATE, byte_tokenizer

from fastpref.data.chat import (
    PLAIN_EXCHANGE,
    ChatFormat,
    check_chat_template,
    current_date,
    prints_date,
    read_chat_template,
    render_chat,
    strip_final_eos,
)
from fastpref.data.layouts.row_values import RowError
from fastpref.errors import ConfigError


def say(role, content):
    return json.dumps([{"role": role, "content": content}])


def chat_format(template, **fields):
    return ChatFormat(tokenizer=byte_tokenizer(template), template=None, **fields)


def render(template=TEMPLATE, *, prompt=None, chosen=None, tools=None, date=None):
    prompt = say("user", "Q") if prompt is None else prompt
    responses = [chosen or say("assistant", "yes"), say("assistant", "no")]
    return render_chat(prompt, responses, chat_format(template, date=date), tools=tools)


def calling(arguments):
    call = {"type": "function", "function": {"name": "trip", "arguments": arguments}}
    return json.dumps([{"role": "assistant", "tool_calls": [call]}], ensure_ascii=False)


def test_a_response_is_what_follows_the_generation_prompt_without_the_final_eos():
    prompt, responses, is_prefix, *_ = render()
    assert prompt == "<s>[user]Q</s>\n[assistant]"
    assert responses == ["yes", "no"]
    assert is_prefix


def test_an_empty_prompt_is_what_the_template_makes_of_it():
    assert render(prompt="[]").prompt == "<s>[assistant]"


def test_a_prompt_that_is_no_prefix_is_divided_where_the_texts_part():
    # the generation prompt opens a block that rendered answers do not have
    template = TEMPLATE.replace("[assistant]{% endif", "[assistant]<think>{% endif")
    prompt, responses, is_prefix, *_ = render(template)
    assert (prompt, responses, is_prefix) == ("<s>[user]Q</s>\n[assistant]", ["yes", "no"], False)


def test_a_file_replaces_the_tokenizers_template(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}{{ m['content'] }}|{% endfor %}")
    template = read_chat_template(str(path))
    tokenizer = byte_tokenizer(TEMPLATE)
    messages = (say("user", "Q"), [say("assistant", "yes")])
    chat = ChatFormat(tokenizer=tokenizer, template=template)
    assert render_chat(*messages, chat)[:2] == ("Q|", ["yes|"])
    check_chat_template(byte_tokenizer(None), template)


def test_rows_of_messages_need_a_template():
    with pytest.raises(ConfigError, match=r"data\.chat_template=FILE"):
        check_chat_template(byte_tokenizer(None), None)
    with pytest.raises(ConfigError, match=r"data\.chat_template: .*none\.jinja cannot be read"):
        read_chat_template("none.jinja")


def test_a_template_may_refuse_messages_but_must_be_jinja():
    with pytest.raises(RowError, match="refuses the messages: no system role here"):
        render("{{ raise_exception('no system role here') }}")
    with pytest.raises(ConfigError, match="the tokenizer's chat template: line 2: "):
        render("\n{% for %}{{ strftime_now('%Y') }}", date="2026-01-02")
    broken = ChatFormat(tokenizer=byte_tokenizer(TEMPLATE), template="{% for %}")
    with pytest.raises(ConfigError, match=r"data\.chat_template: line 1"):
        broken.render(PLAIN_EXCHANGE)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a</s>", "a"), ("a</s>\n", "a"), ("a</s></s>", "a</s>"), ("a\n", "a\n"), ("</s>a", "</s>a")],
)
def test_one_final_eos_is_taken_off_with_the_space_after_it(text, expected):
    assert strip_final_eos(text, "</s>") == expected


@pytest.mark.parametrize("closing", ["[assistant]", "</s>", "\n<end>\n"])
def test_what_a_template_puts_behind_the_last_eos_is_not_of_the_response(closing):
    # the first as DeepSeek Coder has it: the generation prompt always, whether asked for or not
    template = TEMPLATE.replace(
        "[assistant]{% endif", "[assistant]{% else %}" + closing + "{% endif"
    )
    prompt, responses, *_ = render(template, chosen=say("assistant", f"yes</s>{closing}x"))
    assert (prompt, responses) == ("<s>[user]Q</s>\n[assistant]", [f"yes</s>{closing}x", "no"])


def test_what_is_rendered_is_what_the_row_says_key_by_key():
    arguments = {"to": "Zürich", "from": None, "by": {"z": [1, 2.5], "a": True}}
    tools = [{"type": "function", "function": {"name": "trip", "description": "ä"}}]
    chosen, no = calling(arguments), say("assistant", "no")
    tokenizer = byte_tokenizer(CHATML_TOOLS, eos_token="<|im_end|>")
    rendered = render_chat(
        say("user", "Q"),
        [chosen, no],
        ChatFormat(tokenizer=tokenizer, template=None),
        tools=json.dumps(tools),
    )
    text = '{"to": "Zürich", "from": null, "by": {"z": [1, 2.5], "a": true}}'
    assert rendered.responses[0] == (
        f'<tool_call>\n{{"name": "trip", "arguments": {text}}}\n</tool_call>'
    )
    whole = tokenizer.apply_chat_template(
        [*json.loads(say("user", "Q")), *json.loads(chosen)], tools=tools, tokenize=False
    )
    assert rendered.prompt + rendered.responses[0] + "<|im_end|>\n" == whole
    assert '"name": "trip", "description": "ä"' in rendered.prompt
    assert not (rendered.left_out or rendered.prompt_left_out or rendered.arguments_decoded)


def test_arguments_nested_too_deeply_stay_text():
    with pytest.raises(RowError, match="the chat template fails on the messages"):
        render(MISTRAL, chosen=calling("[" * 100_000))


def test_arguments_are_decoded_only_where_the_template_fails_on_their_text():
    text = '{"b": "x", "a": 2}'
    rendered = render(MISTRAL, chosen=calling(text))
    assert rendered.responses == [' [CALL]trip b="x" a=2', " no"]
    assert rendered.arguments_decoded and not rendered.left_out
    assert not render(MISTRAL, chosen=calling({"b": "x"})).arguments_decoded
    as_text = render(CHATML_TOOLS, chosen=calling(text))
    assert json.dumps(text) in as_text.responses[0] and not as_text.arguments_decoded


@pytest.mark.parametrize(
    ("template", "error"),
    [
        ("{{ messages[1].content.missing.more }}", "UndefinedError"),
        ("{{ 1 + messages[0].content }}", "TypeError"),
        ("{{ {}['x'].y }}", "UndefinedError"),
        ("{{ 1 / (messages | length - messages | length) }}", "ZeroDivisionError"),
        ("{{ messages[0].content.index('?') }}", "ValueError"),
        ("{{ messages[0].items() | first | int(default=[]) + 1 }}", "TypeError"),
    ],
)
def test_whatever_a_template_raises_is_an_error_of_the_row(template, error):
    with pytest.raises(RowError, match=f"fails on the messages: {error}: ") as caught:
        render(template)
    assert caught.value.field == "prompt"


def test_an_error_names_the_field_that_the_template_fails_on():
    template = TEMPLATE.replace("m['content']", "m['content'].upper()")
    silent = json.dumps([{"role": "assistant", "reasoning_content": "hm"}])
    with pytest.raises(RowError) as caught:
        render(template, chosen=silent)
    assert caught.value.field == "chosen"
    # the template itself is sound
    chat_format(template).check()


@pytest.mark.parametrize("template", ["{{ 1 + messages }}", "{{ raise_exception('no') }}"])
def test_a_template_that_cannot_render_an_exchange_is_an_error_of_the_config(template):
    with pytest.raises(ConfigError, match="the tokenizer's chat template cannot render one user"):
        chat_format(template).check()
    given = ChatFormat(tokenizer=byte_tokenizer(TEMPLATE), template=template)
    with pytest.raises(ConfigError, match=r"^data\.chat_template cannot render one user"):
        given.check()


def test_a_template_is_told_the_date_and_nothing_else_of_it_changes():
    template = (
        "\n   {% if strftime_now is defined %}\n {{ strftime_now(f) }}|{% endif %}" + TEMPLATE
    )
    for code in ("%d %b %Y", "%-d.%-m.%y", "%A, %B %d; %H:%M"):
        told = chat_format(template.replace("f)", f"{code!r})"), date="2026-03-05")
        day = datetime.datetime(2026, 3, 5)
        untold = chat_format(template.replace("strftime_now(f)", f"'{day.strftime(code)}'"))
        for generation_prompt in (False, True):
            assert told.render(
                PLAIN_EXCHANGE, generation_prompt=generation_prompt
            ) == untold.render(PLAIN_EXCHANGE, generation_prompt=generation_prompt)
    rendered = render(LLAMA3, date="2026-03-05")
    assert "Today Date: 05 Mar 2026\n" in rendered.prompt
    assert "strftime" not in rendered.prompt


def test_a_date_is_asked_for_by_some_templates():
    assert prints_date(byte_tokenizer(LLAMA3), None)
    assert not prints_date(byte_tokenizer(LLAMA3), TEMPLATE)
    assert not prints_date(byte_tokenizer(TEMPLATE), None)
    assert prints_date(byte_tokenizer({"default": TEMPLATE, "tool_use": LLAMA3}), None)
    tokenizer = byte_tokenizer(LLAMA3)
    today = ChatFormat(tokenizer=tokenizer, template=None, date=current_date(tokenizer))
    untold = ChatFormat(tokenizer=tokenizer, template=None)
    assert today.render(PLAIN_EXCHANGE) == untold.render(PLAIN_EXCHANGE)


THINKING = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }}{% endfor %}"
    "{% if add_generation_prompt %}[assistant]"
    "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}"
    "{% endif %}"
)


def test_arguments_of_the_template_are_told_to_it_with_and_without_a_date():
    tokenizer = byte_tokenizer(THINKING)
    for date in (None, "2026-11-30"):
        chat = ChatFormat(tokenizer=tokenizer, template=None, date=date)
        plain = chat.render(PLAIN_EXCHANGE[:1], generation_prompt=True)
        told = replace(chat, arguments={"enable_thinking": False})
        assert told.render(PLAIN_EXCHANGE[:1], generation_prompt=True) == plain + "<think></think>"
        assert (
            replace(chat, arguments={"enable_thinking": True}).render(
                PLAIN_EXCHANGE[:1], generation_prompt=True
            )
            == plain
        )


def test_an_argument_that_the_template_does_not_mention_is_refused_with_the_nearest():
    named = {"default": TEMPLATE, "other": THINKING}
    for tokenizer in (byte_tokenizer(THINKING), byte_tokenizer(named)):
        check_chat_template(tokenizer, None, {"enable_thinking": False})
        with pytest.raises(ConfigError, match=r"enable_thinkng: .*tokenizer's.*nearest: enable_th"):
            check_chat_template(tokenizer, None, {"enable_thinkng": False})
    with pytest.raises(ConfigError, match=r"data\.chat_template does not mention enable_thinking"):
        check_chat_template(byte_tokenizer(THINKING), TEMPLATE, {"enable_thinking": False})
