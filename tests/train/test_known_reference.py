"""A reference scored before the first step: the numbers of one that computes in every step."""

import errno
import fcntl
import json
import re
import shutil
import signal
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from exhaustion import Exhaustion, no_more_files
from ranks import run_on_ranks
from safetensors.torch import load_file, save_file
from small_data import count_calls
from stopped_runs import assert_same_end, lines_of, run, run_in_starts, stopping_after
from tiny_models import (
    random_rows,
    read_metrics,
    rows_of_other_numbers,
    save_dataset,
    save_tiny_model,
    text_rows,
    write_rows,
)

from fastpref import deadline
from fastpref.batch import EncodedRow
from fastpref.batches.columns import EncodedColumns
from fastpref.config import DPOConfig, ReferenceConfig, SFTConfig, TDPOConfig, TISDPOConfig
from fastpref.distributed import World
from fastpref.errors import LostRankError
from fastpref.model.scorer import TokenScorer
from fastpref.scoring import reference
from fastpref.scoring.reference import ReferenceScoring
from fastpref.scoring.row_cache import RowCache, row_digests

SPLITS = {"train": 24, "test": 10}
LOSSES = {
    "dpo": ["loss=dpo"],
    "tisdpo": ["loss=tisdpo", "transform=paper"],
    "padded": ["loss=dpo", "packing.enabled=false"],
    "16 bits": ["loss=dpo", "model.policy_dtype=bfloat16"],
    "lora": ["loss=dpo", "adapter=lora"],
    "given adapter": ["loss=dpo", "adapter=lora"],
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("known")
    save_dataset(base, "words", num_train=SPLITS["train"], num_test=SPLITS["test"])
    save_tiny_model(base / "model")
    command = arguments(base, base / "model", base / "adapted", "adapter=lora", "lr=1e-2")
    assert run([*command, "loss=dpo"]) == 0
    return base


def arguments(base: Path, model: Path, run_dir: Path, *options: str) -> list[str]:
    return [
        *("model=blank_model", f"model.name_or_path={model}", "model.fsdp_policy_mp=null"),
        *("datasets=[words]", f"base_data_dir={base}", f"run_dir={run_dir}", "max_length=64"),
        *("max_prompt_length=32", "batch_size=8", "n_epochs=1", "lr=1e-3", "warmup_steps=0"),
        *("eval_every=16", f"n_eval_examples={SPLITS['test']}", "eval_batch_size=4"),
        *("n_eval_model_samples=2", "minimum_log_interval_secs=0", *options),
    ]


def cached(base: Path, out: Path, name: str, *options: str, model: Path | None = None) -> list[str]:
    """A run that scores its reference beforehand, into a folder of all such runs of a test."""
    mode = ("reference.mode=cache", f"reference.cache_dir={out / 'reference'}")
    return arguments(base, model or base / "model", out / name, *mode, *options)


def scored_rows(out: Path) -> list[bytes]:
    """Digests of all rows in all files."""
    digests = []
    for path in sorted(out.glob("reference/*/*.npz")):
        with np.load(path) as file:
            digests += [row.tobytes() for row in file["digests"].reshape(-1, 16)]
    return digests


def losses_of(run_dir: Path) -> list[float]:
    return [record["loss/train"] for record in read_metrics(run_dir, "train")]


def train_both_ways(base: Path, out: Path, names: list[str]) -> None:
    for name in names:
        model = base / "adapted" / "LATEST" if name == "given adapter" else base / "model"
        online, known = out / name / "online", out / name / "known"
        assert run(arguments(base, model, online, *LOSSES[name])) == 0
        cache = [f"reference.cache_dir={out / name / 'reference'}", "reference.mode=cache"]
        assert run(arguments(base, model, known, *LOSSES[name], *cache)) == 0


def files_of(name: str) -> tuple[str, ...]:
    adapted = name in ("lora", "given adapter")
    return "samples.jsonl", f"LATEST/{'adapter_model' if adapted else 'model'}.safetensors"


@pytest.mark.parametrize("name", list(LOSSES))
def test_rows_that_are_read_once_give_the_same_run_to_the_last_bit(base, tmp_path, name):
    train_both_ways(base, tmp_path, [name])
    folder = tmp_path / name
    # a KL takes the reference itself
    sides = ("chosen", "rejected", "margin")
    untold = [f"kl_{split}/{side}" for split in ("train", "eval") for side in sides]
    assert_same_end(folder / "known", folder / "online", files=files_of(name), untold=untold)
    rows = scored_rows(folder)
    assert len(rows) == len(set(rows)) == sum(SPLITS.values())


def test_of_a_row_that_two_runs_wrote_the_older_numbers_count(tmp_path):
    columns = EncodedColumns.of_rows([EncodedRow([1, 2], [3], [4])])
    for value in (-1.0, -2.0):
        cache = RowCache(tmp_path)
        cache.add(columns, np.full(len(columns.ids), value, np.float32))
        cache.write(cache.take_unsaved(), {})
    cache = RowCache(tmp_path)
    cache.read(cache.files(), set(row_digests(columns)))
    assert set(cache.beside(columns).reference_logps[-2:]) == {-1.0}


def test_on_two_ranks_too(base, tmp_path):
    run_on_ranks(train_both_ways, 2, base, tmp_path, ["dpo"])
    assert_same_end(tmp_path / "dpo" / "known", tmp_path / "dpo" / "online")


def test_the_policy_alone_computes_and_the_reference_takes_no_memory(base, tmp_path, monkeypatch):
    scorers, calls = set(), []

    def forward(self: TokenScorer, *args: Any, real: Any = TokenScorer.forward) -> Any:
        scorers.add(id(self))
        calls.append(torch.is_grad_enabled())
        return real(self, *args)

    monkeypatch.setattr(TokenScorer, "forward", forward)
    command = cached(base, tmp_path, "run", "loss=dpo", "n_eval_examples=0", "n_epochs=4")
    assert run(command) == 0
    assert len(scorers) == 1
    # every row once without gradients, in three steps, and then the policy's own twelve
    assert calls.count(False) == 3
    assert calls.count(True) == 12


def test_a_second_run_finds_every_row_however_it_divides_them(base, tmp_path, capsys):
    assert run(cached(base, tmp_path, "first", "loss=dpo")) == 0
    num_rows = sum(SPLITS.values())
    assert f"reference: {num_rows} rows scored in" in capsys.readouterr().err
    rows = scored_rows(tmp_path)
    options = ["n_epochs=2", "batch_size=6", "packing.max_tokens=128", "n_eval_examples=0"]
    for loss in ("dpo", "ipo"):
        assert run(cached(base, tmp_path, loss, f"loss={loss}", *options)) == 0
        error = capsys.readouterr().err
        assert "rows were scored by earlier runs" in error and "rows scored in" not in error
    assert scored_rows(tmp_path) == rows
    online = arguments(base, base / "model", tmp_path / "online", "loss=dpo", *options)
    assert run(online) == 0
    assert losses_of(tmp_path / "dpo") == pytest.approx(losses_of(tmp_path / "online"), rel=1e-5)


def test_only_rows_that_are_new_are_scored(base, tmp_path):
    rows = text_rows(SPLITS["train"], seed=1)
    options = ["loss=dpo", f"base_data_dir={tmp_path}", "n_eval_examples=0"]
    write_rows(tmp_path / "words", "train", rows)
    assert run(cached(base, tmp_path, "first", *options)) == 0
    before = scored_rows(tmp_path)
    rows[3]["chosen"] = " a new end."
    write_rows(tmp_path / "words", "train", [*rows, *text_rows(8, seed=7)])
    assert run(cached(base, tmp_path, "second", *options)) == 0
    assert len(set(scored_rows(tmp_path)) - set(before)) == 9


def test_rows_that_an_epoch_leaves_out_are_scored_for_the_next_and_no_row_twice(base, tmp_path):
    rows = text_rows(10, seed=1)
    for split in ("train", "test"):
        write_rows(tmp_path / "words", split, rows)
    # an epoch is two of ten rows short; held out are all of them, or none
    for num_held_out in (0, 10):
        out, options = (
            tmp_path / str(num_held_out),
            (f"n_eval_examples={num_held_out}", "n_epochs=3"),
        )
        command = cached(base, out, "run", "loss=dpo", f"base_data_dir={tmp_path}", *options)
        assert count_calls(lambda command=command: run(command), "_score") == 2
        digests, losses = scored_rows(out), losses_of(out / "run")
        assert len(digests) == len(set(digests)) == 10
        assert len(losses) == 3 and losses[0] == pytest.approx(np.log(2), abs=1e-6)


def test_another_model_or_arithmetic_is_another_reference(base, tmp_path):
    save_tiny_model(tmp_path / "changed")
    path = tmp_path / "changed" / "model.safetensors"
    weights = load_file(path)
    weights["lm_head.weight"][0] += 1e-3
    save_file(weights, path, metadata={"format": "pt"})
    options = ["loss=dpo", "n_eval_examples=0"]
    for name, model in (("first", base / "model"), ("second", tmp_path / "changed")):
        assert run(cached(base, tmp_path, name, *options, model=model)) == 0
        assert losses_of(tmp_path / name)[0] == pytest.approx(np.log(2), abs=1e-6)
    command = cached(base, tmp_path, "16 bits", *options)
    command[command.index("model.fsdp_policy_mp=null")] = "model.fsdp_policy_mp=bfloat16"
    assert run(command) == 0
    folders = list((tmp_path / "reference").iterdir())
    assert len(folders) == 3
    about = [json.loads((folder / "about.json").read_text()) for folder in folders]
    assert {record["compute_dtype"] for record in about} == {"float32", "bfloat16"}


def test_stopped_after_every_step_a_run_of_two_epochs_ends_the_same(base, tmp_path):
    options = ["loss=dpo", "n_epochs=null", "n_examples=40", "n_eval_examples=0"]
    assert run(cached(base, tmp_path, "whole", *options)) == 0
    # to begin with nothing, as the run that is stopped does
    shutil.rmtree(tmp_path / "reference")
    codes = run_in_starts(cached(base, tmp_path, "cut", *options), 1)
    assert codes[0] == 75 and codes[-1] == 0
    assert_same_end(tmp_path / "cut", tmp_path / "whole", files=files_of("dpo")[1:])


@pytest.mark.parametrize(
    ("number", "code", "call", "rows"),
    # of three steps of eight rows
    [(signal.SIGTERM, 75, 2, 16), (signal.SIGINT, 130, 3, 24)],
)
def test_a_signal_while_rows_are_scored_costs_none_that_are(
    base, tmp_path, capsys, monkeypatch, number, code, call, rows
):
    real, calls = ReferenceScoring._logps, []

    def stopping(self: ReferenceScoring, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == call:
            signal.raise_signal(number)
        return real(self, *args)

    monkeypatch.setattr(ReferenceScoring, "_logps", stopping)
    command = cached(base, tmp_path, "run", "loss=dpo", "n_eval_examples=0")
    assert run(command) == code
    assert "rows that were scored are kept in" in capsys.readouterr().err
    assert not (tmp_path / "run").exists()
    assert len(scored_rows(tmp_path)) == rows
    assert run(command) == 0
    assert len(scored_rows(tmp_path)) == len(set(scored_rows(tmp_path))) == SPLITS["train"]


def test_a_kill_while_rows_are_scored_costs_no_more_than_a_file_of_them(
    base, tmp_path, monkeypatch
):
    real, calls = ReferenceScoring._logps, []

    def killed(self: ReferenceScoring, *args: Any) -> Any:
        calls.append(args)
        if len(calls) == 3:
            raise SystemExit(9)
        return real(self, *args)

    monkeypatch.setattr(ReferenceScoring, "_logps", killed)
    monkeypatch.setattr(reference, "ROWS_OF_A_FILE", 16)
    with pytest.raises(SystemExit):
        run(cached(base, tmp_path, "run", "loss=dpo", "n_eval_examples=0"))
    assert len(scored_rows(tmp_path)) == 16


def test_a_deadline_is_kept_while_rows_are_scored(base, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(deadline, "seconds_since_start", lambda: 100.0)
    command = cached(base, tmp_path, "run", "loss=dpo", "n_eval_examples=0")
    assert run([*command, "checkpoint.deadline=00:01:40"]) == 75
    error = capsys.readouterr().err
    assert "checkpoint.deadline is near; rows that were scored are kept" in error


def test_no_damage_raises_or_gives_other_numbers(tmp_path):
    columns = EncodedColumns.of_rows(random_rows(3))
    logps = -np.arange(1, 1 + len(columns.ids), dtype=np.float32)
    cache = RowCache(tmp_path)
    cache.add(columns, logps)
    digests = set(row_digests(columns))
    cache.write(cache.take_unsaved(), {"model": "none"})
    [path] = tmp_path.glob("*.npz")
    content = path.read_bytes()
    for place in range(0, len(content), 3):
        path.write_bytes(content[:place] + bytes([content[place] ^ 0x09]) + content[place + 1 :])
        damaged = RowCache(tmp_path)
        damaged.read(damaged.files(), digests)
        if len(damaged) == len(digests):
            ours, expected = (x.beside(columns).reference_logps for x in (damaged, cache))
            assert np.array_equal(ours, expected), place


def test_rows_of_other_tokens_or_masks_have_other_keys():
    rows = rows_of_other_numbers()
    digests = row_digests(EncodedColumns.of_rows(rows))
    assert len(set(digests)) == len(digests)
    whole = rows[0]._replace(chosen_scored=[True, True], rejected_scored=[True])
    assert row_digests(EncodedColumns.of_rows([whole])) == digests[:1]
    # nor does a mask of another row beside it matter
    assert row_digests(EncodedColumns.of_rows(rows[:1])) == digests[:1]


@pytest.mark.parametrize("less", ["digests", "logps"])
def test_a_file_whose_parts_do_not_fit_together_is_passed_over(tmp_path, caplog, less):
    columns = EncodedColumns.of_rows(random_rows(3))
    cache = RowCache(tmp_path)
    cache.add(columns, np.zeros(len(columns.ids), np.float32))
    cache.write(cache.take_unsaved(), {})
    [path] = tmp_path.glob("*.npz")
    with np.load(path) as file:
        parts = dict(file)
    np.savez(path, **parts | {less: parts[less][:-1]})
    damaged = RowCache(tmp_path)
    damaged.read(damaged.files(), set(row_digests(columns)))
    assert len(damaged) == 0 and "is damaged and passed over" in caplog.text


def test_a_file_of_pickled_objects_is_passed_over(tmp_path, caplog):
    np.savez(
        tmp_path / "1.npz",
        digests=np.zeros(16, np.uint8),
        lengths=np.array([2]),
        logps=np.array([-1.0, None]),
    )
    cache = RowCache(tmp_path)
    cache.read(cache.files(), {bytes(16)})
    assert len(cache) == 0 and "is damaged and passed over" in caplog.text


def test_of_a_row_that_was_written_twice_the_older_numbers_count(tmp_path):
    columns = EncodedColumns.of_rows(random_rows(3))
    digests, numbers = row_digests(columns), np.arange(len(columns.ids), dtype=np.float32)
    for shift in (0, 1):
        writing = RowCache(tmp_path)
        writing.add(columns.take(np.array([2, 0][shift:])), numbers - shift)
        writing.write(writing.take_unsaved(), {})
    cache = RowCache(tmp_path)
    cache.read(cache.files(), set(digests[:2]))
    assert [digest in cache for digest in digests] == [True, False, False]
    cache.read(cache.files(), set(digests))
    cache.add(columns, numbers + 1)
    assert (len(cache), cache.num_unsaved) == (3, 1)
    found = cache.beside(columns).reference_logps
    for row, shift in enumerate((0, 1, 0)):
        own = columns.responses(np.array([row])).flat()
        assert np.array_equal(found[own], numbers[own] + shift)


def test_what_kills_left_goes_once_nobody_else_writes(tmp_path):
    columns = EncodedColumns.of_rows(random_rows(3))
    cache = RowCache(tmp_path)
    cache.add(columns, np.zeros(len(columns.ids), np.float32))
    rows = cache.take_unsaved()
    half = tmp_path / "00000000000000000001-0000abcd.npz.partial"
    half.write_text("")
    with (tmp_path / ".lock").open("a") as other:
        fcntl.flock(other, fcntl.LOCK_SH)
        cache.write(rows, {})
        assert half.is_file()
    cache.write(rows, {})
    names = sorted(path.name for path in tmp_path.iterdir())
    assert names == [".lock", *cache.files(), "about.json"] and len(cache.files()) == 2


def test_a_folder_that_cannot_be_written_is_refused_before_anything_is_loaded(
    base, tmp_path, capsys
):
    (tmp_path / "reference").write_text("a file")
    assert run(cached(base, tmp_path, "run", "loss=dpo")) == 2
    error = capsys.readouterr().err
    assert "reference.cache_dir" in error and "is a file" in error and "train:" not in error


def test_a_read_only_cache_is_used_if_it_holds_every_row(base, tmp_path, capsys, monkeypatch):
    assert run(cached(base, tmp_path, "first", "loss=dpo", "n_examples=16")) == 0
    create = tempfile.TemporaryFile

    def refuse_cache(*, prefix: str, dir: Path) -> Any:
        if dir.is_relative_to(tmp_path / "reference"):
            raise OSError(errno.EROFS, "Read-only file system", str(dir))
        return create(prefix=prefix, dir=dir)

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse_cache)
    before = sorted((tmp_path / "reference").rglob("*"))
    assert run(cached(base, tmp_path, "again", "loss=dpo", "n_examples=16")) == 0
    assert_same_end(tmp_path / "again", tmp_path / "first")
    capsys.readouterr()
    assert run(cached(base, tmp_path, "more", "loss=dpo", "n_examples=24")) == 2
    error = capsys.readouterr().err
    assert "reference.cache_dir" in error and "is not writable" in error and "scoring" not in error
    assert sorted((tmp_path / "reference").rglob("*")) == before


def test_a_model_whose_rows_depend_on_longer_ones_beside_them_is_refused(base, tmp_path, capsys):
    factors = {"short_factor": [1.0] * 4, "long_factor": [2.0] * 4}
    rope = {"rope_type": "longrope", "original_max_position_embeddings": 40, **factors}
    save_tiny_model(tmp_path / "long", head_dim=8, rope_parameters={"rope_theta": 1e4, **rope})
    for max_length, code in ((64, 2), (40, 0)):
        command = cached(base, tmp_path, "run", "loss=dpo", model=tmp_path / "long")
        command[command.index("max_length=64")] = f"max_length={max_length}"
        assert run(command) == code
        assert ("set reference.mode=online" in capsys.readouterr().err) == bool(code)


def test_a_damaged_file_is_said_and_its_rows_scored_again(base, tmp_path, capsys):
    command = cached(base, tmp_path, "first", "loss=dpo")
    assert run(command) == 0
    [path] = tmp_path.glob("reference/*/*.npz")
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    for damaged in (bytes(content), bytes(content[:100])):
        path.write_bytes(damaged)
        shutil.rmtree(tmp_path / "second", ignore_errors=True)
        capsys.readouterr()
        assert run(cached(base, tmp_path, "second", "loss=dpo")) == 0
        assert f"{path} is damaged" in capsys.readouterr().err
        assert lines_of(tmp_path / "second") == lines_of(tmp_path / "first")
        for newer in set(path.parent.glob("*.npz")) - {path}:
            newer.unlink()
    # not damaged: it cannot be opened
    capsys.readouterr()
    with pytest.raises(OSError, match="Too many open files"), no_more_files():
        RowCache(path.parent).read([path], [b""])
    assert "damaged" not in capsys.readouterr().err


def test_memory_that_runs_out_costs_nothing(base, tmp_path, capsys, monkeypatch):
    online = arguments(base, base / "model", tmp_path / "online", "loss=dpo")
    assert run(online) == 0
    real, failed = ReferenceScoring._logps, []

    def failing(self: ReferenceScoring, *args: Any) -> Any:
        if failed:
            return real(self, *args)
        with Exhaustion(40) as mode:
            failed.append(mode)
            return real(self, *args)

    monkeypatch.setattr(ReferenceScoring, "_logps", failing)
    capsys.readouterr()
    assert run(cached(base, tmp_path, "run", "loss=dpo")) == 0
    assert failed[0].failed and "computing them again" in capsys.readouterr().err
    assert losses_of(tmp_path / "run") == pytest.approx(losses_of(tmp_path / "online"), rel=1e-6)


def test_no_number_is_fetched_from_a_gpu_that_waits_for_a_lost_rank(
    base, tmp_path, capsys, monkeypatch
):
    def lost(world: World) -> None:
        raise LostRankError("a GPU waits, with no word of rank 1")

    monkeypatch.setattr(reference, "await_device", lost)
    assert run(cached(base, tmp_path, "run", "loss=dpo")) == 7
    assert "no word of rank 1" in capsys.readouterr().err


def test_a_reference_that_is_not_finite_is_named_with_its_row(base, tmp_path, capsys, monkeypatch):
    real = ReferenceScoring._logps

    def broken(self: ReferenceScoring, *args: Any) -> Any:
        parts = real(self, *args)
        parts[0][0] = float("nan")
        return parts

    monkeypatch.setattr(ReferenceScoring, "_logps", broken)
    assert run(cached(base, tmp_path, "run", "loss=dpo")) == 4
    error = capsys.readouterr().err
    assert "log-probability of nan at" in error and "train.jsonl:" in error
    assert ":chosen, token 1" in error
    assert not (tmp_path / "run").exists()


def test_rows_before_one_that_is_not_finite_are_kept(base, tmp_path, capsys, monkeypatch):
    real, calls = ReferenceScoring._logps, []

    def broken(self: ReferenceScoring, *args: Any) -> Any:
        parts = real(self, *args)
        calls.append(parts)
        if len(calls) == 2:
            parts[-1][-1] = float("-inf")
        return parts

    monkeypatch.setattr(ReferenceScoring, "_logps", broken)
    assert run(cached(base, tmp_path, "run", "loss=dpo", "n_eval_examples=0")) == 4
    assert re.search(r"log-probability of -inf at \S+:rejected, token", capsys.readouterr().err)
    # of the first of three steps
    assert len(scored_rows(tmp_path)) == 8


def test_what_cannot_be_kept_is_refused_and_auto_keeps_it_not(base, tmp_path, capsys):
    assert run(cached(base, tmp_path, "run", "loss=tdpo")) == 2
    error = capsys.readouterr().err
    assert "reference.mode=cache" in error and "loss=tdpo" in error
    auto = ReferenceConfig(mode="auto")
    assert [auto.is_cached(DPOConfig(), epochs) for epochs in (None, 1, 2)] == [False, False, True]
    assert auto.is_cached(TISDPOConfig(), 2) and not auto.is_cached(
        TISDPOConfig(token_level=True), 2
    )
    assert not auto.is_cached(TDPOConfig(), 2) and not auto.is_cached(SFTConfig(), 2)
    with pytest.raises(ValueError, match=r"reference\.mode must be one of .*'offline'"):
        ReferenceConfig(mode="offline")


def test_a_run_may_go_on_with_the_other_mode(base, tmp_path, capsys):
    options = ["loss=dpo", "n_eval_examples=0", "resume=auto"]
    with stopping_after(1):
        assert run(arguments(base, base / "model", tmp_path / "run", *options)) == 75
    capsys.readouterr()
    assert run(cached(base, tmp_path, "run", *options)) == 0
    assert "reference.mode was online, is cache" in capsys.readouterr().err
    assert len(losses_of(tmp_path / "run")) == 3
