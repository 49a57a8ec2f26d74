"""Data sets as they are published, trained on with the embedded model by the command line."""

import contextlib
import io
import json
import re
from pathlib import Path
from typing import NamedTuple

import pyarrow
import pyarrow.parquet
import pytest
from stopped_runs import run as run_here

QUESTIONS = [(f"What is {i} + 1?", f"{i + 1}.", f"{i + 2}.") for i in range(20)]


class Ended(NamedTuple):
    returncode: int
    stderr: str


def run(folder: Path, *options: str) -> Ended:
    small = ["batch_size=4", "n_examples=8", "n_epochs=null", "n_eval_examples=4"]
    small += ["sample_during_eval=false", "run_dir=run", "base_data_dir=data"]
    small += [f"data.cache_dir={folder / 'cache'}"]
    said = io.StringIO()
    with contextlib.chdir(folder), contextlib.redirect_stderr(said):
        code = run_here([*small, *options])
    return Ended(code, said.getvalue())


def steps(folder: Path) -> list[int]:
    lines = (folder / "run" / "metrics.jsonl").read_text().splitlines()
    return [record["step"] for record in map(json.loads, lines) if record["split"] == "train"]


def say(role: str, content: str) -> dict[str, str]:
    return {"role": role, "content": content}


def ultrafeedback(question: str, good: str, bad: str) -> dict:
    chosen, rejected = ([say("user", question), say("assistant", answer)] for answer in (good, bad))
    return {"prompt": question, "chosen": chosen, "rejected": rejected, "score_chosen": 7.5}


def write(folder: Path, name: str, rows: list[dict]) -> None:
    path = folder / "data" / "set" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    else:
        path.write_text(json.dumps(rows))


def test_shards_of_whole_conversations_as_on_the_hub_train_by_tdpo(tmp_path):
    rows = [ultrafeedback(*question) for question in QUESTIONS]
    for i in range(2):
        write(tmp_path, f"data/train_prefs-0000{i}-of-00002.parquet", rows[i * 8 : i * 8 + 8])
    write(tmp_path, "data/test_prefs-00000-of-00001.parquet", rows[16:])
    result = run(tmp_path, "datasets=[set]")
    assert result.returncode == 3
    offer = "data.split_names={train: train_prefs, test: test_prefs}"
    assert offer in result.stderr
    result = run(tmp_path, "datasets=[set]", offer)
    assert result.returncode == 0, result.stderr
    assert "rows of prompt as text, chosen and rejected as messages" in result.stderr
    assert "prompt: '[user] What is 0 + 1?'" in result.stderr
    assert steps(tmp_path) == [1, 2]


def test_shards_without_a_test_split_are_audited_and_trained_on_with_prompts_held_out(tmp_path):
    rows = [ultrafeedback(*question) for question in QUESTIONS]
    rows[15] = rows[2]
    for i in range(2):
        write(tmp_path, f"data/train_prefs-0000{i}-of-00002.parquet", rows[i * 10 : i * 10 + 10])
    named = ("datasets=[set]", "data.split_names={train: train_prefs}")
    result = run(tmp_path, *named)
    assert result.returncode == 3
    assert "or hold out prompts of the train split: data.test_fraction=0.05" in result.stderr
    held_out = (*named, "data.test_fraction=0.3", "data.deduplicate=true")
    for options in (("task=audit", "run_dir=run"), ()):
        result = run(tmp_path, *held_out, *options)
        assert result.returncode == 0, result.stderr
        for split in ("train", "test"):
            place = f"{split}: .*00000-of-00002.parquet … .* \\(2 files\\): rows of prompt as text"
            assert re.search(place, result.stderr)
        assert "set has no test split: " in result.stderr
        assert "copy of an earlier row 1 (first: " in result.stderr
        assert "train_prefs-00001-of-00002.parquet:6)" in result.stderr
    assert steps(tmp_path) == [1, 2]
    page = (tmp_path / "run" / "audit.html").read_text()
    assert "train_prefs-00001-of-00002.parquet:6<" in page and "has no test split" in page
    assert "rows of prompt as text, chosen and rejected as messages" in page


def test_what_can_be_read_in_two_ways_is_refused_by_an_audit_too(tmp_path):
    answers = {"prompt": "What?", "response_0": "This.", "response_1": "That."}
    rows = [answers | {"better_response_id": 0, "safer_response_id": 1}]
    for name in ("train.json", "test.json"):
        write(tmp_path, name, rows)
    result = run(tmp_path, "datasets=[set]", "task=audit", "data.on_error=skip")
    assert (result.returncode, "Traceback" in result.stderr) == (3, False), result.stderr
    assert "better_response_id" in result.stderr and "data.columns" in result.stderr
    assert not (tmp_path / "run" / "audit.html").exists()


def test_questions_with_a_system_text_in_an_array_train_by_dpo(tmp_path):
    rows = [
        {"system": "Be brief.", "question": question, "chosen": good, "rejected": bad}
        for question, good, bad in QUESTIONS
    ]
    write(tmp_path, "train.json", rows[:16])
    write(tmp_path, "test.json", rows[16:])
    result = run(tmp_path, "datasets=[set]", "loss=dpo")
    assert result.returncode == 0, result.stderr
    assert "'Be brief.\\nQuestion: What is 0 + 1?\\nAnswer:'" in result.stderr
    assert steps(tmp_path) == [1, 2]


def test_messages_alone_train_by_sft_and_columns_and_template_are_checked(tmp_path):
    rows = [{"dialog": ultrafeedback(*question)["chosen"]} for question in QUESTIONS]
    write(tmp_path, "train.json", rows[:16])
    write(tmp_path, "test.json", rows[16:])
    sft = ("datasets=[set]", "loss=sft", "data.columns={messages: dialog}")
    result = run(tmp_path, *sft)
    assert result.returncode == 0, result.stderr
    assert "rows of messages, the response being what follows the last" in result.stderr
    assert steps(tmp_path) == [1, 2]
    failures = [
        (("datasets=[set]", "loss=sft"), 3, "train.json:1:chosen: no column 'chosen'; columns"),
        ((*sft[:2], "data.columns={messages: dialogue}"), 3, "no column 'dialogue', which data."),
        ((*sft, "data.template_kwargs={enable_thinking: false}"), 2, "does not mention enable_"),
        ((*sft, "datasets=[org/set]"), 3, "org/set on the Hugging Face hub"),
    ]
    for options, code, says in failures:
        result = run(tmp_path, *options, "run_dir=other")
        assert result.returncode == code, result.stderr
        assert says in result.stderr and "Traceback" not in result.stderr


@pytest.mark.parametrize("task", ["audit", "train"])
def test_a_truncated_table_an_empty_file_and_no_array_end_in_one_message(tmp_path, task):
    def refusal() -> str:
        result = run(tmp_path, "datasets=[set]", f"task={task}")
        assert (result.returncode, "Traceback" in result.stderr) == (3, False), result.stderr
        return result.stderr

    write(tmp_path, "train.parquet", [ultrafeedback(*question) for question in QUESTIONS])
    write(tmp_path, "test.json", [ultrafeedback(*question) for question in QUESTIONS])
    path = tmp_path / "data" / "set" / "train.parquet"
    path.write_bytes(path.read_bytes()[:-100])
    assert "train.parquet: cannot be read" in refusal()
    path.unlink()
    for text, says in (("", "0 rows in split 'train'"), ('{"data":\n []}', "must be one array")):
        path.with_suffix(".json").write_text(text)
        assert says in refusal()
