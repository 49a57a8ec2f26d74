import json
import math

import pytest

from fastpref.data.layouts.row_values import RowError
from fastpref.data.layouts.rows import NO_SHARED_PROMPT, comparable, parse_row, split_dialogues


def parse(record, *, weighted=False, allow_roles=False):
    return parse_row(record, weighted=weighted, allow_roles=allow_roles)


def say(role, content):
    return {"role": role, "content": content}


TEXT = {"prompt": "Q", "chosen": " yes", "rejected": " no"}
CHAT = {
    "prompt": [say("user", "Q")],
    "chosen": [say("assistant", "yes")],
    "rejected": [say("assistant", "no")],
}


@pytest.mark.parametrize(
    ("record", "named"),
    [
        ([1], "a row must be an object .* got list"),
        ({"prompt": "Q", "chosen": "a"}, "no column 'rejected'; columns found: chosen, prompt"),
        ({"prompt": "Q", "chosen": "a", "reject": "b"}, "nearest: reject, rename it to rejected"),
        (TEXT | {"chosen": None}, "chosen is null"),
        (TEXT | {"prompt": None}, "prompt is null"),
        (TEXT | {"rejected": 3}, "rejected must be text or a list of messages, got number"),
        (TEXT | {"prompt": ["Q"]}, "prompt is list, chosen is text, .*must be all text or all"),
        (CHAT | {"prompt": "Q"}, "leave prompt out"),
        (TEXT | {"prompt": ""}, "prompt is empty"),
        (CHAT | {"prompt": []}, "prompt has no messages"),
        ({side: CHAT[side] for side in ("chosen", "rejected")}, "no prompt: .* are responses; col"),
        (CHAT | {"chosen": ["yes"]}, r"chosen\[0\] must be a message .* got text"),
        (CHAT | {"chosen": [{"role": "assistant"}]}, r"chosen\[0\] has no content"),
        (CHAT | {"rejected": [say("assistant", None)]}, r"rejected\[0\].content is null"),
        (CHAT | {"chosen": [say("assistant", 3)]}, r"chosen\[0\].content must be text"),
        ({f"column{i:02}": 1 for i in range(30)}, r"column07, … \(30 in all\); needed"),
        ({"chosn": 1} | {f"c{i}": 1 for i in range(99)}, "100 in all.*nearest: chosn"),
        (CHAT | {"chosen": [say("user", "x")]}, "chosen has a message of role 'user'"),
        (CHAT | {"chosen": [say("assistannt", "x")]}, "nearest: assistant"),
        (TEXT | {"chosen": "\ud800"}, "chosen holds half a surrogate pair"),
        ({"promt": "Q", "chosen": "a", "rejected": "b"}, "nearest: promt, rename it to prompt"),
        ({"chosen": "a", "rejected": "b"}, "needed: prompt, chosen, rejected, or dialogues"),
    ],
)
def test_a_row_that_breaks_a_rule_is_refused_with_its_field(record, named):
    with pytest.raises(RowError, match=named):
        parse(record)


@pytest.mark.parametrize(
    ("weights", "named"),
    [
        ({"chosen_weight": [1.0]}, "chosen_weight without rejected_weight"),
        ({"chosen_weight": "1 2", "rejected_weight": [1]}, "list of numbers, .* got text"),
        (
            {"chosen_weight": [1], "rejected_weight": ["2"]},
            r"rejected_weight\[0\] must be a finite",
        ),
        ({"chosen_weight": [1, math.nan], "rejected_weight": [1]}, r"chosen_weight\[1\] .* nan"),
        ({"chosen_weight": [math.inf], "rejected_weight": [1]}, r"chosen_weight\[0\] .* inf"),
        ({"chosen_weight": [10**400], "rejected_weight": [1]}, r"chosen_weight\[0\] must be"),
        ({"chosen_weight": [True], "rejected_weight": [1]}, r"chosen_weight\[0\] .* True"),
    ],
)
def test_weights_that_cannot_be_used_are_refused_only_where_the_loss_reads_them(weights, named):
    with pytest.raises(RowError, match=named):
        parse(TEXT | weights, weighted=True)
    assert parse(TEXT | weights)["chosen_weights"] is None


def test_weights_are_read_and_null_means_none():
    row = parse(TEXT | {"chosen_weight": [1, -2.5], "rejected_weight": [0, 3]}, weighted=True)
    assert (row["chosen_weights"], row["rejected_weights"]) == ([1.0, -2.5], [0.0, 3.0])
    empty = {"chosen_weight": None, "rejected_weight": None}
    assert parse(TEXT | empty, weighted=True)["chosen_weights"] is None


def test_texts_are_taken_verbatim_and_other_fields_ignored():
    row = parse({"prompt": " Q\r\n", "chosen": "\tyes ", "rejected": "no\0", "id": [1]})
    assert (row["prompt"], row["chosen"], row["rejected"]) == (" Q\r\n", "\tyes ", "no\0")
    assert (row["form"], row["drop"]) == ("text", "")


def test_dialogues_are_split_after_the_last_assistant_turn_of_chosen():
    start = "\n\nHuman: hi\n\nAssistant: hello\n\nHuman: more\n\nAssistant:"
    assert split_dialogues(start + " a", start + " b") == (start, " a", " b")
    row = parse({"chosen": start + " a", "rejected": start + " b"})
    assert (row["form"], row["prompt"], row["rejected"]) == ("hh", start, " b")


def test_a_rejected_dialogue_with_another_prompt_is_dropped():
    chosen = "\n\nHuman: hi\n\nAssistant: a"
    row = parse({"chosen": chosen, "rejected": "\n\nHuman: hello\n\nAssistant: b"})
    assert row["drop"] == NO_SHARED_PROMPT


@pytest.mark.parametrize("empty", ["", " \n"])
def test_empty_responses_are_dropped_not_refused(empty):
    assert parse(TEXT | {"chosen": empty})["drop"] == "empty response"
    assert parse(CHAT | {"rejected": [say("assistant", empty)]})["drop"] == "empty response"
    assert parse(CHAT | {"rejected": []})["drop"] == "empty response"


def test_the_prompt_of_conversations_is_what_both_share():
    start = [say("system", "s"), say("user", "Q")]
    yes, no = say("assistant", "yes"), say("assistant", "no")
    row = parse({"chosen": [*start, yes], "rejected": [*start, no]})
    explicit = parse({"prompt": start, "chosen": [yes], "rejected": [no]})
    assert row == explicit
    # equal conversations share all but the response
    assert parse({"chosen": [*start, yes], "rejected": [*start, yes]})["prompt"] == row["prompt"]


def test_conversations_that_share_nothing_are_dropped():
    yes, no = say("assistant", "yes"), say("assistant", "no")
    row = parse({"chosen": [say("user", "a"), yes], "rejected": [say("user", "b"), no]})
    assert row["drop"] == NO_SHARED_PROMPT


def test_a_prompt_that_both_conversations_repeat_is_not_doubled():
    start = [say("system", "s"), say("user", "Q")]
    yes, no = say("assistant", "yes"), say("assistant", "no")
    apart = parse({"prompt": start, "chosen": [yes], "rejected": [no]})
    whole = {"prompt": start, "chosen": [*start, yes], "rejected": [*start, no]}
    for allow_roles in (False, True):
        assert parse(whole, allow_roles=allow_roles) == apart


@pytest.mark.parametrize("allow_roles", [False, True])
def test_a_prompt_that_one_conversation_repeats_is_refused_with_both_readings(allow_roles):
    start = [say("user", "Q")]
    yes, no = say("assistant", "yes"), say("assistant", "no")
    record = {"prompt": start, "chosen": [*start, yes], "rejected": [no]}
    with pytest.raises(RowError, match=r"chosen begins .* rejected does not: as whole .* repeats"):
        parse(record, allow_roles=allow_roles)
    record = {"prompt": start, "chosen": [*start, yes], "rejected": start}
    with pytest.raises(RowError, match="rejected is the messages of prompt and nothing more"):
        parse(record, allow_roles=allow_roles)


def test_any_role_passes_where_roles_are_not_checked():
    record = CHAT | {"chosen": [say("narrator", "x")]}
    assert parse(record, allow_roles=True)["form"] == "chat"


def test_nulls_and_key_order_do_not_make_prompts_differ():
    padded = CHAT | {"prompt": [{"content": "Q", "tool_calls": None, "role": "user"}]}
    assert comparable(parse(padded)) == comparable(parse(CHAT))


def test_tools_make_prompts_differ():
    search, trip = ([{"type": "function", "function": {"name": name}}] for name in ("s", "t"))
    prompts = [comparable(parse(CHAT | {"tools": tools}))[0] for tools in (None, search, trip)]
    assert len(set(prompts)) == 3
    as_text = CHAT | {"tools": json.dumps([{"function": {"name": "s"}, "type": "function"}])}
    assert comparable(parse(as_text))[0] == prompts[1]


def test_messages_are_kept_as_they_came():
    arguments = {"to": "Zürich", "from": None, "days": [[3, 1.5], []], "b": {"z": 1, "a": True}}
    answer = {
        "tool_calls": [{"id": "7", "function": {"name": "trip", "arguments": arguments}}],
        "reasoning_content": "hm",
        "role": "assistant",
        "name": "x",
    }
    result = {"role": "tool", "tool_call_id": "7", "content": "ok"}
    row = parse(CHAT | {"chosen": [answer, result]})
    assert row["chosen"] == json.dumps([answer, result], ensure_ascii=False)
    assert not row["drop"]
