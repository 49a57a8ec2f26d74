import errno
import gzip
import io
import json
from dataclasses import replace
from unittest.mock import MagicMock

import datasets
import pyarrow
import pyarrow.parquet
import pytest
from datasets.exceptions import DatasetGenerationError
from small_data import count_calls, make_config, pair, pairs, write_jsonl

from fastpref.config import SFTConfig, TISDPOConfig
from fastpref.data.cache import cache_errors
from fastpref.data.counts import format_audit
from fastpref.data.options import data_options
from fastpref.data.parts import check_sources
from fastpref.data.remarks import Remark
from fastpref.data.source import read_rows
from fastpref.data.sources.built_in import SOURCES, BuiltIn
from fastpref.data.weights_file import read_origin
from fastpref.errors import DataError

SIDES = ("chosen", "rejected")


def read(tmp_path, **options):
    [rows] = read_rows(data_options(make_config(tmp_path, **options)), "train", quiet=True)
    return rows


def refusal(tmp_path, **options):
    with pytest.raises(DataError) as caught:
        read(tmp_path, **options)
    message = str(caught.value)
    assert "\n" not in message
    return message


def folder(tmp_path):
    path = tmp_path / "data" / "set"
    path.mkdir(parents=True, exist_ok=True)
    return path


def write_bytes(tmp_path, content, name="train.jsonl"):
    (folder(tmp_path) / name).write_bytes(content)


def lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows).encode()


def test_jsonl_gzip_and_parquet_give_the_same_rows(tmp_path):
    rows = [*pairs(3), {"prompt": "ü", "chosen": "é", "rejected": "漢", "id": 4}]
    texts = []
    for form in ("jsonl", "jsonl.gz", "parquet"):
        (tmp_path / form).mkdir()
        path = folder(tmp_path / form) / f"train.{form}"
        if form == "parquet":
            pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
        else:
            content = lines(rows)
            path.write_bytes(gzip.compress(content) if form == "jsonl.gz" else content)
        dataset = read(tmp_path / form).dataset
        texts.append([(r["prompt"], r["chosen"], r["rejected"], r["row"]) for r in dataset])
    assert texts[0] == texts[1] == texts[2]
    assert texts[0][3] == ("ü", "é", "漢", 4)


def test_byte_order_mark_crlf_and_blank_lines_are_accepted(tmp_path):
    content = lines(pairs(3)).replace(b"\n", b"\r\n\r\n")
    write_bytes(tmp_path, b"\xef\xbb\xbf" + content)
    dataset = read(tmp_path).dataset
    assert dataset["chosen"][:] == [" yes 0", " yes 1", " yes 2"]
    # lines are counted as an editor counts them
    assert dataset["row"][:] == [1, 3, 5]


@pytest.mark.parametrize(
    ("line", "named"),
    [
        (b'{"prompt": "Q", "chosen": ', r"train\.jsonl:8: invalid JSON: .* at column 27"),
        (b'{"prompt": "Q"', r"train\.jsonl:8: invalid JSON: .* at column 15"),
        (b'{"prompt": "Q", "chosen": null, "rejected": "b"}', r":8:chosen: chosen is null"),
        (b'{"prompt": "Q", "chosen": "a"}', r":8:rejected: no column 'rejected'; columns found"),
        (b'{"prompt": ["Q"], "chosen": "a", "rejected": "b"}', r":8:prompt: prompt is list"),
        (b'{"prompt": "\xff", "chosen": "a", "rejected": "b"}', r":8: invalid UTF-8: byte 0xff"),
        (b"[" * 100_000, r":8: invalid JSON"),
        (b"\x00", r":8: invalid JSON"),
    ],
)
def test_a_malformed_line_is_named_by_file_line_and_field(tmp_path, line, named):
    write_bytes(tmp_path, lines(pairs(7)) + line + b"\n" + lines(pairs(2)))
    with pytest.raises(DataError, match=named):
        read(tmp_path)
    rows = read(tmp_path, data={"on_error": "skip"})
    assert rows.counts.dropped == {"malformed row": 1}
    assert ":8" in rows.counts.first_dropped["malformed row"]
    assert len(rows.dataset) == 9


def test_a_row_of_half_surrogates_can_be_named_and_skipped(tmp_path):
    odd = rb'{"prompt": [{"\ud800": 1}], "chosen": [], "rejected": []}'
    named = rb'{"prompt": "Q", "chosen": "a", "rejected": "b", "\ud800": 1}'
    write_bytes(tmp_path, lines(pairs(2)) + odd + b"\n" + named + b"\n")
    assert r"train.jsonl:3:prompt: prompt[0] has no role; keys found: \ud800" in refusal(tmp_path)
    counts = read(tmp_path, data={"on_error": "skip"}).counts
    assert counts.dropped == {"malformed row": 1}
    assert list(counts.unread.values()) == [[r"\ud800"]]


def test_invalid_bytes_are_named_by_their_offset_in_the_file(tmp_path):
    start = b"\xef\xbb\xbf" + lines(pairs(2))
    write_bytes(tmp_path, start + b'{"prompt": "\xe9"}')
    assert f"at offset {len(start) + 12}" in refusal(tmp_path)


def test_one_json_array_is_recognised(tmp_path):
    write_bytes(tmp_path, json.dumps(pairs(2), indent=1).encode())
    assert "one object per line" in refusal(tmp_path)


@pytest.mark.parametrize("name", ["train.jsonl.gz", "train.parquet"])
def test_a_damaged_file_is_named(tmp_path, name):
    write_bytes(tmp_path, b"\x1f\x8b\x08\x00 not what the name says", name)
    assert name in refusal(tmp_path)
    write_bytes(tmp_path, gzip.compress(lines(pairs(500)))[:-40], name)
    assert name in refusal(tmp_path)


def test_a_parquet_file_without_a_column_says_so_before_any_row(tmp_path):
    table = pyarrow.Table.from_pylist([{"prompt": "Q", "chosen": "a", "reject": "b"}])
    pyarrow.parquet.write_table(table, folder(tmp_path) / "train.parquet")
    assert "nearest: reject, rename it to rejected" in refusal(tmp_path)


@pytest.mark.parametrize("content", [b"", b"\n\n"])
def test_an_empty_split_is_refused(tmp_path, content):
    write_bytes(tmp_path, content)
    assert "0 rows in split 'train' of" in refusal(tmp_path)


def test_missing_sources_are_named_with_what_lies_there(tmp_path):
    write_jsonl(tmp_path / "data" / "ultra-feedback", "train", pairs(1))
    with pytest.raises(DataError, match=r"no file .*test\.jsonl .*found train\.jsonl"):
        check_sources(data_options(make_config(tmp_path, names=["ultra-feedback"])))
    with pytest.raises(DataError, match="nearest: ultra-feedback"):
        check_sources(data_options(make_config(tmp_path, names=["ultra_feedback"])))
    config = make_config(tmp_path, names=["plantd"])
    config.base_data_dir = None
    with pytest.raises(DataError, match="base_data_dir=DIR; nearest: planted"):
        check_sources(data_options(config))
    config.base_data_dir = str(tmp_path / "dta")
    with pytest.raises(DataError, match="base_data_dir: no folder"):
        check_sources(data_options(config))


def test_a_local_folder_comes_before_a_built_in_dataset(tmp_path):
    write_jsonl(tmp_path / "data" / "planted", "train", pairs(2))
    assert read(tmp_path, names=["planted"]).dataset["prompt"][:] == ["Q0:", "Q1:"]


def test_the_embedded_dataset_reads_like_any_other(tmp_path):
    rows = read(tmp_path, names=["planted"])
    assert len(rows.dataset) == rows.counts.rows > 1000
    assert not rows.counts.dropped


def test_empty_responses_are_dropped_and_counted_or_refused_when_strict(tmp_path):
    write_jsonl(folder(tmp_path), "train", [*pairs(3), pair(chosen=""), pair(rejected=" ")])
    rows = read(tmp_path)
    assert rows.counts.dropped == {"empty response": 2}
    assert rows.counts.first_dropped["empty response"].endswith("train.jsonl:4")
    assert rows.dataset["row"][:] == [1, 2, 3]
    assert "train.jsonl:4: empty response" in refusal(tmp_path, data={"strict": True})


def test_too_many_dropped_rows_are_refused_with_the_reasons(tmp_path):
    write_jsonl(folder(tmp_path), "train", [*pairs(1), pair(chosen=""), pair(rejected="")])
    assert "data.max_dropped=0.5" in (message := refusal(tmp_path))
    assert "2 of 3 (66.7 %)" in message
    assert len(read(tmp_path, data={"max_dropped": 0.7}).dataset) == 1
    write_jsonl(folder(tmp_path), "train", [pair(chosen="")])
    assert "no row is left" in refusal(tmp_path, data={"max_dropped": 1.0})


def test_rows_that_are_cached_whole_are_opened_and_nothing_is_written(tmp_path, monkeypatch):
    write_bytes(tmp_path, lines(pairs(3)))
    made = read(tmp_path)

    def refuse(*_, **__):
        raise PermissionError(errno.EACCES, "Permission denied", str(tmp_path / "cache"))

    # its lock is written to whatever the cache holds
    monkeypatch.setattr(datasets.Dataset, "from_generator", refuse)
    again = read(tmp_path)
    assert again.dataset[:] == made.dataset[:] and again.fingerprint == made.fingerprint
    write_bytes(tmp_path, lines(pairs(4)))
    assert "cache cannot be used: [Errno 13] Permission denied" in refusal(tmp_path)


def test_equal_responses_are_counted_and_refused_beyond_half_but_not_in_sft(tmp_path):
    same = [pair(f"P{i}", "x", "x") for i in range(3)]
    write_jsonl(folder(tmp_path), "train", same[:1] + pairs(2))
    assert read(tmp_path).counts.remarks == {Remark.IDENTICAL: 1}
    write_jsonl(folder(tmp_path), "train", same + pairs(2))
    assert "chosen equals rejected in 3 of 5 (60 %)" in refusal(tmp_path)
    assert len(read(tmp_path, loss=SFTConfig()).dataset) == 5


def test_repeated_and_contradictory_pairs_are_counted(tmp_path):
    rows = [*pairs(2), pair("Q0:", " yes 0", " no 0"), pair("Q1:", " no 1", " yes 1")]
    write_jsonl(folder(tmp_path), "train", rows)
    read_back = read(tmp_path)
    assert read_back.counts.remarks == {Remark.DUPLICATE: 1, Remark.CONTRADICTION: 1}
    assert read_back.counts.first_remarks[Remark.CONTRADICTION].endswith(":4")


def test_rows_of_one_prompt_share_a_group(tmp_path):
    rows = [pair("a", "1", "2"), pair("b"), pair("a", "3", "4"), pair("c", ""), pair("d")]
    write_jsonl(folder(tmp_path), "train", rows)
    read_back = read(tmp_path)
    # a prompt whose row is dropped keeps its number: it has a place in the order of the data
    assert read_back.dataset["group"][:] == [0, 1, 0, 3]
    assert (read_back.counts.prompts, read_back.num_prompts) == (3, 4)


def test_conversations_of_one_prompt_share_a_group_whatever_the_order_of_their_keys(tmp_path):
    def row(prompt, answer, **fields):
        sides = {side: [{"role": "assistant", "content": answer + side}] for side in SIDES}
        return {"prompt": [prompt], **sides, **fields}

    tools = [{"type": "function", "function": {"name": "f"}}]
    rows = [
        row({"role": "user", "content": "Q"}, "1"),
        row({"content": [{"text": "Q", "type": "text"}], "role": "user", "name": None}, "2"),
        row({"role": "user", "content": "Q"}, "3", tools=tools),
        row({"role": "user", "content": "Q"}, "4", tools=json.dumps(tools)),
        row({"role": "user", "content": "Q"}, "5", system="S"),
        row({"role": "user", "content": "Q"}, "1"),
    ]
    write_jsonl(folder(tmp_path), "train", rows)
    read_back = read(tmp_path)
    assert read_back.dataset["group"][:] == [0, 0, 1, 1, 2, 0]
    assert read_back.counts.remarks == {Remark.DUPLICATE: 1}


def test_columns_that_nobody_reads_are_told_of_once(tmp_path):
    extra = {f"column{i}": i for i in range(9)}
    chat = {
        "prompt": [{"role": "user", "content": "Q"}],
        "chosen": [{"role": "assistant", "content": "a"}],
        "rejected": [{"role": "assistant", "content": "b"}],
    }
    weights = {"chosen_weight": [1.0], "rejected_weight": [1.0]}
    rows = [
        *pairs(2),
        pair("a", system="S", id="1", tools="[]") | weights,
        pair("b", id="2", **extra),
        chat | {"system": "S", "tools": []},
    ]
    path = write_jsonl(folder(tmp_path), "train", rows)
    unread = {str(path): ["system", "id", "tools", "chosen_weight", "rejected_weight", *extra]}
    assert read(tmp_path).counts.unread == unread
    facts, warnings = format_audit(read(tmp_path).counts)
    assert facts[-1] == (
        f"train: columns of {path} that are not read: id, chosen_weight, rejected_weight, "
        "column0, column1, column2, column3, column4, … (12 in all)"
    )
    # without them the prompts may be others than were meant
    assert warnings[-1] == (
        f"train: columns of {path} that are not read and may belong to the prompt: system, "
        "tools; write into it what the model is to read"
    )
    weighted = read(tmp_path, loss=TISDPOConfig()).counts.unread
    assert weighted == {str(path): ["system", "id", "tools", *extra]}
    write_jsonl(folder(tmp_path), "train", [chat | {"system": "S", "tools": []}])
    assert not read(tmp_path).counts.unread


@pytest.mark.parametrize("empty", [None, "", [], {}])
def test_columns_without_any_value_are_not_told_of(tmp_path, empty):
    rows = [pair(f"p{i}", images=empty, system=empty, id=0) for i in range(3)]
    path = write_jsonl(folder(tmp_path), "train", rows)
    assert read(tmp_path).counts.unread == {str(path): ["id"]}
    # one value is enough
    write_jsonl(folder(tmp_path), "train", [*rows, pair("p3", images=["a.png"])])
    assert read(tmp_path).counts.unread == {str(path): ["id", "images"]}


def test_responses_that_begin_with_the_prompt_are_counted(tmp_path):
    rows = [*pairs(2), pair("Q", "Q yes", "Q no"), pair("Q", "Q yes", "no"), pair(" ")]
    write_jsonl(folder(tmp_path), "train", rows)
    counts = read(tmp_path).counts
    assert counts.remarks == {Remark.PROMPT_TWICE: 1}
    assert counts.first_remarks[Remark.PROMPT_TWICE].endswith(":3")


def test_the_records_of_rows_are_those_of_the_file_until_it_changes(tmp_path):
    rows = [*pairs(2), pair("c", ""), pair("d", extra={"a": [None, 1]})]
    path = write_jsonl(folder(tmp_path), "train", rows)
    read_back = read(tmp_path)
    assert list(read_back.records()) == [rows[0], rows[1], rows[3]]
    path.write_text(path.read_text() + "\n")
    with pytest.raises(DataError, match=r"train\.jsonl: the file was changed after its rows"):
        list(read_back.records())
    path.unlink()
    with pytest.raises(DataError, match="was changed"):
        list(read_back.records())


def test_weights_are_checked_only_for_a_loss_that_reads_them(tmp_path):
    write_jsonl(folder(tmp_path), "train", [pair(chosen_weight=[0.0], rejected_weight=[1.0])])
    assert read(tmp_path).dataset["chosen_weights"][:] == [None]
    # rounding makes them of short responses on which two models agree
    weighted = read(tmp_path, loss=TISDPOConfig())
    assert weighted.dataset["chosen_weights"][:] == [[0.0]]
    assert weighted.counts.remarks == {Remark.ZERO_WEIGHTS: 1}
    write_jsonl(folder(tmp_path), "train", [pair(chosen_weight=["0"], rejected_weight=[1.0])])
    assert ":1:chosen_weight: chosen_weight[0] must be" in refusal(tmp_path, loss=TISDPOConfig())


def test_a_second_reading_comes_from_the_cache_until_the_file_changes(tmp_path):
    path = write_jsonl(folder(tmp_path), "train", pairs(3))
    assert count_calls(lambda: read(tmp_path), "parse_row") == 3
    assert count_calls(lambda: read(tmp_path), "parse_row") == 0
    write_jsonl(folder(tmp_path), "train", pairs(4))
    assert len(read(tmp_path).dataset) == 4
    # options are part of the cache's key
    path.write_bytes(path.read_bytes() + b"{}\n")
    assert len(read(tmp_path, data={"on_error": "skip"}).dataset) == 4
    assert "no column" in refusal(tmp_path)


def test_a_cache_folder_that_cannot_be_used_is_named(tmp_path):
    write_jsonl(folder(tmp_path), "train", pairs(3))
    (tmp_path / "cache").write_text("a file, not a folder")
    assert "data.cache_dir: " in refusal(tmp_path)


def test_what_is_no_fault_of_the_cache_is_not_blamed_on_it(tmp_path):
    cache = str(tmp_path / "cache")
    elsewhere = OSError(errno.ENOSPC, "No space left on device", "/elsewhere/pymp-1")
    for error in (OSError(errno.ENOMEM, "Cannot allocate memory"), elsewhere):
        with pytest.raises(OSError) as raised, cache_errors(cache):
            raise DatasetGenerationError from error
        assert raised.value is error
    for shortage in (
        MemoryError(),
        pyarrow.lib.ArrowMemoryError("malloc of size 64 failed"),
        RuntimeError("can't start new thread"),
    ):
        with pytest.raises(type(shortage)), cache_errors(cache):
            raise DatasetGenerationError from shortage
        with pytest.raises(type(shortage)), cache_errors(cache):
            raise shortage
    with pytest.raises(DataError, match=r"^data\.num_proc: a process that"), cache_errors(cache):
        raise BrokenPipeError(errno.EPIPE, "Broken pipe")
    # the folder that it would be made in, and what names no file
    for error in (OSError(errno.EROFS, "Read-only", str(tmp_path)), OSError(errno.ENOSPC, "No")):
        with pytest.raises(DataError, match=r"^data\.cache_dir: "), cache_errors(cache):
            raise error
    # what `datasets` does with the file after the system has refused a part of it
    with pytest.raises(DataError, match=r"cannot be used: .*No space left"), cache_errors(cache):
        try:
            raise OSError(errno.ENOSPC, "No space left on device")
        finally:
            with io.BytesIO() as file:
                pass
            file.write(b"")


def test_a_damaged_cache_is_named(tmp_path, monkeypatch):
    write_jsonl(folder(tmp_path), "train", pairs(3))
    read(tmp_path)
    for cached in (tmp_path / "cache").rglob("*.arrow"):
        cached.write_bytes(cached.read_bytes()[:100])
    # a process was killed before it had listed what it wrote, to a disk without locks
    for sums in (tmp_path / "cache").rglob("*.sums"):
        sums.unlink()
    no_locks = MagicMock(**{"flock.side_effect": OSError(errno.ENOLCK, "No locks available")})
    monkeypatch.setattr("fastpref.data.cache.fcntl", no_locks)
    assert "delete what is damaged there" in refusal(tmp_path)


def test_quiet_shows_no_progress_and_leaves_the_bars_as_they_were(tmp_path, capsys):
    write_jsonl(folder(tmp_path), "train", pairs(3))
    config = make_config(tmp_path)
    read_rows(data_options(config), "train", quiet=True)
    assert capsys.readouterr().err == ""
    write_jsonl(folder(tmp_path), "train", pairs(4))
    read_rows(data_options(config), "train", quiet=False)
    assert "train" in capsys.readouterr().err


def test_an_error_while_reading_leaves_nothing_in_the_cache(tmp_path):
    write_bytes(tmp_path, lines(pairs(3)) + b"{}\n")
    first = refusal(tmp_path)
    assert refusal(tmp_path) == first


def test_a_data_set_is_one_entry(tmp_path, monkeypatch):
    def rows(split, cache_dir):
        for i in range(3):
            yield {"prompt": f"{split} {i}", "chosen": " yes", "rejected": " no"}

    monkeypatch.setitem(SOURCES, "answers", BuiltIn("a list of answers", rows))
    options = data_options(make_config(tmp_path, names=["answers"]))
    [read] = read_rows(options, "test", quiet=True)
    assert read.dataset["prompt"] == ["test 0", "test 1", "test 2"]
    assert (read.name, read.source) == ("answers", "a list of answers")
    wrong = replace(options, names=("answer",), base_data_dir=None)
    with pytest.raises(DataError, match=r"no dataset 'answer'; built in: .*nearest: answers"):
        check_sources(wrong)


@pytest.mark.parametrize(
    "change", [{"chat_date": "yesterday"}, {"chat_date": 5}, {"tokenizer": None}, "[" * 100_000]
)
def test_a_damaged_record_of_estimated_weights_is_refused(tmp_path, change):
    model = {"name_or_path": "a", "identity": "b", "template": ""}
    record = {
        **{"source": "s", "rows": 1, "tokens": 2, "includes_eos": False, "round": None},
        **{"compute_dtype": "float32", "tokenizer": "t", "fingerprint": "f"},
        **{"positive": model, "negative": model},
    }
    sidecar = tmp_path / "train.weights.json"
    sidecar.write_text(json.dumps(record | {"chat_date": "2026-11-30"}))
    origin = read_origin(tmp_path / "train.jsonl")
    assert origin is not None and origin.chat_date == "2026-11-30"
    sidecar.write_text(change if isinstance(change, str) else json.dumps(record | change))
    with pytest.raises(DataError, match=r"train\.weights\.json: not a record of estimated weights"):
        read_origin(tmp_path / "train.jsonl")
