"""One of two ranks is killed, stopped or asked to end: the other one ends, and says which."""

import os
import re
import signal
import time
from contextlib import suppress
from multiprocessing.context import ForkServerProcess
from pathlib import Path
from typing import NamedTuple

import pytest
from ranks import start_on_ranks
from stopped_runs import run
from tiny_models import read_metrics, save_tiny_model, text_rows, write_rows
from torch.distributed import DistNetworkError, TCPStore

from fastpref.cli.command_line import leave

TIMEOUT_SECONDS = 3
PATIENT_SECONDS = 60
"""Where no rank is lost, however busy the cores are."""
NAMING_SECONDS = 30
"""What it may take to find out which rank it is, or to save, on busy cores."""


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("lost")
    write_rows(base / "words", "train", text_rows(32, seed=1))
    save_tiny_model(base / "model")
    return base


class Rank(NamedTuple):
    """One of two processes of a run."""

    process: ForkServerProcess
    stderr: Path


def start_two(
    base: Path, run_dir: Path, *, timeout: int = TIMEOUT_SECONDS, port: int | None = None
) -> list[Rank]:
    """Two processes of one run that does not end by itself; with a port, in the store there."""
    command = [
        *("model=blank_model", f"model.name_or_path={base / 'model'}", "model.fsdp_policy_mp=null"),
        *("datasets=[words]", f"base_data_dir={base}", "loss=dpo", f"run_dir={run_dir}"),
        *("max_length=64", "max_prompt_length=32", "batch_size=4", "n_epochs=100000"),
        *("n_eval_examples=0", "minimum_log_interval_secs=0", "checkpoint.every=0"),
        f"parallel.timeout={timeout}",
    ]
    run_dir.parent.mkdir(exist_ok=True)
    stderr = [run_dir.parent / f"stderr-{rank}" for rank in range(2)]
    processes = start_on_ranks(train_and_leave, 2, command, stderr, port)
    return [Rank(*of_rank) for of_rank in zip(processes, stderr, strict=True)]


def train_and_leave(command: list[str], stderr: list[Path], port: int | None) -> None:
    """What `python train.py` does, its stderr in a file."""
    if port is not None:
        # as torchrun does; `run` takes the next one
        os.environ |= {"TORCHELASTIC_USE_AGENT_STORE": "True", "MASTER_PORT": str(port - 1)}
    with stderr[int(os.environ["RANK"])].open("w") as file:
        os.dup2(file.fileno(), 2)
    leave(run(command))


def wait_for_steps(ranks: list[Rank], run_dir: Path) -> None:
    deadline = time.monotonic() + 120
    metrics = run_dir / "metrics.jsonl"
    while not metrics.exists() or len(read_metrics(run_dir, "train")) < 3:
        assert time.monotonic() < deadline and all(rank.process.is_alive() for rank in ranks)
        time.sleep(0.1)


def end_of(rank: Rank) -> tuple[int | None, str]:
    """Its exit code, None if it goes on, and what it said."""
    rank.process.join(timeout=TIMEOUT_SECONDS + NAMING_SECONDS)
    code = rank.process.exitcode
    rank.process.kill()
    return code, rank.stderr.read_text()


@pytest.mark.parametrize(
    ("victim", "number", "message"),
    [
        (1, signal.SIGKILL, "rank 1 died or hangs, there is no sign of life"),
        (1, signal.SIGSTOP, "rank 1 died or hangs, there is no sign of life"),
        (0, signal.SIGKILL, "rank 0"),
        (0, signal.SIGSTOP, "rank 0"),
    ],
)
def test_a_rank_that_is_gone_ends_the_other_and_is_named(base, tmp_path, victim, number, message):
    ranks = start_two(base, tmp_path / "run")
    try:
        wait_for_steps(ranks, tmp_path / "run")
        os.kill(ranks[victim].process.pid, number)
        if (victim, number) == (1, signal.SIGKILL):
            # as a launcher does when it sees the first one end
            time.sleep(0.5)
            os.kill(ranks[1 - victim].process.pid, signal.SIGTERM)
        code, said = end_of(ranks[1 - victim])
    finally:
        ranks[victim].process.kill()
        ranks[victim].process.join()
    assert code == 7
    assert message in said.splitlines()[-1] and "Traceback" not in said


def test_a_signal_to_one_rank_ends_both_at_the_same_step_with_everything_saved(base, tmp_path):
    run_dir = tmp_path / "run"
    ranks = start_two(base, run_dir, timeout=PATIENT_SECONDS)
    wait_for_steps(ranks, run_dir)
    os.kill(ranks[1].process.pid, signal.SIGINT)
    codes, said = zip(*(end_of(rank) for rank in ranks), strict=True)
    assert codes == (130, 130)
    last = read_metrics(run_dir, "train")[-1]["step"]
    assert re.search(rf"resume=auto run_dir=\S+ goes on after step {last}$", said[0].rstrip())
    assert (run_dir / "checkpoints" / "latest").read_text() == f"step-{last:08d}\n"


def test_ranks_whose_launcher_is_killed_end_as_at_a_signal_and_say_what_is_saved(base, tmp_path):
    run_dir = tmp_path / "run"
    store, port = open_store()
    ranks = start_two(base, run_dir, timeout=PATIENT_SECONDS, port=port)
    wait_for_steps(ranks, run_dir)
    # the system tells them of its end, and the store ends with it
    del store
    for rank in ranks:
        os.kill(rank.process.pid, signal.SIGTERM)
    codes, said = zip(*(end_of(rank) for rank in ranks), strict=True)
    assert codes == (75, 75), said
    last = read_metrics(run_dir, "train")[-1]["step"]
    saved = f"terminated; the state is saved in {run_dir}, resume=auto run_dir={run_dir} goes on"
    assert said[0].endswith(f"fastpref: {saved} after step {last}\n")
    assert (run_dir / "checkpoints" / f"step-{last:08d}").is_dir()


def open_store() -> tuple[TCPStore, int]:
    """A store that no rank holds, on a port that `run` can name."""
    for port in range(20_000, 30_000):
        with suppress(DistNetworkError):
            return TCPStore("localhost", port, is_master=True, wait_for_workers=False), port
    raise AssertionError("no port is free")
