"""Signals in child processes: remembered once, acting the second time, whatever else runs."""

import os
import signal
import subprocess
import sys

import pytest

BURST = """
import os, signal, sys
from fastpref.signals import StopRequest
class World:
    def agree_max(self, value): return value
received = []
with StopRequest() as stop:
    os.kill(os.getpid(), {first})
    assert stop.agreed(World()) and stop.requested
    print("remembered", flush=True)
    os.kill(os.getpid(), {second})
    print("still here", flush=True)
"""
EVERYWHERE = """
import os, sys, threading, time
from fastpref.signals import say_if_stopped, signals_end_the_process
def soon():
    time.sleep(0.05)
    for _ in range(50):
        os.kill(os.getpid(), {number})
with signals_end_the_process(), say_if_stopped("shards are kept"):
    threading.Thread(target=soon, daemon=True).start()
    while True:
        # imports, dictionaries that grow, handlers of others: what a library does
        {{f"k{{i}}": [i] for i in range(1000)}}
        sys.modules.pop("colorsys", None)
        import colorsys
"""


def run(program: str) -> subprocess.CompletedProcess:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    command = [sys.executable, "-c", program]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    ("first", "second", "code"),
    [("SIGTERM", "SIGTERM", -signal.SIGTERM), ("SIGINT", "SIGINT", 130)],
)
def test_the_first_signal_is_remembered_and_the_second_acts(first, second, code):
    done = run(BURST.format(first=f"signal.{first}", second=f"signal.{second}"))
    assert done.returncode == code, done.stderr
    assert done.stdout == "remembered\n"
    assert done.stderr.startswith(f"{first}: ")
    assert "Traceback" not in done.stderr


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 75), (signal.SIGINT, 130)])
def test_a_burst_of_signals_anywhere_ends_in_one_sentence_and_its_exit_code(number, code):
    done = run(EVERYWHERE.format(number=int(number)))
    assert done.returncode == code, done.stderr
    [line] = done.stderr.splitlines()
    assert line.endswith("shards are kept")
