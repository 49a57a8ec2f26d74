import json

import pytest
from small_data import TEMPLATE, byte_tokenizer

from fastpref.chat import check_chat_template, read_chat_template, render_chat, strip_final_eos
from fastpref.errors import ConfigError
from fastpref.rows import RowError


def say(role, content):
    return json.dumps([{"role": role, "content": content}])


def render(template=TEMPLATE, *, prompt=None):
    prompt = say("user", "Q") if prompt is None else prompt
    responses = [say("assistant", "yes"), say("assistant", "no")]
    return render_chat(prompt, responses, byte_tokenizer(template), None)


def test_a_response_is_what_follows_the_generation_prompt_without_the_final_eos():
    prompt, responses, is_prefix = render()
    assert prompt == "<s>[user]Q</s>\n[assistant]"
    assert responses == ["yes", "no"]
    assert is_prefix


def test_an_empty_prompt_is_what_the_template_makes_of_it():
    assert render(prompt="[]")[0] == "<s>[assistant]"


def test_a_prompt_that_is_no_prefix_is_divided_where_the_texts_part():
    # the generation prompt opens a block that rendered answers do not have
    template = TEMPLATE.replace("[assistant]{% endif", "[assistant]<think>{% endif")
    prompt, responses, is_prefix = render(template)
    assert (prompt, responses, is_prefix) == ("<s>[user]Q</s>\n[assistant]", ["yes", "no"], False)


def test_a_file_replaces_the_tokenizers_template(tmp_path):
    path = tmp_path / "template.jinja"
    path.write_text("{% for m in messages %}{{ m['content'] }}|{% endfor %}")
    template = read_chat_template(str(path))
    tokenizer = byte_tokenizer(TEMPLATE)
    messages = (say("user", "Q"), [say("assistant", "yes")])
    assert render_chat(*messages, tokenizer, template)[:2] == ("Q|", ["yes|"])
    check_chat_template(byte_tokenizer(None), template)


def test_rows_of_messages_need_a_template():
    with pytest.raises(ConfigError, match=r"data\.chat_template=FILE"):
        check_chat_template(byte_tokenizer(None), None)
    with pytest.raises(ConfigError, match=r"data\.chat_template: .*none\.jinja cannot be read"):
        read_chat_template("none.jinja")


def test_a_template_may_refuse_messages_but_must_be_jinja():
    with pytest.raises(RowError, match="no system role here"):
        render("{{ raise_exception('no system role here') }}")
    with pytest.raises(ConfigError, match=r"data\.chat_template: line 1"):
        render("{% for %}")


@pytest.mark.parametrize(
    ("text", "expected"),
    [("a</s>", "a"), ("a</s>\n", "a"), ("a</s></s>", "a</s>"), ("a\n", "a\n"), ("</s>a", "</s>a")],
)
def test_one_final_eos_is_taken_off_with_the_space_after_it(text, expected):
    assert strip_final_eos(text, "</s>") == expected
