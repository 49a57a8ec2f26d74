"""The embedded data: right answers, planted wrong tokens where they are said to be."""

import itertools

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref.data.sources.planted import check_answer, generate_rows, generate_sft_rows
from fastpref.model.files.paths import resolve_model


@pytest.fixture(scope="module")
def tokenizer():
    return AutoTokenizer.from_pretrained(resolve_model("tiny"))


def ids_of(tokenizer, text):
    return tokenizer(text, add_special_tokens=False)["input_ids"]


def test_chosen_answers_are_right_and_rejected_ones_wrong():
    for row in generate_rows("train") + generate_rows("test"):
        assert check_answer(row["prompt"], row["chosen"])
        assert not check_answer(row["prompt"], row["rejected"])


def test_planted_spans_are_the_tokens_that_differ_and_no_others(tokenizer):
    for row in generate_rows("train", num_rows=400):
        chosen, rejected = (ids_of(tokenizer, row[side]) for side in ("chosen", "rejected"))
        assert len(chosen) == len(rejected)
        offsets = tokenizer(row["rejected"], add_special_tokens=False, return_offsets_mapping=True)[
            "offset_mapping"
        ]
        differing = [
            row["rejected"][start:end]
            for a, b, (start, end) in zip(chosen, rejected, offsets, strict=True)
            if a != b
        ]
        planted = [row["rejected"][start:end] for start, end in row["planted_spans"]]
        # an offset may leave out the space that belongs to a word's token
        assert [text.strip() for text in differing] == [text.strip() for text in planted]
        assert 1 <= len(planted) <= 3


def test_rows_are_a_function_of_their_arguments_and_fewer_are_a_prefix():
    assert generate_rows("train", num_rows=64) == generate_rows("train")[:64]
    assert generate_rows("train", num_rows=64, seed=1) != generate_rows("train", num_rows=64)


def test_no_prompt_is_in_two_splits():
    sets = [generate_rows("train"), generate_rows("test"), generate_rows("test", seed=5)]
    sets += [generate_sft_rows("train", num_rows=3000), generate_sft_rows("test")]
    prompts = [{row["prompt"] for row in rows} for rows in sets]
    for (i, a), (j, b) in itertools.combinations(enumerate(prompts), 2):
        assert a.isdisjoint(b) or {i, j} == {1, 2}


def test_sft_demonstrations_slip_at_the_rate_asked_for():
    for rate in (0.0, 0.35):
        rows = generate_sft_rows("train", num_rows=800, slip_rate=rate)
        share_right = sum(check_answer(row["prompt"], row["chosen"]) for row in rows) / len(rows)
        # answers have one to six tokens, each slips by itself
        assert share_right == 1.0 if rate == 0 else (1 - rate) ** 6 < share_right < 1 - rate


def test_text_survives_the_tokenizer(tokenizer):
    texts = [row[side] for row in generate_rows("test") for side in ("prompt", "chosen")]
    for text in [*texts, "naïve café — 你好\t\n 🙂 x=1;"]:
        assert tokenizer.decode(ids_of(tokenizer, text)) == text
    assert len(tokenizer) <= 512
    assert len({tokenizer.pad_token_id, tokenizer.bos_token_id, tokenizer.eos_token_id}) == 3


def test_the_shipped_model_knows_the_task_and_is_unsure_of_it(tokenizer):
    model = AutoModelForCausalLM.from_pretrained(resolve_model("tiny"))
    assert 0.5e6 < model.num_parameters() < 1.5e6
    right = 0
    rows = generate_rows("test", num_rows=40)
    for row in rows:
        prompt = tokenizer(row["prompt"], add_special_tokens=False, return_tensors="pt")
        output = model.generate(**prompt, max_new_tokens=32, do_sample=False)
        answer = output[0, prompt["input_ids"].shape[1] :]
        right += check_answer(row["prompt"], tokenizer.decode(answer, skip_special_tokens=True))
    # greedy: it has learned to answer, and left room for preference learning
    assert 0.4 <= right / len(rows) <= 0.95
