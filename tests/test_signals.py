"""Signals in bursts, at any moment: a documented exit code, one message, no traceback."""

import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from exhaustion import no_more_files

from fastpref.complete_files import append_whole
from fastpref.deadline import Deadline
from fastpref.errors import (
    CheckpointError,
    InterruptionError,
    PreemptionError,
    WritingMemoryError,
)
from fastpref.signals import (
    StopRequest,
    say_if_stopped,
    signals_change_nothing,
    signals_end_the_process,
)
from fastpref.train.sampling import StopOnSignal

ROOT = Path(__file__).resolve().parents[1]
BURSTS = 6

# imports, exceptions that are swallowed, output and handlers of its own: what a run consists of
BUSY = """
import importlib, json, os, signal, sys
# tests may run under nohup
signal.signal(signal.SIGHUP, signal.SIG_DFL)
from fastpref.signals import *

def work():
    try:
        importlib.reload(json)
        sys.stderr.write("working\\n")
        sys.stderr.flush()
    except BaseException:
        pass

class Alone:
    def agree_max(self, value):
        return value
"""
LOADING = (
    BUSY
    + """
with signals_end_the_process():
    print("ready", flush=True)
    while True:
        work()
"""
)
TRAINING = (
    BUSY
    + """
with signals_end_the_process(), say_if_stopped("what there is lies in run"):
    with StopRequest() as stop:
        print("ready", flush=True)
        while not stop.agreed(Alone()):
            work()
        os._exit(0)
"""
)

LAUNCHER = """
import subprocess, sys
subprocess.run([sys.executable, "-c", sys.argv[1]])
"""
RANK = (
    BUSY
    + """
from fastpref.forks import stop_without_launcher
with signals_end_the_process():
    stop_without_launcher()
    print("ready", flush=True)
    __import__("time").sleep(60)
"""
)

PASSING_ON = """
import signal, subprocess, sys
from fastpref.cli.launch import passing_on

own = []
handler = lambda *_: own.append(True)
signal.signal(signal.SIGUSR1, handler)
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
with passing_on([signal.SIGUSR1]):
    signal.raise_signal(signal.SIGUSR1)
    assert child.wait(30) == -signal.SIGUSR1 and not own
    # nobody is there any more
    signal.raise_signal(signal.SIGUSR1)
assert own and signal.getsignal(signal.SIGUSR1) is handler
"""


def burst(program: str, numbers: list[int], gap: float) -> tuple[int, str]:
    """Run a program, send it signals, and return its exit code and what it said beside working."""
    process = subprocess.Popen(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        cwd=ROOT,
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    for number in numbers:
        process.send_signal(number)
        time.sleep(gap)
    _, stderr = process.communicate(timeout=60)
    return process.returncode, stderr.replace("working\n", "")


def random_bursts(seed: int) -> list[tuple[list[int], float]]:
    rng = random.Random(seed)
    kinds = [[signal.SIGINT], [signal.SIGTERM], [signal.SIGINT, signal.SIGTERM]]
    return [
        (rng.choices(kinds[i % 3], k=rng.randint(2, 8)), rng.choice([0, 1e-4, 1e-3]))
        for i in range(BURSTS)
    ]


def test_where_nothing_is_to_be_saved_the_first_signal_of_a_burst_ends_the_process():
    said = {130: "fastpref: interrupted; nothing to save yet\n"}
    said[75] = "fastpref: terminated; nothing to save yet\n"
    for numbers, gap in random_bursts(seed=0):
        code, stderr = burst(LOADING, numbers, gap)
        assert code in {130 if number == signal.SIGINT else 75 for number in numbers}, stderr
        assert stderr == said[code]


def test_a_signal_that_is_to_be_ignored_from_the_start_stays_ignored():
    ignoring = "import signal\nsignal.signal(signal.SIGINT, signal.SIG_IGN)\n"
    code, stderr = burst(ignoring + LOADING, [signal.SIGINT] * 2 + [signal.SIGTERM], 1e-3)
    assert (code, stderr) == (75, "fastpref: terminated; nothing to save yet\n")
    code, stderr = burst(ignoring + TRAINING, [signal.SIGINT] * 2 + [signal.SIGTERM], 1e-3)
    assert code == 0 and stderr.startswith("SIGTERM: stopping here")


def test_a_signal_ends_a_process_that_cannot_say_so():
    for stderr in ("/dev/full", "/dev/null"):
        with open(stderr, "wb") as unheard:
            process = subprocess.Popen(
                [sys.executable, "-c", LOADING], stdout=subprocess.PIPE, stderr=unheard, cwd=ROOT
            )
        assert process.stdout is not None and process.stdout.readline() == b"ready\n"
        process.terminate()
        assert process.wait(60) == 75


def test_in_training_the_first_is_remembered_and_the_second_acts_at_once():
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1):
        code, stderr = burst(TRAINING, [number], 0)
        name = signal.Signals(number).name
        assert (code, stderr) == (0, f"{name}: stopping here; once more ends the process at once\n")
    # of a terminal that is closed there are two
    assert burst(TRAINING, 2 * [signal.SIGHUP], 0) == (0, "SIGHUP: stopping here\n")
    for numbers, gap in random_bursts(seed=1):
        # 0: the loop was faster than the second signal
        code, stderr = burst(TRAINING, numbers, gap)
        assert code in (0, 130, -signal.SIGTERM)
        assert code != 130 or "interrupted; asked for twice, so at once; what there is" in stderr
        assert "Traceback" not in stderr and "Error" not in stderr


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [
        (signal.SIGINT, signal.SIGINT, 130),
        (signal.SIGTERM, signal.SIGINT, 130),
        (signal.SIGTERM, signal.SIGTERM, -signal.SIGTERM),
        (signal.SIGINT, signal.SIGUSR1, -signal.SIGUSR1),
        (signal.SIGTERM, signal.SIGHUP, 0),
    ],
)
def test_a_second_signal_of_a_training_ends_it_before_its_next_instruction(first, second, code):
    program = f"""
with say_if_stopped("what there is lies in run"), StopRequest():
    signal.raise_signal({int(first)})
    signal.raise_signal({int(second)})
    print("went on")
"""
    done = subprocess.run(
        [sys.executable, "-c", BUSY + program], capture_output=True, text=True, cwd=ROOT
    )
    assert (done.returncode, done.stdout) == (code, "" if code else "went on\n")
    interrupted = "fastpref: interrupted; asked for twice, so at once; what there is lies in run\n"
    assert done.stderr == (interrupted if code == 130 else "")


class World:
    """One process, or one of two whose other rank is asked to stop as well."""

    def __init__(self, other: int = 0, arriving: int = 0) -> None:
        self.other, self.arriving = other, arriving

    def agree_max(self, value: int) -> int:
        if self.arriving:
            number, self.arriving = self.arriving, 0
            signal.raise_signal(number)
        return max(value, self.other)


def test_a_signal_that_comes_while_ranks_agree_is_not_lost():
    with StopRequest() as stop:
        world = World(arriving=signal.SIGTERM)
        assert not stop.agreed(world)
        assert stop.requested and stop.agreed(world)
        with pytest.raises(PreemptionError, match="terminated; saved"):
            stop.raise_saying("saved")


def test_a_ranks_own_signal_after_another_ranks_is_its_first():
    with StopRequest() as stop:
        assert stop.agreed(World(other=signal.SIGTERM))
        # a second one would end this process
        assert stop.requested
        signal.raise_signal(signal.SIGTERM)
        assert stop.agreed(World(other=signal.SIGTERM))


def test_a_signal_is_said_once_however_often_the_ranks_agree(caplog):
    with StopRequest() as stop:
        signal.raise_signal(signal.SIGUSR1)
        assert stop.agreed(World()) and stop.agreed(World())
    assert caplog.messages == ["SIGUSR1: stopping here; once more ends the process at once"]


@pytest.mark.parametrize(("seconds", "code"), [(60.0, 0), (0.0, 130)])
def test_what_torchrun_forwards_at_once_is_the_same_request(monkeypatch, seconds, code):
    monkeypatch.setenv("TORCHELASTIC_RUN_ID", "none")
    program = f"""
from fastpref import signals
signals.SAME_REQUEST_SECONDS = {seconds}
with StopRequest():
    signal.raise_signal(signal.SIGINT)
    signal.raise_signal(signal.SIGINT)
"""
    done = subprocess.run([sys.executable, "-c", BUSY + program], capture_output=True, cwd=ROOT)
    assert done.returncode == code


def test_signals_are_ignored_while_another_error_is_being_reported():
    seen = []
    before = signal.signal(signal.SIGUSR1, lambda n, _: seen.append(n))
    try:
        with signals_change_nothing():
            signal.raise_signal(signal.SIGUSR1)
        assert not seen
    finally:
        signal.signal(signal.SIGUSR1, before)


def test_what_cannot_be_written_asks_to_stop_before_any_signal():
    with StopRequest() as stop:
        with stop.if_unwritable():
            raise CheckpointError("metrics.jsonl: cannot be written")
        signal.raise_signal(signal.SIGINT)
        assert stop.agreed(World())
        with pytest.raises(CheckpointError, match=r"metrics\.jsonl: cannot be written; saved"):
            stop.raise_saying("saved")
    with StopRequest() as stop, pytest.raises(CheckpointError, match="rank 0 cannot write"):
        assert stop.agreed(World(other=255))
        stop.raise_saying("saved")


def test_a_file_that_memory_could_not_write_ends_all_ranks_with_the_code_of_that(tmp_path):
    with StopRequest() as stop:
        with stop.if_unwritable(), no_more_files():
            append_whole(tmp_path / "metrics.jsonl", "{}\n")
        said = []
        other = World()
        other.agree_max = lambda value: said.append(value) or value
        with pytest.raises(WritingMemoryError, match="Too many open files; saved") as own:
            stop.raise_if_requested("saved", other)
    with StopRequest() as stop, pytest.raises(WritingMemoryError, match="rank 0 cannot") as others:
        stop.raise_if_requested("saved", World(other=said[0]))
    assert own.value.exit_code == others.value.exit_code == 6


def test_handlers_are_put_back_even_those_that_python_does_not_know():
    seen = []
    before = [signal.signal(number, lambda n, _: seen.append(n)) for number in (2, 15)]
    try:
        with signals_end_the_process(), say_if_stopped("nothing"), StopRequest() as stop:
            signal.raise_signal(signal.SIGINT)
        with pytest.raises(InterruptionError):
            stop.raise_if_requested("saved", World())
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGTERM)
    finally:
        for number, handler in zip((2, 15), before, strict=True):
            signal.signal(number, handler)
    assert seen == [2, 15]


def test_a_process_that_was_forked_off_dies_by_the_signal_itself():
    with signals_end_the_process():
        child = os.fork()
        if child == 0:
            signal.raise_signal(signal.SIGTERM)
            os._exit(0)
        _, status = os.waitpid(child, 0)
    assert os.waitstatus_to_exitcode(status) == -signal.SIGTERM


FORKING = """
import gc, os, sys, threading
import fastpref.forks

def fork():
    for _ in range(100):
        child = os.fork()
        if not child:
            os._exit(0)
        assert os.waitpid(child, 0)[1] == 0

# threads take turns within the hooks of a fork
sys.setswitchinterval(1e-6)
threads = [threading.Thread(target=fork) for _ in range(4)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
sys.exit(not gc.isenabled())
"""


def test_threads_that_fork_at_once_leave_the_garbage_collector_on():
    assert subprocess.run([sys.executable, "-c", FORKING], cwd=ROOT, timeout=60).returncode == 0


def test_a_process_that_starts_others_passes_a_signal_on():
    # by itself: a process that runs tests has children that are not this test's
    done = subprocess.run([sys.executable, "-c", PASSING_ON], cwd=ROOT, timeout=60)
    assert done.returncode == 0


def test_a_rank_whose_launcher_is_killed_outright_ends_as_at_sigterm():
    launcher = subprocess.Popen(
        [sys.executable, "-c", LAUNCHER, RANK],
        cwd=ROOT,
        env=os.environ | {"TORCHELASTIC_RUN_ID": "test"},
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert launcher.stdout.readline() == "ready\n"
    launcher.kill()
    # both are at their end when nobody holds the pipes any more
    assert launcher.communicate(timeout=30)[1] == "fastpref: terminated; nothing to save yet\n"


def test_sampling_ends_with_the_token_at_which_a_signal_or_the_deadline_comes():
    ids = torch.zeros(3, 5, dtype=torch.int64)
    with StopRequest() as stop:
        criterion = StopOnSignal(stop)
        assert not criterion(ids, None).any()
        signal.raise_signal(signal.SIGINT)
        assert criterion(ids, None).tolist() == [True] * 3
    with StopRequest(Deadline(0)) as stop:
        assert StopOnSignal(stop)(ids, None).tolist() == [True] * 3


def test_a_second_signal_ends_the_first_process_of_a_container_too():
    # for which the system drops signals that have no handler
    script = (
        "import signal; from fastpref.signals import die; "
        "signal.raise_signal = lambda _: None; die(signal.SIGTERM)"
    )
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT)
    assert ended.returncode == 128 + signal.SIGTERM


def test_a_signal_at_the_end_leaves_the_exit_code_as_it_is():
    script = (
        "import atexit, signal; from fastpref.cli.command_line import leave; "
        "atexit.register(signal.raise_signal, signal.SIGTERM); leave(75)"
    )
    assert subprocess.run([sys.executable, "-c", script], cwd=ROOT).returncode == 75


def test_a_deadline_counts_from_the_start_of_the_command():
    says = "from fastpref.deadline import _start as s; print(s(), flush=True)"
    command = (
        f"import os, subprocess, sys; {says}\n"
        f"for variables in ({{}}, {{'TORCHELASTIC_RUN_ID': '1'}}):\n"
        f"    subprocess.run([sys.executable, '-c', {says!r}], env=os.environ | variables)\n"
    )
    said = subprocess.check_output([sys.executable, "-c", command])
    own, of_child, of_rank = map(float, said.split())
    assert own == of_rank < of_child
