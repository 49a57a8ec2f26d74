"""Whoever reads what a run prints may leave: the run goes on, and nothing is lost."""

import contextlib
import os
import pty
import subprocess
import sys
from pathlib import Path

import pytest
from ranks import run_on_ranks
from stopped_runs import run
from tiny_models import read_metrics, save_tiny_model, text_rows, write_rows

import train
from fastpref.cli.command_line import main
from fastpref.train import loop

PRINTING = """
import os, sys
from fastpref.cli.streams import outlive_readers
outlive_readers()
for _ in range(2):
    print("a line", file=sys.stderr)
    try:
        print("é", flush=True)
    except OSError as error:
        os._exit(error.errno)
"""


@pytest.mark.parametrize(("stdout", "code"), [("/dev/full", "28"), ("/dev/null", "0")])
def test_a_file_that_takes_no_more_is_an_error_on_stdout_alone(stdout, code):
    command = ["sh", "-c", f'"$0" -c "$1" >{stdout} 2>/dev/full; echo $?', sys.executable, PRINTING]
    assert subprocess.run(command, capture_output=True, text=True).stdout.strip() == code


@pytest.mark.parametrize("unbuffered", [[], ["-u"]])
def test_what_is_printed_arrives_in_its_order_though_the_reader_is_slow_and_the_encoding_poor(
    unbuffered,
):
    reading, writing = os.pipe()
    os.set_blocking(writing, False)
    full = bytes(os.fpathconf(writing, "PC_PIPE_BUF"))
    with open(writing, "wb", 0) as stream:
        while stream.write(full) is not None:
            pass
        process = subprocess.Popen(
            [sys.executable, *unbuffered, "-c", PRINTING],
            stdout=writing,
            stderr=writing,
            env=os.environ | {"PYTHONIOENCODING": "ascii"},
        )
    with open(reading, "rb") as stream:
        assert stream.read().strip(b"\0") == 2 * b"a line\n\\xe9\n"
    assert process.wait() == 0


@pytest.mark.parametrize("option", ["--help", "--cfg"])
def test_a_reader_may_leave_before_the_end_of_a_long_answer(option):
    command = f"{sys.executable} train.py {option}; echo $? >&2"
    answer = ["sh", "-c", f"({command}) | true"]
    root = Path(__file__).resolve().parents[2]
    result = subprocess.run(answer, cwd=root, capture_output=True, text=True, timeout=60)
    assert result.stderr == "0\n"


@pytest.mark.parametrize("argument", ["--help", "--version", "--cfg", "task=plan"])
def test_a_full_disk_under_an_answer_is_one_line_and_the_code_of_an_unwritable_file(
    argument, monkeypatch, capsys
):
    with open("/dev/full", "w", encoding="utf-8") as full:
        monkeypatch.setattr(sys, "stdout", full)
        code = main([argument], train.compose_choices, train.CONFIG_DIR)
        monkeypatch.undo()
        # what is still buffered cannot be written on closing either
        with contextlib.suppress(OSError):
            full.close()
    told = "fastpref: standard output: cannot be written: No space left on device\n"
    assert (code, capsys.readouterr().err) == (4, told)


def train_unheard(arguments: list[str], closed_in_step: int | None) -> None:
    """A run whose pipe nobody reads from the start, or whose terminal goes in a step of it."""
    reading, writing = os.pipe() if closed_in_step is None else pty.openpty()
    for number in (1, 2):
        os.dup2(writing, number)
    os.close(writing)
    real = loop.train_step

    def train_step(run, batches, step):
        if step == closed_in_step:
            os.close(reading)
        return real(run, batches, step)

    loop.train_step = train_step
    if closed_in_step is None:
        os.close(reading)
    assert run(arguments) == 0


@pytest.mark.parametrize("closed_in_step", [None, 1])
def test_a_run_that_nobody_listens_to_any_more_saves_what_it_trained(tmp_path, closed_in_step):
    write_rows(tmp_path / "words", "train", text_rows(12))
    save_tiny_model(tmp_path / "model")
    arguments = [
        *(
            "model=blank_model",
            f"model.name_or_path={tmp_path / 'model'}",
            "model.fsdp_policy_mp=null",
        ),
        *("datasets=[words]", f"base_data_dir={tmp_path}", "loss=dpo", "batch_size=4"),
        *("n_eval_examples=0", "checkpoint.every=0", "max_length=64", "max_prompt_length=32"),
        *(f"data.cache_dir={tmp_path / 'cache'}", f"run_dir={tmp_path / 'run'}"),
    ]
    run_on_ranks(train_unheard, 1, arguments, closed_in_step)
    assert len(read_metrics(tmp_path / "run", "train")) == 3
    assert (tmp_path / "run" / "checkpoints" / "step-00000003").is_dir()
    assert (tmp_path / "run" / "LATEST" / "model.safetensors").is_file()
