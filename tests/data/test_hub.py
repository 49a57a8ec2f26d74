import errno

import datasets
import huggingface_hub
import pytest
from datasets.exceptions import DatasetGenerationError

from fastpref.data.layouts.rows import parse_row
from fastpref.data.sources.hub import (
    hh_rows,
    hub_rows,
    hub_splits,
    hub_state,
    se_rows,
    shp_rows,
    strip_html,
)
from fastpref.errors import DataError


def test_hh_records_become_rows_with_the_prompt_of_chosen():
    start = "\n\nHuman: hi\n\nAssistant:"
    [record] = hh_rows([{"chosen": start + " a", "rejected": start + " b", "other": 1}])
    row = parse_row(record, weighted=False, allow_roles=False)
    assert (row["prompt"], row["chosen"], row["rejected"]) == (start, " a", " b")


def shp_record(history, a, b, score_a, score_b):
    return {
        "history": history,
        "human_ref_A": a,
        "human_ref_B": b,
        "score_A": score_a,
        "score_B": score_b,
        "labels": int(score_a > score_b),
    }


def test_shp_keeps_clear_preferences_and_imitates_the_best_response_of_a_prompt():
    records = [
        shp_record("h", "a", "b", 10, 5),
        shp_record("h", "a", "c", 10, 6),
        shp_record("h", "d", "e", 3, 30),
        shp_record("g", "x", "y", 0, 4),
        shp_record("g", "z", "w", 0, 0),
    ]
    rows = list(shp_rows(records))
    prompt = "\n\nHuman: h\n\nAssistant:"
    assert rows[0] == {"prompt": prompt, "chosen": " a", "rejected": " b", "sft_target": " e"}
    assert rows[1] == {"prompt": prompt, "chosen": " e", "rejected": " d", "sft_target": " e"}
    assert [row["chosen"] for row in rows[2:]] == [" y"]


def test_shp_imitates_the_first_of_equal_scores_and_a_text_keeps_its_first_score():
    records = [
        shp_record("h", "a", "b", 8, 1),
        shp_record("h", "c", "b", 8, 2),
        shp_record("h", "b", "d", 99, 3),
    ]
    assert {row["sft_target"] for row in shp_rows(records)} == {" a"}


def se_record(question, *answers):
    return {
        "question": question,
        "answers": [{"text": text, "pm_score": score} for text, score in answers],
    }


def test_se_pairs_all_answers_ties_favouring_the_later_one():
    rows = list(se_rows([se_record("q", ("a", 2), ("b", 2), ("c", 5))]))
    chosen_rejected = [(row["chosen"], row["rejected"]) for row in rows]
    assert chosen_rejected == [(" b", " a"), (" c", " a"), (" c", " b")]
    assert {row["sft_target"] for row in rows} == {" c"}
    assert rows[0]["prompt"] == "\n\nHuman: q\n\nAssistant:"


def test_a_repeated_se_question_replaces_the_earlier_one_in_its_place():
    first, other, again = (
        se_record("q", ("old", 2), ("older", 1)),
        se_record("p", ("x", 2), ("y", 1)),
        se_record("q", ("new", 2), ("newer", 2)),
    )
    rows = list(se_rows([first, other, again]))
    assert [row["chosen"] for row in rows] == [" newer", " x"]
    assert rows[0]["sft_target"] == " new"


def test_html_keeps_top_level_paragraphs_and_code_alone():
    html = (
        "<p>Use <b>bold</b> text.</p><ul><li>item</li></ul>\n<pre><code>x = 1\n</code></pre>"
        "<code>y</code>loose<blockquote><p>quote</p></blockquote>"
    )
    assert strip_html(html) == "Use  text.\n\n<code>x = 1\n</code>\n\n<code>y</code>"


def test_a_hub_that_cannot_be_reached_is_a_data_error_that_offers_a_folder(monkeypatch, tmp_path):
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_OFFLINE", True)
    message = r"{} on .* hub.*Offline.*base_data_dir=DIR with {} in DIR/{}/train\.jsonl"
    for name, path, rows in (
        ("hh", "Anthropic/hh-rlhf", "rows"),
        ("shp", "stanfordnlp/SHP", "rows of prompt, chosen and rejected"),
    ):
        with pytest.raises(DataError, match=message.format(path, rows, name)):
            list(hub_rows(name, "train", str(tmp_path)))


@pytest.mark.parametrize(
    "shortage", [MemoryError(), OSError(errno.EMFILE, "Too many open files", "lock")]
)
def test_a_shortage_is_not_taken_for_a_hub_that_cannot_be_reached(monkeypatch, shortage):
    def fail(*_, **__):
        raise DatasetGenerationError from shortage

    monkeypatch.setattr(datasets, "load_dataset", fail)
    monkeypatch.setattr(datasets, "get_dataset_split_names", fail)
    for ask in (
        lambda: hub_state("org/name", None, "train", None),
        lambda: hub_splits("a/b", None, None),
    ):
        with pytest.raises(type(shortage)) as raised:
            ask()
        assert raised.value is shortage
