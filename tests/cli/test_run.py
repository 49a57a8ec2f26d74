"""The program as a user meets it: exit codes, one message, no traceback, nothing lost."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from stopped_runs import run as run_here
from tiny_models import read_metrics, save_dataset, save_tiny_model, text_rows, write_rows

from fastpref.cli.launch import launch_on_every_gpu
from fastpref.errors import ConfigError

ROOT = Path(__file__).resolve().parents[2]


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("cli")
    save_dataset(base, "words")
    save_tiny_model(base / "model", tie_word_embeddings=True)
    return base


def command(*options: str) -> list[str]:
    return [sys.executable, str(ROOT / "train.py"), *options]


def environment() -> dict[str, str]:
    return os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"}


def job(base: Path, data: str = "words", **options: object) -> list[str]:
    values = {
        "model": "blank_model",
        "model.name_or_path": base / "model",
        "model.fsdp_policy_mp": "null",
        "datasets": f"[{data}]",
        "base_data_dir": base,
        "loss": "dpo",
        "batch_size": 8,
        "sample_during_eval": "false",
        "max_length": 64,
        "max_prompt_length": 32,
    }
    return [f"{key}={value}" for key, value in (values | options).items()]


def with_row(base: Path, name: str, index: int, row: object) -> str:
    """A copy of the data whose row `index` (from 1) is another; returns its name."""
    rows = text_rows(12)
    lines = [json.dumps(r) for r in rows]
    lines[index - 1] = row if isinstance(row, str) else json.dumps(row)
    folder = base / name
    folder.mkdir(exist_ok=True)
    (folder / "train.jsonl").write_text("\n".join(lines) + "\n", encoding="utf-8")
    write_rows(folder, "test", rows[:4])
    return name


def test_bad_data_is_named_by_file_row_and_field_before_any_model(
    base, tmp_path, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    good = text_rows(1)[0]
    empty = base / "empty_split"
    write_rows(empty, "train", text_rows(12))
    write_rows(empty, "test", [])
    cases = [
        # data, what the message says
        (with_row(base, "malformed", 8, '{"prompt": "a", "chosen": '), r"train.jsonl:8"),
        (with_row(base, "null", 3, good | {"chosen": None}), "train.jsonl:3:chosen: "),
        ("empty_split", "0 rows"),
        ("wrods", "words"),
    ]
    for name, expected in cases:
        # the model does not exist: data errors come first
        code = run_here(job(base, name, **{"model.name_or_path": base / "no-model"}))
        said = capsys.readouterr().err
        assert code == 3, said
        assert expected in said and "Traceback" not in said
    assert not list(tmp_path.glob("output/*"))


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        ({"model.name_or_path": "no/such/model"}, 4, "no folder no/such/model"),
        ({"model.archive": "gone/policy.pt"}, 4, "model.archive"),
        ({"optimizer": "AdamV"}, 2, "nearest: Adam"),
        ({"batch_size": 100}, 2, "data.drop_last=false"),
        ({"output_dir": "/dev/null/runs"}, 2, "output_dir"),
        ({"model.block_name": "GPT2Block"}, 2, "LlamaDecoderLayer"),
        ({"optimizer": "RMSprop", "optim.betas": "[0.9,0.95]"}, 2, "RMSprop takes no betas"),
    ],
)
def test_what_cannot_work_ends_in_one_message(
    base, tmp_path, options, code, message, monkeypatch, capsys
):
    monkeypatch.chdir(tmp_path)
    assert run_here(job(base, **options)) == code
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said


def test_a_diverging_run_stops_before_the_update_with_exit_5(base, tmp_path, capsys):
    options = {"lr": "1e30", "warmup_steps": 0, "max_grad_norm": "1e30", "n_epochs": 8}
    assert run_here(job(base, run_dir=tmp_path / "run", **options)) == 5
    said = capsys.readouterr().err
    assert "not finite at step" in said and "Traceback" not in said
    assert not (tmp_path / "run" / "LATEST").exists()


def test_a_signal_saves_the_model_and_says_so_in_the_exit_code(base, tmp_path):
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        command(*job(base, run_dir=run_dir, n_epochs=100_000, minimum_log_interval_secs=0)),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    deadline = time.monotonic() + 60
    while time.monotonic() < deadline and not (run_dir / "metrics.jsonl").exists():
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 130, stderr
    assert str(run_dir / "LATEST") in stderr and "Traceback" not in stderr
    assert (run_dir / "LATEST" / "model.safetensors").exists()
    assert (run_dir / "curves.png").exists()


def test_a_signal_before_there_is_a_model_to_save_ends_the_process_at_once(base, tmp_path):
    run_dir = tmp_path / "run"
    process = subprocess.Popen(
        command(*job(base, run_dir=run_dir)),
        stderr=subprocess.PIPE,
        stdout=subprocess.DEVNULL,
        text=True,
        env=environment(),
    )
    assert process.stderr is not None
    # torch is imported, models are not loaded yet
    assert "DPO of" in process.stderr.readline()
    for _ in range(5):
        process.send_signal(signal.SIGTERM)
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 75, stderr
    assert stderr.endswith("fastpref: terminated; nothing to save yet\n")
    assert "Traceback" not in stderr
    assert not run_dir.exists()


def test_a_finished_run_does_not_fail_for_a_reader_that_left_or_a_poor_terminal(base, tmp_path):
    reading, writing = os.pipe()
    os.close(reading)
    poor = {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "COLUMNS": "0"}
    result = subprocess.run(
        command(*job(base, run_dir=tmp_path / "run", n_epochs=1)),
        stdout=writing,
        stderr=subprocess.PIPE,
        env=environment() | poor,
        timeout=120,
    )
    os.close(writing)
    assert result.returncode == 0, result.stderr
    assert b"Traceback" not in result.stderr
    assert (tmp_path / "run" / "curves.png").exists()


def test_streams_that_are_closed_take_nothing_from_the_files_of_a_run(base, tmp_path):
    closed = ["sh", "-c", 'exec "$@" <&- >&- 2>&-', "sh"]
    options = job(base, run_dir=tmp_path / "run", n_epochs=1)
    result = subprocess.run([*closed, *command(*options)], env=environment(), timeout=120)
    assert result.returncode == 0
    assert len(read_metrics(tmp_path / "run", "train")) == 3


def test_a_current_folder_that_is_gone_is_refused(base, tmp_path):
    gone = ["sh", "-c", 'mkdir "$0" && cd "$0" && rmdir "$0" && exec "$@"', str(tmp_path / "gone")]
    result = subprocess.run(
        [*gone, *command(*job(base))],
        capture_output=True,
        text=True,
        env=environment(),
        timeout=60,
    )
    assert result.returncode == 2, result.stderr
    assert result.stderr.startswith("fastpref: the current folder cannot be used: No such file")


def test_a_port_that_is_taken_is_refused_before_anything_starts():
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ConfigError, match=f"fsdp_port={port} cannot be had: Address already"):
            launch_on_every_gpu(2, port)


def test_the_launcher_says_of_a_signal_what_became_of_the_ranks(tmp_path, monkeypatch):
    rank = tmp_path / "rank.py"
    # one that cannot write what it is to save
    rank.write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))\n"
        "os.kill(os.getppid(), signal.SIGTERM)\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(sys, "argv", [str(rank)])
    assert launch_on_every_gpu(1, None) == 4


def test_the_launcher_names_a_rank_that_was_killed(tmp_path, monkeypatch, capfd):
    rank = tmp_path / "rank.py"
    # the other one ends as a rank does at the SIGTERM that follows
    rank.write_text(
        "import os, signal, sys, time\n"
        "if os.environ['RANK'] == '1':\n"
        "    signal.raise_signal(signal.SIGKILL)\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(75))\n"
        "time.sleep(60)\n"
    )
    monkeypatch.setattr(sys, "argv", [str(rank)])
    assert launch_on_every_gpu(2, None) == 7
    assert capfd.readouterr().err.endswith("fastpref: rank 1 was killed by SIGKILL\n")


def test_the_launcher_ends_with_the_code_of_the_cause(tmp_path, monkeypatch):
    rank = tmp_path / "rank.py"
    # rank 0 misses rank 1, and is gone before rank 1 has told its own error
    rank.write_text(
        "import os, signal, sys, time\n"
        "signal.signal(signal.SIGTERM, lambda *_: sys.exit(4))\n"
        f"ready = {str(tmp_path / 'ready')!r}\n"
        "if os.environ['RANK'] == '1':\n"
        "    open(ready, 'w').close()\n"
        "    time.sleep(60)\n"
        "while not os.path.exists(ready):\n"
        "    time.sleep(0.01)\n"
        "sys.exit(7)\n"
    )
    monkeypatch.setattr(sys, "argv", [str(rank)])
    assert launch_on_every_gpu(2, None) == 4


def test_the_ranks_of_a_machine_share_its_cores(monkeypatch):
    monkeypatch.delenv("OMP_NUM_THREADS")
    monkeypatch.setattr("fastpref.cli.launch.available_cores", lambda: 96)
    found = []
    monkeypatch.setattr(
        "torch.distributed.launcher.api.elastic_launch",
        lambda *_: lambda *_: found.append(os.environ.get("OMP_NUM_THREADS")),
    )
    assert launch_on_every_gpu(8, None) == 0
    assert found == ["12"]


def test_the_launcher_brings_back_one_run(base, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    # as under nohup
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    options = job(base, trainer="FSDPTrainer", n_epochs=1)
    monkeypatch.setattr(sys, "argv", command(*options)[1:])
    # what trainer=FSDPTrainer does where two GPUs are visible, here with two CPU ranks
    assert launch_on_every_gpu(2, None) == 0
    assert signal.signal(signal.SIGHUP, before) is signal.SIG_IGN
    (run_dir,) = (tmp_path / "output").iterdir()
    assert run_dir.name.startswith("dpo_model_words_")
    assert capfd.readouterr().out.count("optimizer steps") == 1
    assert len(read_metrics(run_dir, "train")) == 3
