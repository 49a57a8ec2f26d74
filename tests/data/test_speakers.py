"""Of a response with several messages the assistant's alone is learned, under any chat template."""

from dataclasses import replace
from itertools import compress, groupby

import pytest
from chat_templates import (
    CHATML_TOOLS,
    LLAMA3,
    MISTRAL,
    byte_level_tokenizer,
    metaspace_tokenizer,
)
from small_data import make_config, write_jsonl

from fastpref.batch import IGNORED
from fastpref.batches.columns import EncodedColumns
from fastpref.config import SFTConfig, TISDPOConfig
from fastpref.data.audit.account import describe_example
from fastpref.data.encode import load_split
from fastpref.data.encode_row import NOTHING_SCORED
from fastpref.data.options import data_options
from fastpref.data.remarks import Remark
from fastpref.data.speakers import written_tokens
from fastpref.errors import DataError
from fastpref.scoring.row_cache import row_digests

# trims what is said; a turn of the model ends in a marker that is not EOS
GEMMA = """\
{{- bos_token }}
{%- for message in messages %}
    {%- set role = 'model' if message.role == 'assistant' else message.role %}
    {{- '<start_of_turn>' + role + '\\n' + message.content | trim + '<end_of_turn>\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{% endif %}
"""
# several results are one turn; the last answer alone has a thought, be it empty
QWEN3 = """\
{%- for message in messages %}
    {%- if message.role == 'assistant' %}
        {{- '<|im_start|>assistant\\n' }}
        {%- if loop.last %}{{- '<think>\\n\\n</think>\\n\\n' }}{% endif %}
        {{- message.content + '<|im_end|>\\n' }}
    {%- elif message.role == 'tool' %}
        {%- if loop.previtem.role != 'tool' %}{{- '<|im_start|>user' }}{% endif %}
        {{- '\\n<result>' + message.content + '</result>' }}
        {%- if loop.last or loop.nextitem.role != 'tool' %}{{- '<|im_end|>\\n' }}{% endif %}
    {%- else %}
        {{- '<|im_start|>user\\n' + message.content + '<|im_end|>\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{% endif %}
"""
# the system message stands in the last turn of the user
LAST_TURN = """\
{%- set system = messages[0].content if messages[0].role == 'system' else '' %}
{%- for message in messages %}
    {%- set rest = messages[loop.index:] | selectattr('role', 'equalto', 'user') | list %}
    {%- if message.role == 'user' %}
        {{- '[INST] ' + (system + '\\n\\n' if not rest else '') + message.content + '[/INST]' }}
    {%- elif message.role != 'system' %}
        {{- ' ' + message.content + eos_token }}
    {%- endif %}
{%- endfor %}
"""
# what was said before is told in another way
SHOUTED_BEFORE = CHATML_TOOLS.replace(
    "{{- '\\n' + message.content }}{% endif %}",
    "{{- '\\n' + (message.content if loop.last else message.content | upper) }}{% endif %}",
)
assert SHOUTED_BEFORE != CHATML_TOOLS


def say(role, content, **fields):
    return {"role": role, "content": content, **fields}


LOOKED_UP = [say("assistant", "look up"), say("tool", "12:30"), say("assistant", "At noon.")]
TWICE = [*LOOKED_UP[:2], say("tool", "Mo"), say("assistant", "and"), *LOOKED_UP[1:]]
IN_TURNS = [say("assistant", "Hi"), say("user", "And?"), say("assistant", "Well.")]


def encode(tmp_path, answers, tokenizer, *, prompt=(), **options):
    rows = [
        {
            "prompt": [*prompt, say("user", f"Q{i}")],
            "chosen": answer,
            "rejected": [say("assistant", "no")],
        }
        for i, answer in enumerate(answers)
    ]
    write_jsonl(tmp_path / "data" / "set", "train", rows)
    config = make_config(tmp_path, **options)
    config.data.allow_roles = True
    return load_split(
        data_options(config), "train", tokenizer, vocab_size=len(tokenizer), quiet=True
    )


def learned(split, tokenizer, row=0, side="chosen"):
    """The texts of the runs of tokens of a response that are in the loss."""
    encoded = split.dataset[row]
    ids, scored = encoded[f"{side}_ids"], encoded.get(f"{side}_scored")
    tokens = zip(ids, [True] * len(ids) if scored is None else scored, strict=True)
    return [
        tokenizer.decode([id for id, _ in run])
        for is_scored, run in groupby(tokens, key=lambda token: token[1])
        if is_scored
    ]


@pytest.mark.parametrize(
    ("template", "eos", "answer", "expected"),
    [
        (CHATML_TOOLS, "<|im_end|>", LOOKED_UP, ["look up<|im_end|>", "At noon.<|im_end|>"]),
        (LLAMA3, "<|eot_id|>", LOOKED_UP, ["look up<|eot_id|>", "At noon.<|eot_id|>"]),
        (GEMMA, "</s>", LOOKED_UP, ["look up<end_of_turn>", "At noon.<end_of_turn>\n</s>"]),
        (QWEN3, "<|im_end|>", TWICE, ["look up<|im_end|>", "and<|im_end|>"]),
        (QWEN3, "<|im_end|>", IN_TURNS, ["Hi<|im_end|>"]),
        (LAST_TURN, "</s>", IN_TURNS, [" Hi</s>", " Well.</s>"]),
        # a response may end with a result, and begin with one
        (CHATML_TOOLS, "<|im_end|>", LOOKED_UP[:2], ["look up<|im_end|>"]),
        (CHATML_TOOLS, "<|im_end|>", LOOKED_UP[1:], ["At noon.<|im_end|>"]),
        # the header between two messages is the template's
        (CHATML_TOOLS, "<|im_end|>", LOOKED_UP[::2], ["look up<|im_end|>", "At noon.<|im_end|>"]),
    ],
)
def test_what_the_assistant_writes_with_its_end_of_turn_is_learned(
    tmp_path, template, eos, answer, expected
):
    tokenizer = byte_level_tokenizer(template, eos_token=eos)
    system = [say("system", "S")]
    split = encode(tmp_path, [answer], tokenizer, prompt=system)
    if template is QWEN3:
        last = "<think>\n\n</think>\n\n" + answer[-1]["content"] + "<|im_end|>"
        expected = [*expected, last]
    assert learned(split, tokenizer) == expected
    [rejected] = learned(split, tokenizer, side="rejected")
    assert "no" in rejected and rejected.endswith(eos)
    assert Remark.OTHERS_IN_LOSS not in split.audit.remarks


def test_tool_calls_are_learned_and_their_results_are_not(tmp_path):
    call = {"type": "function", "function": {"name": "trip", "arguments": '{"to": "Rom"}'}}
    answer = [say("assistant", None, tool_calls=[call]), *LOOKED_UP[1:]]
    tokenizer = metaspace_tokenizer(MISTRAL)
    split = encode(tmp_path, [answer], tokenizer)
    assert learned(split, tokenizer) == ['[CALL]trip to="Rom"</s>', "At noon.</s>"]
    assert split.audit.remarks[Remark.OTHERS_SPEAK] == 1
    num_learned = sum(split.dataset[0]["chosen_scored"])
    assert f", {num_learned} of them in the loss, EOS last" in describe_example(split, tokenizer)
    assert split.audit.remarks[Remark.ARGUMENTS_DECODED] == 1


def test_a_template_that_tells_what_was_said_in_another_way_has_all_learned(tmp_path):
    tokenizer = byte_level_tokenizer(SHOUTED_BEFORE)
    split = encode(tmp_path, [[say("assistant", "yes")], LOOKED_UP], tokenizer)
    [text] = learned(split, tokenizer, row=1)
    assert text.startswith("LOOK UP<|im_end|>\n<|im_start|>user\n<tool_response>\n12:30")
    place = f"{tmp_path / 'data' / 'set' / 'train.jsonl'}:2"
    assert split.audit.first_remarks[Remark.OTHERS_IN_LOSS] == place


def test_rows_of_one_message_have_no_masks(tmp_path):
    split = encode(tmp_path, [[say("assistant", "yes")]], byte_level_tokenizer(CHATML_TOOLS))
    assert split.dataset.column_names == ["prompt_ids", "chosen_ids", "rejected_ids"]
    assert not split.audit.remarks


def test_sources_with_and_without_masks_are_one_split(tmp_path):
    tokenizer = byte_level_tokenizer(CHATML_TOOLS)
    encode(tmp_path, [LOOKED_UP], tokenizer)
    (tmp_path / "data" / "set").rename(tmp_path / "data" / "tools")
    for names in (("set", "tools"), ("tools", "set")):
        split = encode(tmp_path, [[say("assistant", "yes")]], tokenizer, names=names)
        columns = EncodedColumns.of_arrow(split.dataset.with_format("arrow")[:])
        learned_ids = [ids[ids != IGNORED] for ids in map(columns.targets, ([0], [1]))]
        texts = [tokenizer.decode(ids) for ids in learned_ids]
        answers = ["yes<|im_end|>no<|im_end|>", "look up<|im_end|>At noon.<|im_end|>no<|im_end|>"]
        assert texts == (answers if names[0] == "set" else answers[::-1])
        # the same tokens without a mask are another row to a reference that is kept
        unmasked = replace(columns, scored=None)
        same = [a == b for a, b in zip(row_digests(columns), row_digests(unmasked), strict=True)]
        assert same == [name == "set" for name in names]


def test_masks_are_cut_with_their_tokens_and_change_sides_with_them(tmp_path):
    tokenizer = byte_level_tokenizer(CHATML_TOOLS)
    split = encode(tmp_path, [LOOKED_UP], tokenizer, reverse_dataset=True)
    assert learned(split, tokenizer, side="rejected")[0] == "look up<|im_end|>"
    num_prompt = len(split.dataset[0]["prompt_ids"])
    for length, expected in ((4, ["look"]), (30, ["look up<|im_end|>"])):
        limits = {"max_length": num_prompt + length, "max_prompt_length": num_prompt}
        cut = encode(tmp_path, [LOOKED_UP], tokenizer, **limits)
        assert learned(cut, tokenizer) == expected
    # of a result alone nothing is left
    with pytest.raises(DataError, match=NOTHING_SCORED):
        encode(tmp_path, [LOOKED_UP[1:]], tokenizer, **limits)
    sft = encode(tmp_path, [LOOKED_UP], tokenizer, loss=SFTConfig())
    assert learned(sft, tokenizer) == ["look up<|im_end|>", "At noon.<|im_end|>"]


def test_a_transform_sees_the_weights_of_what_is_learned_alone(tmp_path):
    tokenizer = byte_level_tokenizer(CHATML_TOOLS)
    plain = encode(tmp_path, [LOOKED_UP], tokenizer).dataset[0]
    scored = plain["chosen_scored"][:-1]
    # what is not learned would be first and last
    weights = [float(i) if is_scored else 99.0 * (-1) ** i for i, is_scored in enumerate(scored)]
    answer = {"chosen_weight": weights, "rejected_weight": [1.0]}
    row = {"prompt": [say("user", "Q0")], "chosen": LOOKED_UP, **answer}
    row["rejected"] = [say("assistant", "no")]
    write_jsonl(tmp_path / "data" / "set", "train", [row])
    config = make_config(tmp_path, loss=TISDPOConfig())
    config.transform.method = "rank_based"
    split = load_split(
        data_options(config), "train", tokenizer, vocab_size=len(tokenizer), quiet=True
    )
    kept = list(compress(split.dataset[0]["chosen_weights"], scored))
    assert kept == pytest.approx([1.3 - 0.6 * i / (len(kept) - 1) for i in range(len(kept))])


def test_a_token_that_holds_a_character_of_a_span_is_in_it():
    offsets = [(0, 2), (2, 4), (3, 4), (4, 4), (4, 5), (6, 8)]
    assert written_tokens(offsets, [(1, 2), (4, 6)]) == [True, False, False, True, True, False]
