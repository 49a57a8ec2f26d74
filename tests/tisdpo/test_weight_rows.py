"""A weights file is its source with weights: every column, and the tokens that were scored."""

import datetime
import decimal
import json
import logging
from unittest.mock import Mock

import pyarrow
import pyarrow.parquet
import pytest
from chat_templates import (
    CHATML_TOOLS,
    LLAMA3,
    MISTRAL,
    Tomorrow,
    byte_level_tokenizer,
    metaspace_tokenizer,
)
from estimation import estimate, load, make_config, output_path, run, written_rows
from small_data import count_calls
from tiny_models import save_tiny_model, text_rows, write_rows
from transformers import AutoTokenizer
from transformers.utils import chat_template_utils

from fastpref.data.chat_date import read_date
from fastpref.data.weights_file import sidecar_path
from fastpref.errors import CheckpointError, ConfigError, DataError
from fastpref.scoring.shards import Shards
from fastpref.tisdpo.weight_rows import record_line

CALL = {"type": "function", "function": {"name": "trip", "arguments": {"to": "Rom", "by": None}}}
TOOLS = [{"type": "function", "function": {"name": "trip", "description": "ä"}}]


def chat(answer, question="Q", **fields):
    return {
        "id": 7,
        "prompt": [{"role": "user", "content": question}],
        "chosen": [{"role": "assistant", "content": None, "tool_calls": [CALL]}],
        "rejected": [{"role": "assistant", "content": answer}],
        **fields,
    }


def models_with(folder, tokenizer):
    """Two models of one tokenizer."""
    names = []
    for seed in range(2):
        names.append(str(save_tiny_model(folder / f"{seed}", seed=seed, vocab_size=len(tokenizer))))
        tokenizer.save_pretrained(names[-1])
    return names


@pytest.fixture(scope="module")
def chatml_models(tmp_path_factory):
    tokenizer = byte_level_tokenizer(CHATML_TOOLS)
    return models_with(tmp_path_factory.mktemp("chatml"), tokenizer)


@pytest.fixture(scope="module")
def llama_models(tmp_path_factory):
    tokenizer = byte_level_tokenizer(LLAMA3, eos_token="<|eot_id|>")
    return models_with(tmp_path_factory.mktemp("llama"), tokenizer)


def plain_chats(number=2):
    return [chat("no", f"Q{i}", chosen=chat("yes")["rejected"]) for i in range(number)]


def test_rows_of_messages_keep_all_their_columns_and_load_for_tisdpo(chatml_models, tmp_path):
    rows = [
        chat("no", tools=TOOLS, system="S", source={"url": None, "n": [1, 2.5, 10**20]}),
        chat([{"type": "text", "text": "n"}, "o"], "R", tools=json.dumps(TOOLS), score=0.1),
        chat("maybe", "U", chosen_weight=[1.0], rejected_weight=[2.0]),
    ]
    write_rows(tmp_path / "data" / "rows", "train", rows)
    config = make_config(chatml_models, tmp_path)
    added = ("chosen_weight", "rejected_weight", "weights_digest")
    for row, record in zip(rows, estimate(config), strict=True):
        kept = {key: value for key, value in row.items() if key not in added}
        assert [(k, v) for k, v in record.items() if k not in added] == list(kept.items())
        arguments = record["chosen"][0]["tool_calls"][0]["function"]["arguments"]
        assert json.dumps(arguments) == '{"to": "Rom", "by": null}'
    loaded = load(config)
    for row, record in zip(loaded, written_rows(config), strict=True):
        expected = [-weight for weight in record["chosen_weight"]] + [0.0]
        assert row["chosen_weights"] == pytest.approx(expected, abs=1e-6)
    tokenizer = AutoTokenizer.from_pretrained(chatml_models[0])
    assert "# Tools" in tokenizer.decode(loaded[0]["prompt_ids"])
    assert '{"to": "Rom", "by": null}' in tokenizer.decode(loaded[0]["chosen_ids"])


def test_a_parquet_file_becomes_lines_that_load_with_its_tokens(chatml_models, tmp_path):
    rows = [
        chat("no", when=datetime.date(2026, 3, 5), cost=decimal.Decimal("1.50"), raw=b"\xff"),
        chat("no", "R", chosen=chat("yes")["rejected"], when=None, raw="ä".encode()),
    ]
    folder = tmp_path / "data" / "rows"
    folder.mkdir(parents=True)
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), folder / "train.parquet")
    config = make_config(chatml_models, tmp_path)
    first, second = estimate(config)
    assert (first["when"], first["cost"], first["raw"]) == ("2026-03-05", "1.50", "/w==")
    assert (second["when"], second["raw"], second["id"]) == (None, "ä", 7)
    # what a message lacks does not come back as null
    assert second["chosen"] == [{"role": "assistant", "content": "yes"}]
    assert len(load(config)) == 2


def test_a_source_that_changes_before_its_weights_are_written_is_refused(chatml_models, tmp_path):
    path = write_rows(tmp_path / "data" / "rows", "train", plain_chats())
    config = make_config(chatml_models, tmp_path)
    estimate(config)
    config.weights.round = 2
    before = output_path(config).read_bytes()
    reading = path.stat().st_mtime_ns

    class ChangesTheSource(logging.Handler):
        """Stands for somebody else, at the moment when the account of the rows is given."""

        def emit(self, record):
            if "kept 2" in record.getMessage():
                write_rows(path.parent, "train", plain_chats(3))

    handler = ChangesTheSource()
    logging.getLogger("fastpref").addHandler(handler)
    level = logging.getLogger("fastpref").level
    logging.getLogger("fastpref").setLevel(logging.INFO)
    try:
        with pytest.raises(DataError, match="the file was changed after its rows were read"):
            run(config)
    finally:
        logging.getLogger("fastpref").setLevel(level)
        logging.getLogger("fastpref").removeHandler(handler)
    assert path.stat().st_mtime_ns != reading
    assert output_path(config).read_bytes() == before


def test_weights_under_a_template_that_prints_the_date_serve_on_another_day(
    llama_models, tmp_path, monkeypatch
):
    write_rows(tmp_path / "data" / "rows", "train", plain_chats())
    config = make_config(llama_models, tmp_path)
    written = estimate(config)
    sidecar = output_path(config).with_name("train.weights.json")
    origin = json.loads(sidecar.read_text())
    assert origin["chat_date"] == datetime.date.today().isoformat()
    before = load(config)[:]

    monkeypatch.setattr(chat_template_utils, "datetime", Tomorrow)
    assert load(config)[:] == before
    day = datetime.date.today().strftime("%d %b %Y")
    tokenizer = AutoTokenizer.from_pretrained(llama_models[0])
    assert f"Today Date: {day}" in tokenizer.decode(before["prompt_ids"][0])
    # nothing is estimated again because it is another day; what is, is of that day
    assert count_calls(lambda: run(config), "score_rows") == 0
    config.weights.round = 1
    again = estimate(config)
    assert json.loads(sidecar.read_text())["chat_date"] == "2031-02-03"
    assert again[0]["weights_digest"] != written[0]["weights_digest"]
    assert "Today Date: 03 Feb 2031" in tokenizer.decode(load(config)[0]["prompt_ids"])


def test_a_stopped_estimation_goes_on_with_the_date_it_began_with(
    llama_models, tmp_path, monkeypatch
):
    write_rows(tmp_path / "data" / "rows", "train", plain_chats())
    config = make_config(llama_models, tmp_path)
    noted = output_path(config).parent / "train.shards" / "date"
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Shards, "write", Mock(side_effect=KeyboardInterrupt))
        run(config, chat_date="2026-01-05")
    assert noted.read_text(encoding="utf-8") == "2026-01-05"
    run(config, chat_date="2026-01-06")
    sidecar = output_path(config).with_name("train.weights.json")
    assert json.loads(sidecar.read_text())["chat_date"] == "2026-01-05"
    assert not noted.exists()


def test_a_chat_template_argument_without_effect_is_refused(chatml_models, tmp_path):
    write_rows(tmp_path / "data" / "rows", "train", plain_chats())
    config = make_config(chatml_models, tmp_path)
    config.data.template_kwargs = {"enable_thinking": False}
    with pytest.raises(
        ConfigError, match=r"data\.template_kwargs\.enable_thinking: .* not mention"
    ):
        run(config)


@pytest.mark.parametrize("damaged", [b"", b"2026-01-\xff5", b"2026-01-45"])
def test_a_day_that_is_damaged_is_named(tmp_path, damaged):
    noted = tmp_path / "date"
    noted.write_bytes(damaged)
    with pytest.raises(CheckpointError, match=r"date is damaged: it holds the day"):
        read_date(noted)


def test_estimation_and_training_see_the_same_tokens_of_a_metaspace_tokenizer(tmp_path):
    models = models_with(tmp_path, metaspace_tokenizer(MISTRAL))
    rows = [*plain_chats(), *text_rows(2)]
    write_rows(tmp_path / "data" / "rows", "train", rows)
    config = make_config(models, tmp_path)
    written = estimate(config)
    # "▁yes", and no dummy before it
    assert len(written[0]["chosen_weight"]) == 1
    assert len(load(config)) == 4


def test_what_the_assistant_does_not_write_has_a_weight_of_zero(tmp_path):
    models = models_with(tmp_path, metaspace_tokenizer(MISTRAL))
    row = plain_chats()[0]
    [answer] = row["chosen"]
    row["chosen"] = [answer, {"role": "tool", "content": "12"}, answer]
    write_rows(tmp_path / "data" / "rows", "train", [row])
    config = make_config(models, tmp_path)
    [written] = estimate(config)
    [scored] = load(config)["chosen_scored"]
    assert [weight != 0 for weight in written["chosen_weight"]] == scored[:-1]
    assert 0 < sum(scored) < len(scored)


def test_rows_that_a_template_refuses_obey_on_error(tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="fastpref")
    models = models_with(tmp_path, metaspace_tokenizer(MISTRAL))
    rows = [chat("no", "R", id=1), *plain_chats(), chat("no", system="S", id=2)]
    rows[0]["chosen"][0] = rows[0]["chosen"][0] | {"content": ""}
    rows[1]["rejected"] = [{"role": "assistant", "content": "", "reasoning_content": "hm"}]
    write_rows(tmp_path / "data" / "rows", "train", rows)
    config = make_config(models, tmp_path)
    with pytest.raises(DataError, match=r"train\.jsonl:4:prompt: the chat template refuses"):
        run(config)
    config.data.on_error = "skip"
    assert [row["id"] for row in estimate(config)] == [1, 7]
    assert "train: dropped 2 of 4 (50 %) rows: " in caplog.text
    assert len(load(config)) == 2
    # a role sentence is a system message, which this template takes from nobody
    config.data.on_error = "raise"
    write_rows(tmp_path / "data" / "rows", "train", plain_chats())
    config.weights.positive_template = "harmless"
    with pytest.raises(DataError, match=r"train\.jsonl:1:prompt: .* \(beside the template 'You"):
        run(config)


def test_another_chat_template_is_named_as_the_reason_of_other_tokens(chatml_models, tmp_path):
    write_rows(tmp_path / "data" / "rows", "train", plain_chats())
    config = make_config(chatml_models, tmp_path)
    estimate(config)
    template = tmp_path / "other.jinja"
    template.write_text(CHATML_TOOLS.replace("user", "asker"))
    with pytest.raises(DataError, match=r"estimated with another data\.chat_template"):
        load(config, chat_template=str(template))


def test_splits_with_dots_in_their_names_have_records_of_their_own(tmp_path):
    names = ("train.jsonl", "train.v1.jsonl", "train.v2.jsonl.gz", "train.v3.json")
    records = [sidecar_path(tmp_path / name).name for name in names]
    assert records == [f"train{part}.weights.json" for part in ("", ".v1", ".v2", ".v3")]


def test_a_record_that_utf8_cannot_hold_is_written_with_escapes():
    record = {"a": "ä", "other": "\ud800"}
    line = record_line(record)
    assert json.loads(line.encode()) == record
    assert record_line({"a": "ä"}) == '{"a": "ä"}\n'
