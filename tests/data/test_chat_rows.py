"""Rows of messages from the file to the token ids: what is counted, refused, cached."""

import json
import logging
from functools import partial

import pytest
from chat_templates import (
    CHATML_TOOLS,
    LLAMA3,
    MISTRAL,
    QWEN3,
    Tomorrow,
    byte_level_tokenizer,
    metaspace_tokenizer,
)
from small_data import TEMPLATE, count_calls, make_config, pair, write_jsonl
from tokenizers import processors
from transformers.utils import chat_template_utils

from fastpref.config import SFTConfig
from fastpref.data.encode import load_split
from fastpref.data.options import data_options
from fastpref.data.remarks import Remark
from fastpref.errors import ConfigError, DataError


def say(role, content, **fields):
    return {"role": role, "content": content, **fields}


def calling(arguments, **fields):
    call = {"id": "c1", "type": "function", "function": {"name": "trip", "arguments": arguments}}
    return say("assistant", None, tool_calls=[call], **fields)


def chat(chosen="yes", rejected="no", question="Q", **fields):
    sides = {"chosen": chosen, "rejected": rejected}
    answers = {
        side: [say("assistant", answer) if isinstance(answer, str) else answer]
        for side, answer in sides.items()
    }
    return {"prompt": [say("user", question)], **answers, **fields}


def encode(tmp_path, rows, tokenizer, *, quiet=True, **options):
    write_jsonl(tmp_path / "data" / "set", "train", rows)
    config = make_config(tmp_path, **options)
    return load_split(
        data_options(config), "train", tokenizer, vocab_size=len(tokenizer), quiet=quiet
    )


def texts(split, tokenizer, row=0):
    encoded = split.dataset[row]
    return tuple(tokenizer.decode(encoded[f"{s}_ids"]) for s in ("prompt", "chosen", "rejected"))


def test_tool_calls_without_content_are_trained_on_with_the_tools_of_the_row(tmp_path):
    tokenizer = byte_level_tokenizer(CHATML_TOOLS)
    tools = [{"type": "function", "function": {"name": "trip"}}]
    calls = [calling({"to": "Rom", "from": "Zürich"}), calling({"from": "Rom", "to": None})]
    rows = [
        chat(calls[0], calls[1], tools=tools, system="S"),
        chat(calls[1], "no", question="R", tools=json.dumps(tools)),
    ]
    split = encode(tmp_path, rows, tokenizer)
    prompt, chosen, rejected = texts(split, tokenizer)
    assert prompt == (
        "<|im_start|>system\nS\n\n# Tools\n<tools>\n"
        '{"type": "function", "function": {"name": "trip"}}\n</tools><|im_end|>\n'
        "<|im_start|>user\nQ<|im_end|>\n<|im_start|>assistant\n"
    )
    assert chosen == (
        '<tool_call>\n{"name": "trip", "arguments": {"to": "Rom", "from": "Zürich"}}\n'
        "</tool_call><|im_end|>"
    )
    assert '{"from": "Rom", "to": null}' in rejected
    assert not split.audit.remarks and not split.audit.dropped
    sft = encode(tmp_path, rows, tokenizer, loss=SFTConfig())
    assert texts(sft, tokenizer)[:2] == (prompt, chosen)
    reverse = encode(tmp_path, rows, tokenizer, loss=SFTConfig(), reverse_dataset=True)
    assert texts(reverse, tokenizer)[1] == rejected


def test_what_a_template_leaves_out_is_counted_with_its_first_place(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="fastpref")
    cut = "<think>hm</think>yes"
    rows = [chat(), chat(cut, "no", "R"), chat("yes", say("assistant", "no", note="x"), "S")]
    rows += [chat(system="T", tools=[{"name": "f"}])]
    split = encode(tmp_path, rows, byte_level_tokenizer(QWEN3), quiet=False)
    assert split.audit.remarks == {
        Remark.RESPONSE_NOT_RENDERED: 2,
        Remark.PROMPT_NOT_RENDERED: 1,
    }
    assert "leaves out a part of a response: 2 of 4 (50 %) rows (first: " in caplog.text
    assert "train.jsonl:2:chosen.content)" in caplog.text


def test_what_else_than_the_assistants_words_a_response_holds_is_counted(tmp_path):
    looked_up = [calling({}), say("tool", "12:30"), say("assistant", "At noon.")]
    rows = [chat(), chat(question="R"), chat("a<|im_end|>b", question="S"), chat("c<|im_end|>")]
    rows[1]["chosen"] = looked_up
    split = encode(tmp_path, rows, byte_level_tokenizer(CHATML_TOOLS))
    counted = {Remark.OTHERS_SPEAK: 2, Remark.EOS_INSIDE: 3, Remark.EOS_AT_END: 4}
    assert split.audit.first_remarks == {
        remark: f"{tmp_path / 'data' / 'set' / 'train.jsonl'}:{row}"
        for remark, row in counted.items()
    }
    # as in Gemma: turns end in a marker of their own
    tokenizer = byte_level_tokenizer(CHATML_TOOLS, eos_token="</s>")
    split = encode(tmp_path, rows[:1], tokenizer)
    assert split.audit.remarks == {Remark.EOS_ADDED: 1}
    assert texts(split, tokenizer)[1] == "yes<|im_end|>\n</s>"


@pytest.mark.parametrize("write", [json.dumps, str])
def test_texts_that_are_messages_written_out_are_counted(tmp_path, write):
    answers = [write([say("user", "Q"), say("assistant", answer)]) for answer in ("yes", "no")]
    rows = [pair("R", '[{"a": 1}]', "{'role': 2}"), pair("Q", *answers)]
    split = encode(tmp_path, rows, byte_level_tokenizer())
    assert split.audit.remarks == {Remark.TEXT_OF_MESSAGES: 1}


@pytest.mark.parametrize("write", [json.dumps, str, partial(json.dumps, indent=1), "\n{}".format])
def test_messages_written_as_text_are_messages_where_they_are_in_the_first_row(tmp_path, write):
    rows = [chat(answer, question=f"{answer}?") for answer in ("yes", "it's")]
    tokenizer = byte_level_tokenizer(CHATML_TOOLS)
    expected = encode(tmp_path, rows, tokenizer).dataset[:]
    written = [{field: write(value) for field, value in row.items()} for row in rows]
    split = encode(tmp_path, written, tokenizer)
    assert split.dataset[:] == expected and not split.audit.remarks
    written[1]["chosen"] = written[1]["chosen"][:-2]
    with pytest.raises(DataError, match=r"jsonl:2:chosen: .*begins as a list of messages and is"):
        encode(tmp_path, written, tokenizer)


def test_text_without_tokens_is_counted(tmp_path, caplog):
    rows = [pair("a", "b", "c"), pair("é", "yes", "né"), pair("d", "e", "ü")]
    tokenizer = metaspace_tokenizer(None)
    with caplog.at_level(logging.WARNING, logger="fastpref"):
        split = encode(tmp_path, rows, tokenizer, quiet=False)
    num_tokens = split.audit.prompt_tokens + split.audit.response_tokens
    assert f": 2 of 3 (66.7 %) rows, 3 of {num_tokens} (" in caplog.text
    assert split.audit.first_remarks[Remark.UNKNOWN].endswith("train.jsonl:2")
    # cut, the last one has none left
    cut = {"max_length": 12, "max_prompt_length": 6}
    rows = [pair("a", "b", "c"), pair("é", "yes", "né"), pair("d", "e", "f" * 20 + "ü")]
    audit = encode(tmp_path, rows, tokenizer, **cut).audit
    assert audit.remarks[Remark.REJECTED_CUT] == audit.remarks[Remark.UNKNOWN] == 1
    assert audit.unknown_tokens == 2
    # where that token has another use, as in GPT-2, it says nothing
    tokenizer.unk_token = tokenizer.eos_token
    assert Remark.UNKNOWN not in encode(tmp_path, rows, tokenizer).audit.remarks


def test_responses_that_differ_in_what_is_left_out_alone_are_nothing_to_prefer(tmp_path):
    rows = [chat("<think>a</think>yes", "<think>b</think>yes", f"Q{i}") for i in range(3)]
    with pytest.raises(DataError, match=r"equals rejected in 3 of 3 .* leaves out .*:1:chosen\."):
        encode(tmp_path, rows, byte_level_tokenizer(QWEN3))


def test_a_response_that_is_rendered_empty_is_dropped_or_refused_when_strict(tmp_path):
    tokenizer = byte_level_tokenizer(QWEN3)
    rows = [chat(), chat(calling({})), chat("a", say("assistant", "", reasoning_content="b"))]
    split = encode(tmp_path, rows, tokenizer, data={"max_dropped": 0.9})
    assert split.audit.dropped == {"empty response": 2}
    assert split.audit.first_dropped["empty response"].endswith(
        "train.jsonl:2:chosen.tool_calls.function.name, which the chat template leaves out"
    )
    with pytest.raises(DataError, match=r"train\.jsonl:2: empty response \(data\.strict=true\)"):
        encode(tmp_path, rows, tokenizer, data={"strict": True})


def test_a_row_that_the_template_fails_on_is_named_or_skipped(tmp_path):
    tokenizer = metaspace_tokenizer(MISTRAL)
    rows = [chat(), chat(calling('{"to": "Rom"}'), "no", "R"), chat(calling("no JSON"))]
    with pytest.raises(DataError, match=r"train\.jsonl:3:chosen: the chat template fails .*Error"):
        encode(tmp_path, rows, tokenizer)
    split = encode(tmp_path, rows, tokenizer, data={"on_error": "skip"})
    assert split.audit.dropped == {"malformed row": 1}
    assert split.audit.remarks == {Remark.ARGUMENTS_DECODED: 1}
    assert texts(split, tokenizer, 1)[1] == '[CALL]trip to="Rom"</s>'


@pytest.mark.parametrize("depth", [300, 600, 900])
@pytest.mark.parametrize("column", ["tools", "chosen"])
def test_a_row_of_any_depth_is_encoded_or_named(tmp_path, column, depth):
    tokenizer = byte_level_tokenizer(CHATML_TOOLS)
    nested = json.loads(depth * "[" + depth * "]")
    tool = {"type": "function", "function": {"name": "trip", "parameters": nested}}
    deep = {"tools": [tool], "chosen": say("assistant", "yes", tool_calls=nested)}
    rows = [chat(question="R"), chat(**{column: deep[column]})]
    # how deep a row may be depends on Python's version
    try:
        encode(tmp_path, rows, tokenizer)
    except DataError as error:
        assert "train.jsonl:2" in str(error)
        split = encode(tmp_path, rows, tokenizer, data={"on_error": "skip"})
        assert split.audit.dropped == {"malformed row": 1}


def test_what_a_template_refuses_or_leaves_out_is_named_as_the_file_names_it(tmp_path, caplog):
    question, bad, no = say("user", "R"), calling("no JSON"), say("assistant", "no")
    sft, columns = {"loss": SFTConfig()}, {"prompt": "ask", "chosen": "good"}
    answers = {"chosen": "yes", "rejected": "no"}
    cases = (
        ("messages", {"messages": [question, bad]}, sft),
        ("completion", {"prompt": "R", "completion": [bad]}, sft),
        ("conversations", {"conversations": [say("system", "S"), question], **answers}, {}),
        ("chosen", {s: [say("system", "S"), question, no | {"id": s}] for s in answers}, {}),
        ("chosen", {"chosen": [question, bad], "rejected": [question, no]}, {}),
        (
            "good",
            {"ask": [question], "good": [bad], "rejected": [no]},
            {"data": {"columns": columns}},
        ),
    )
    for field, row, options in cases:
        with pytest.raises(DataError, match=rf"train\.jsonl:1:{field}: the chat template"):
            encode(tmp_path, [row], metaspace_tokenizer(MISTRAL), **options)
    caplog.set_level(logging.INFO, logger="fastpref")
    row = {"messages": [question, say("assistant", "<think>hm</think>yes")]}
    encode(tmp_path, [row], byte_level_tokenizer(QWEN3), quiet=False, **sft)
    assert "train.jsonl:1:messages.content)" in caplog.text


def test_a_template_that_fails_on_every_row_is_an_error_of_the_config(tmp_path):
    rows = [chat(), chat("a", "b")]
    for data in ({}, {"on_error": "skip"}):
        with pytest.raises(ConfigError, match="the tokenizer's chat template cannot render"):
            encode(tmp_path, rows, byte_level_tokenizer("{{ messages.x.y }}"), data=data)
    path = tmp_path / "bad.jinja"
    path.write_text("{{ messages + 1 }}")
    data = {"chat_template": str(path), "on_error": "skip"}
    with pytest.raises(ConfigError, match=r"^data\.chat_template cannot render") as caught:
        encode(tmp_path, rows, byte_level_tokenizer(TEMPLATE), data=data)
    assert caught.value.exit_code == 2


@pytest.mark.parametrize(
    ("template", "num_encoded", "date"),
    [(LLAMA3, 1, "03 Feb 2031"), (LLAMA3.replace("strftime_now", "today"), 0, "26 Jul 2024")],
)
def test_the_cache_knows_the_date_if_the_template_does(
    tmp_path, monkeypatch, template, num_encoded, date
):
    tokenizer = byte_level_tokenizer(template, eos_token="<|eot_id|>")
    encode(tmp_path, [chat()], tokenizer)

    def encode_again():
        config = make_config(tmp_path)
        return load_split(
            data_options(config), "train", tokenizer, vocab_size=len(tokenizer), quiet=True
        )

    assert count_calls(encode_again, "encode_row") == 0
    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert count_calls(encode_again, "encode_row") == num_encoded
    assert f"Today Date: {date}\n" in texts(encode_again(), tokenizer)[0]


def test_tokens_of_texts_and_their_bos_are_told_of_once(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="fastpref")
    tokenizer = metaspace_tokenizer(MISTRAL)
    rows = [*(pair(f"Q{i}", "yes", "no") for i in range(3)), chat()]
    split = encode(tmp_path, rows, tokenizer, quiet=False)
    assert split.audit.remarks[Remark.JOINED_DIFFERS] == 3
    assert (split.audit.text_rows, split.audit.joined_rows) == (3, 3)
    assert "one by one, which is the rule of the seed repositories: 3 of 3" in caplog.text
    assert "no <s> is put before prompts" not in caplog.text
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<s> $A", special_tokens=[("<s>", tokenizer.bos_token_id)]
    )
    encode(tmp_path, rows, tokenizer, quiet=False)
    assert caplog.text.count("no <s> is put before prompts that are texts") == 1
    caplog.clear()
    encode(tmp_path, [chat()], tokenizer, quiet=False)
    assert "no <s>" not in caplog.text


def test_it_is_said_that_only_the_first_rows_were_looked_at(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="fastpref")
    rows = [pair(f"Q{i}:", "yes", " no") for i in range(1005)]
    split = encode(tmp_path, rows, metaspace_tokenizer(), quiet=False)
    assert split.audit.remarks[Remark.JOINED_DIFFERS] == 1000
    assert (
        "1,000 of 1,000 (100 %) text rows, of 1,005 only the first 1,000 of each source were "
        "looked at (first: "
    ) in caplog.text


def test_a_border_inside_a_token_is_counted(tmp_path):
    template = TEMPLATE.replace("[assistant]{%", "[assistant] {%").replace("']' +", "'] ' +")
    tokenizer = byte_level_tokenizer(template, eos_token="</s>")
    split = encode(tmp_path, [chat("yes", "no"), chat("a", "b")], tokenizer)
    assert split.audit.remarks == {Remark.BORDER_TOKEN: 1}
    assert texts(split, tokenizer)[:2] == ("<s>[user] Q</s>\n[assistant]", " yes</s>")


def test_a_text_says_where_its_system_message_went(tmp_path):
    rows = [pair(system="S"), pair("R", system="S")]
    split = encode(tmp_path, rows, byte_level_tokenizer())
    assert list(split.audit.unread.values()) == [["system"]]
