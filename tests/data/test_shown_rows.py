"""Rows token by token: the fate of each token is that in the encoded data."""

import pytest
from chat_templates import PairsOfCharacters
from small_data import TEMPLATE, byte_tokenizer, make_config, pair, write_jsonl

from fastpref.config import SFTConfig, TISDPOConfig, TransformConfig
from fastpref.data.audit.report import report_split
from fastpref.data.audit.shown_rows import CUT, LOSS, MASKED, PROMPT, said_characters
from fastpref.data.audit.token_texts import token_spans
from fastpref.data.encode import load_split
from fastpref.data.options import data_options
from fastpref.data.source import read_rows

CHAT = {
    "prompt": [{"role": "system", "content": "a"}, {"role": "user", "content": "What?"}],
    "chosen": [{"role": "assistant", "content": "assistant, naïve 😀"}],
    "rejected": [{"role": "assistant", "content": " no "}],
}


def report(tmp_path, rows, *, template=None, tokenizer=None, **options):
    write_jsonl(tmp_path / "data" / "set", "train", rows)
    config = data_options(make_config(tmp_path, **options))
    tokenizer = tokenizer or byte_tokenizer(template)
    split = load_split(config, "train", tokenizer, vocab_size=300, quiet=True)
    parts = read_rows(config, "train", quiet=True)
    return split, report_split(split, parts, tokenizer, config.encode)


def texts(part, *fates):
    return "".join(token.text for token in part.tokens if not fates or token.fate in fates)


@pytest.mark.parametrize("mode", ["keep_start", "keep_end"])
@pytest.mark.parametrize("reverse", [False, True])
def test_what_stays_is_what_is_encoded(tmp_path, mode, reverse):
    split, shown = report(
        tmp_path,
        [pair("abcdefgh", "y" * 4 + "Y" * 4, "nN")],
        max_length=10,
        max_prompt_length=6,
        reverse_dataset=reverse,
        data={"truncation_mode": mode},
    )
    [row] = shown.rows
    assert [part.name for part in row.parts] == ["prompt", "chosen", "rejected"]
    for part in row.parts:
        kept = [token.id for token in part.tokens if token.fate != CUT]
        assert kept == split.dataset[0][f"{part.name}_ids"]
    prompt, *responses = row.parts
    cut = "gh" if mode == "keep_start" else "ab"
    assert (texts(prompt, CUT), texts(prompt)) == (cut, "abcdefgh")
    long, short = responses[::-1] if reverse else responses
    assert (texts(long, LOSS), texts(long, CUT)) == ("yyyy", "YYYY</s>")
    assert (texts(short, LOSS), texts(short, CUT)) == ("nN</s>", "")


def test_token_weights_and_what_weighs_nothing_are_told(tmp_path):
    weighted = pair("Q", "yes", "no", chosen_weight=[1, -2, 0], rejected_weight=[0.5, 2])
    options = {"loss": TISDPOConfig(), "transform": TransformConfig(method="origin")}
    split, shown = report(tmp_path, [pair("P", "y", "n"), weighted], **options)
    row = next(row for row in shown.rows if "first one with token weights" in row.labels)
    for name, part in zip(("chosen", "rejected"), row.parts[1:], strict=True):
        weights = [token.weight for token in part.tokens]
        assert weights == split.dataset[1][f"{name}_weights"]
        for token in part.tokens:
            assert token.fate == (MASKED if token.weight == 0 else LOSS)
    assert texts(row.parts[1], LOSS) == "ye"


def test_of_a_conversation_the_template_is_told_from_what_was_said(tmp_path):
    split, shown = report(tmp_path, [CHAT], template=TEMPLATE)
    prompt, chosen, rejected = shown.rows[0].parts
    said = ["".join(t.text for t in p.tokens if not t.is_template) for p in shown.rows[0].parts]
    # a text that stands in the name of a role is looked for elsewhere
    assert said == ["aWhat?", "assistant, naïve 😀", "no"]
    assert texts(prompt) == "<s>[system]a</s>\n[user]What?</s>\n[assistant]"
    assert {token.fate for token in prompt.tokens} == {PROMPT}
    assert texts(chosen) == "assistant, naïve 😀</s>"
    for part in (prompt, chosen, rejected):
        assert [t.id for t in part.tokens] == split.dataset[0][f"{part.name}_ids"]


def test_without_offsets_tokens_stand_where_they_do_in_the_text_that_was_tokenized(tmp_path):
    tokenizer = PairsOfCharacters(chat_template=TEMPLATE)
    _, shown = report(tmp_path, [CHAT], tokenizer=tokenizer)
    parts = shown.rows[0].parts
    assert texts(parts[0]) == "<s>[system]a</s>\n[user]What?</s>\n[assistant]"
    assert texts(parts[1]) == "assistant, naïve 😀</s>"
    said = ["".join(t.text for t in part.tokens if not t.is_template) for part in parts]
    assert said == ["a]What?", "assistant, naïve 😀", " no"]


def test_a_word_that_goes_on_is_decoded_with_the_tokens_behind_it():
    class Words:
        is_fast = False

        def decode(self, ids):
            return " ".join(["hel@@", "lo", "wo@@", "rld"][i] for i in ids).replace("@@ ", "")

    assert token_spans("Hello world", [0, 1, 2, 3], Words()).spans == [
        *((0, 3), (3, 5), (5, 8), (8, 11)),
    ]


def test_what_others_say_in_a_response_is_read_alone(tmp_path):
    looked_up = [("assistant", "a"), ("tool", "b"), ("assistant", "c")]
    answer = [{"role": role, "content": content} for role, content in looked_up]
    _, shown = report(tmp_path, [CHAT | {"chosen": answer}], template=TEMPLATE)
    chosen = shown.rows[0].parts[1]
    assert texts(chosen, LOSS) == "a</s>c</s>"
    assert texts(chosen, PROMPT) == "\n[tool]b</s>\n[assistant]"


def test_sft_shows_what_is_imitated(tmp_path):
    rows = [pair("Q", "first", "no"), pair("Q", "second", "no")]
    _, shown = report(tmp_path, rows, loss=SFTConfig())
    [row] = shown.rows
    assert [part.name for part in row.parts] == ["prompt", "chosen"]
    assert texts(row.parts[1], LOSS) == "second</s>"


def test_rows_are_shown_for_what_becomes_of_them(tmp_path):
    rows = [pair(f"{i}", " yes", " no") for i in range(5)]
    rows += [pair("empty", " ", "no"), pair("P" * 9, "y", "n"), pair("R", "y" * 30, "n")]
    rows += [{"prompt": "no answers"}, rows[0]]
    _, shown = report(
        tmp_path,
        rows,
        max_length=8,
        max_prompt_length=4,
        data={"on_error": "skip", "deduplicate": True},
    )
    labels = {row.place.rpartition(":")[2]: (row.labels, row.drop) for row in shown.rows}
    assert labels == {
        "1": (("first row",), ""),
        "2": (("row 2 of those that stay",), ""),
        "3": (("row 3 of those that stay",), ""),
        "7": (("first one with its prompt cut",), ""),
        "8": (("longest", "first one with a response cut"), ""),
        "6": (("left out",), "empty response"),
        "9": (("left out",), "malformed row"),
        "10": (("left out",), "copy of an earlier row"),
    }
    malformed = next(row for row in shown.rows if row.drop == "malformed row")
    assert "no column 'chosen'" in malformed.remarks[0] and not malformed.parts
    empty = next(row for row in shown.rows if row.drop == "empty response")
    assert next((part.name, part.text) for part in empty.parts) == ("prompt", "empty")


def test_a_row_that_is_too_long_is_shown_whole(tmp_path):
    rows = [pair("Q", "yes", "no"), pair("Q" * 9, "yes", "no")]
    _, shown = report(
        tmp_path, rows, max_length=8, max_prompt_length=4, data={"truncation": "drop"}
    )
    row = next(row for row in shown.rows if row.drop)
    assert row.drop == "longer than max_length" and "left out" in row.labels
    assert {token.fate for part in row.parts for token in part.tokens} == {CUT}


def test_a_conversation_whose_response_the_template_renders_empty_is_shown(tmp_path):
    call = {"function": {"name": "f", "arguments": "{}"}}
    silent = CHAT | {"rejected": [{"role": "assistant", "content": "", "tool_calls": [call]}]}
    _, shown = report(tmp_path, [CHAT, CHAT, silent], template=TEMPLATE)
    row = next(row for row in shown.rows if row.drop)
    assert (row.drop, row.place.rpartition(":")[2]) == ("empty response", "3")
    assert texts(row.parts[2], CUT) == "</s>" and len(row.parts[2].tokens) == 1


def test_every_character_belongs_to_one_token():
    tokenizer, text = byte_tokenizer(), "naïve 😀 \n\t漢"
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    spans = token_spans(text, ids, tokenizer)
    pieces = [text[start:end] for start, end in spans.spans]
    assert len(pieces) == len(ids) and "".join(pieces) == text
    # the last of its bytes has the character
    assert pieces[7:11] == ["", "", "", "😀"]


def test_ids_that_are_not_those_of_the_text_are_decoded():
    tokenizer = byte_tokenizer()
    ids = tokenizer("other", add_special_tokens=False)["input_ids"]
    spans = token_spans("text", ids, tokenizer)
    assert [spans.text[start:end] for start, end in spans.spans] == list("other")


@pytest.mark.parametrize(
    ("text", "leaves", "said"),
    [
        ("[user]hi[bot]", ["hi"], "hi"),
        ("[assistant]a[end]", ["a"], "a"),
        ("[b]two[a]one", ["one", "two"], "twoone"),
        ("[user]x", ["nowhere", "x"], "x"),
        ("[user] padded [end]", ["  padded\n"], "padded"),
    ],
)
def test_what_was_said_is_found_in_the_rendered_text(text, leaves, said):
    found = said_characters(text, leaves, 0)
    assert "".join(c for c, is_said in zip(text, found, strict=True) if is_said) == said
