"""Kill runs at random times, resume them, and compare the results with an uninterrupted run:

    python scripts/kill_and_resume.py --kills 40 --seed 0

Each kill is a SIGKILL in a separate run, at a time drawn uniformly from the duration of an
uninterrupted run: loading, training, evaluating, saving, exporting. The same command with
`resume=auto` must then end with bitwise the same weights, metrics and samples. Prints what the runs
were doing when killed; exits with 1 if any result differs.
"""

import argparse
import importlib
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any, NamedTuple

from same_numbers import read_numbers

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
LOADED_FIRST = ("torch", "transformers", "datasets", "fastpref.tisdpo.recipe", "torch._dynamo")
"""Modules imported before forking, so that the runs need not import them."""
DEADLINE_SECONDS = 120
STEPS_BETWEEN_EVALS = 3


class Kill(NamedTuple):
    """One kill and its outcome."""

    seconds: float
    """Time of the kill, after the run's start."""
    where: str
    """Phase of the run when it was killed: loading, training, …"""
    going_on: str
    """Step that it resumed from."""
    same: bool
    """Whether the results equal those of the uninterrupted run."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=40)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("options", nargs="*", help="more of the run, KEY=VALUE")
    arguments = parser.parse_args()
    # not a TemporaryDirectory, which the first fork that exits would remove
    folder = Path(tempfile.mkdtemp(prefix="kill-and-resume-"))
    kills = kill_and_resume(folder, arguments.kills, arguments.seed, arguments.options)
    shutil.rmtree(folder)
    print(table(kills))
    if not all(kill.same for kill in kills):
        sys.exit(1)


def table(kills: list[Kill]) -> str:
    """Markdown table of the kills, by phase."""
    lines = ["| killed while | kills | went on from | the same end |", "|---|---|---|---|"]
    for where, count in Counter(kill.where for kill in kills).most_common():
        there = [kill for kill in kills if kill.where == where]
        starts = ", ".join(sorted({kill.going_on for kill in there}))
        lines.append(f"| {where} | {count} | {starts} | {sum(kill.same for kill in there)} |")
    return "\n".join(lines)


def kill_and_resume(folder: Path, kills: int, seed: int, options: list[str]) -> list[Kill]:
    """Kill and resume `kills` runs.

    Args:
        folder: Working folder.
        kills: Number of runs to kill.
        seed: Seed of the times of the kills.
        options: Options of the runs, in addition to those that make them short.
    """
    for name in LOADED_FIRST:
        importlib.import_module(name)
    started = time.perf_counter()
    whole = folder / "whole"
    assert wait(start(command(whole, options), folder / "whole.log")) == 0
    seconds = time.perf_counter() - started
    expected, instants = end_of(whole), random.Random(seed)
    results = []
    for number in range(kills):
        run_dir, log = folder / f"run-{number}", folder / f"run-{number}.log"
        delay = instants.uniform(0, seconds)
        process = start(command(run_dir, options), log)
        time.sleep(delay)
        os.kill(process.pid, signal.SIGKILL)
        is_whole = wait(process) == 0
        where = "ended before" if is_whole else doing(run_dir, log)
        again = log.with_suffix(".again")
        code = wait(start(command(run_dir, options), again))
        same = code == 0 and end_of(run_dir) == expected
        results.append(Kill(delay, where, came_from(again), same))
        print(f"{number}: after {delay:.2f} s, {where}; {results[-1].going_on}; {same}", flush=True)
        if same:
            shutil.rmtree(run_dir, ignore_errors=True)
    return results


def command(run_dir: Path, options: list[str]) -> list[str]:
    """Command line of a short run of the embedded model that evaluates, samples and saves often."""
    return [
        *(f"run_dir={run_dir}", "resume=auto", "n_examples=384", "warmup_steps=4"),
        *("eval_every=96", "n_eval_examples=64", "n_eval_model_samples=2", "checkpoint.every=2"),
        *("minimum_log_interval_secs=0", *options),
    ]


def start(arguments: list[str], log: Path) -> Any:
    """Start the program in a process forked from this one."""
    process = multiprocessing.get_context("fork").Process(target=enter, args=(arguments, log))
    process.start()
    return process


def enter(arguments: list[str], log: Path) -> None:
    """Main function of the forked process: the command line, with its output in `log`."""
    import train
    from fastpref.cli.command_line import leave, main

    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(descriptor, 1)
    os.dup2(descriptor, 2)
    leave(main(arguments, train.compose_choices, train.CONFIG_DIR))


def wait(process: Any) -> int:
    """Wait for a process; returns its exit code."""
    process.join(DEADLINE_SECONDS)
    assert process.exitcode is not None, "it hangs"
    return process.exitcode


def doing(run_dir: Path, log: Path) -> str:
    """Phase of a run when it was killed, from its files and log."""
    if any((run_dir / "checkpoints").glob("*.partial")):
        return "saving"
    if (run_dir / "LATEST.partial").exists():
        return "exporting"
    said = log.read_text(errors="replace") if log.exists() else ""
    if "checkpoints of" not in said:
        return "loading"
    lines = said.splitlines()
    if any(line.startswith("wrote ") for line in lines):
        return "ending"
    steps = sum(line.startswith("train stats after") for line in lines)
    evaluations = sum(line.startswith("a sample of the policy") for line in lines)
    return "training" if evaluations > steps // STEPS_BETWEEN_EVALS else "evaluating"


def came_from(log: Path) -> str:
    """Step that a run resumed from, according to its log."""
    for line in log.read_text(errors="replace").splitlines():
        if line.startswith("going on after step"):
            return line.split(":")[0].removeprefix("going on after ")
    return "the beginning"


def end_of(run_dir: Path) -> Any:
    """Metrics, samples and weights of a run, without metrics that depend on the machine."""
    files = ("samples.jsonl", "LATEST/model.safetensors")
    numbers = read_numbers(run_dir / "metrics.jsonl")
    return numbers, [(run_dir / name).read_bytes() for name in files]


if __name__ == "__main__":
    main()
