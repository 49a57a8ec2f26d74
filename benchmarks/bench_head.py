"""Time, memory and accuracy of the LM-head ops and of peer implementations, in one run.

    python benchmarks/bench_head.py --json
    python benchmarks/bench_head.py --shapes S1 S3 --rows 4096 --jobs train
    python benchmarks/bench_head.py --real-head real_head.pt --json

Each contender is timed once per round, so that drifts of the machine's speed affect all of them. A
peer that cannot run is listed with the reason. After an error of ours or a violated accuracy bound
the exit code is 1.
"""

import argparse
import itertools
import json
import statistics
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from bench_head_memory import peak_allocated
from head_cases import SHAPES, Case, real_case, synthetic_case
from head_cases import statistics as case_statistics
from head_contenders import CONTENDERS, JOBS, CannotRunError, Contender
from head_goals import missed
from head_oracle import KLOracle, Oracle
from head_report import table, write_plot
from kl_contenders import (
    KL_CONTENDERS,
    KL_JOBS,
    KLContender,
)
from machine import RESULTS, describe_machine, results_folder

from fastpref.errors import in_a_line

MIB = 2**20
OURS = "fastpref"


def main() -> None:
    arguments = parse_arguments()
    arguments.end = time.monotonic() + arguments.seconds_budget
    ceilings, results = [], []
    for case in cases(arguments):
        print(f"\n{case.name}: {case_statistics(case)}", flush=True)
        ceilings.append({"case": case.name} | measure_ceilings(case))
        for job in arguments.jobs:
            results += measure_job(case, job, arguments)
            if arguments.json:
                # a peer's crash or the end of the machine's time must not take what is measured
                write(arguments, ceilings, results)
        torch.cuda.empty_cache()
    report(arguments, ceilings, results)
    if any(row["contender"].startswith(OURS) and row.get("failure") for row in results):
        sys.exit("fastpref failed, see the table")


def parse_arguments() -> argparse.Namespace:
    on_gpu = torch.cuda.is_available()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    shapes = [name for name in SHAPES if name.startswith("tiny") != on_gpu]
    parser.add_argument("--shapes", nargs="*", default=shapes, choices=list(SHAPES))
    parser.add_argument("--rows", nargs="+", type=int, default=[16384, 4096] if on_gpu else [512])
    jobs = [*JOBS, *KL_JOBS]
    parser.add_argument("--jobs", nargs="+", default=jobs, choices=jobs)
    names = list(CONTENDERS | KL_CONTENDERS)
    parser.add_argument("--contenders", nargs="+", default=names, choices=names)
    parser.add_argument("--device", default="cuda" if on_gpu else "cpu")
    parser.add_argument("--real-head", type=Path, help="head and states of a real model, a .pt")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument(
        "--seconds-budget", type=float, default=480.0, help="start nothing new after"
    )
    parser.add_argument("--json", action="store_true", help="write table, plot and JSON")
    parser.add_argument("--name", default="head", help="of the files written")
    parser.add_argument("--results", type=Path, default=RESULTS)
    return parser.parse_args()


def cases(arguments: argparse.Namespace) -> Any:
    """Generate the cases one at a time (two may not fit in memory), until time is up."""
    for rows, shape in itertools.product(arguments.rows, [None, *arguments.shapes]):
        if time.monotonic() > arguments.end:
            print(f"\nleft out, the {arguments.seconds_budget:.0f} s are over: {shape} N={rows}")
        elif shape is not None:
            yield synthetic_case(shape, rows, arguments.device)
        elif arguments.real_head is not None:
            yield real_case(arguments.real_head, rows, arguments.device)


def measure_job(case: Case, job: str, arguments: argparse.Namespace) -> list[dict]:
    """One row per contender: time, memory, errors, or why it did not run."""
    of_two_models = job in KL_JOBS
    contenders = KL_CONTENDERS if of_two_models else CONTENDERS
    oracle = KLOracle(case, job) if of_two_models else Oracle(case, job)
    # earlier shapes would count towards torch.compile's recompilation limit
    torch.compiler.reset()
    rows, runs = [], {}
    for name in arguments.contenders:
        if name not in contenders or job not in contenders[name].jobs:
            continue
        contender = contenders[name]
        row = describe(case, job, contender)
        rows.append(row)
        try:
            if time.monotonic() > arguments.end:
                raise CannotRunError("the time is over")
            row |= oracle.errors(contender)
            runs[name] = lambda contender=contender: oracle.run(contender)
            row["extra_mib"] = measure_memory(runs[name], arguments.device)
        except (CannotRunError, ImportError) as reason:
            row["absent"] = str(reason)
        except Exception as error:
            # a peer's crash is a result; ours fails the run
            row["failure"] = in_a_line(error)
            runs.pop(name, None)
            torch.cuda.empty_cache()
        if name.startswith(OURS) and (missed_bounds := oracle.missed(row)):
            row["failure"] = missed_bounds
    seconds, failures = interleave(runs, arguments)
    for row in rows:
        if row["contender"] in failures:
            row["failure"] = failures[row["contender"]]
        elif row["contender"] in seconds:
            row |= summarize(seconds[row["contender"]])
    print(table(rows), flush=True)
    return rows


def describe(case: Case, job: str, contender: Contender | KLContender) -> dict:
    shape, _, rows = case.name.partition(" N=")
    return {
        "shape": shape,
        "rows": int(rows),
        "job": job,
        "contender": contender.name,
        "note": contender.note,
        "pass_tflop": case.pass_flops / 1e12,
    }


def measure_memory(run: Callable[[], Any], device: str) -> float:
    """Peak memory in MiB, without what was allocated before and the resulting gradients."""
    kept: list[Any] = []

    def keep() -> int:
        kept.append(run())
        return sum(gradient.nbytes for gradient in kept[0][1])

    peak_bytes, kept_bytes = peak_allocated(keep, device)
    return (peak_bytes - kept_bytes) / MIB


def interleave(
    runs: dict[str, Callable], arguments: argparse.Namespace
) -> tuple[dict[str, list[float]], dict[str, str]]:
    """Seconds of each run, interleaved in rounds, and the reasons of those that failed.

    The first round is a warm-up; when time is up, the first timed round is the last.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    failures: dict[str, str] = {}
    for i_round in range(arguments.rounds + 1):
        if i_round > 1 and time.monotonic() > arguments.end:
            break
        for name, run in runs.items():
            if name in failures:
                continue
            try:
                elapsed = time_once(run, arguments.device)
            except Exception as error:
                failures[name] = in_a_line(error)
                torch.cuda.empty_cache()
                continue
            if i_round:
                seconds[name].append(elapsed)
    return seconds, failures


def time_once(run: Callable[[], Any], device: str) -> float:
    if device != "cuda":
        start = time.perf_counter()
        run()
        return time.perf_counter() - start
    start, stop = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    start.record()
    run()
    stop.record()
    torch.cuda.synchronize()
    return start.elapsed_time(stop) / 1e3


def summarize(seconds: list[float]) -> dict:
    return {
        "milliseconds": statistics.median(seconds) * 1e3,
        "milliseconds_min": min(seconds) * 1e3,
        "milliseconds_max": max(seconds) * 1e3,
    }


def measure_ceilings(case: Case) -> dict[str, float]:
    """Throughput of the library's GEMM in TFLOP/s, and of a copy in TB/s, on this machine."""
    rows = case.input[:4096]
    device = case.input.device.type
    flops = 2 * rows.numel() * len(case.weight)
    products = {"gemm_tflops_bf16_out": lambda: torch.mm(rows, case.weight.t())}
    if device == "cuda":
        products["gemm_tflops_fp32_out"] = lambda: torch.mm(
            rows, case.weight.t(), out_dtype=torch.float32
        )
    found = {name: flops / best(run, device) / 1e12 for name, run in products.items()}
    moved = 2 * case.weight.nbytes
    found["copy_tb_per_second"] = moved / best(lambda: case.weight.clone(), device) / 1e12
    return found


def best(run: Callable[[], Any], device: str) -> float:
    run()
    return min(time_once(run, device) for _ in range(5))


def report(arguments: argparse.Namespace, ceilings: list[dict], results: list[dict]) -> None:
    if arguments.device == "cuda":
        lines = missed(results)
        print("\ngoals missed:" if lines else "\nno goal missed", *lines, sep="\n  ")
    if not arguments.json:
        return
    folder, record = write(arguments, ceilings, results)
    name = arguments.name
    write_plot(record, folder / f"{name}.png")
    print(f"\nwritten to {folder}: {name}.json, {name}.md, {name}.png")


def write(
    arguments: argparse.Namespace, ceilings: list[dict], results: list[dict]
) -> tuple[Path, dict[str, Any]]:
    """Write the numbers and their table; returns their folder and the numbers."""
    folder, machine = (
        results_folder(arguments.results, arguments.device),
        describe_machine(arguments.device),
    )
    record = {
        **machine,
        "rounds": arguments.rounds,
        "ceilings": ceilings,
        "results": results,
        # goals exist for a GPU only
        "missed_goals": missed(results) if arguments.device == "cuda" else [],
    }
    name = arguments.name
    (folder / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")
    heading = f"# The head on {machine['device']}, {machine['date']}, torch {machine['torch']}\n\n"
    (folder / f"{name}.md").write_text(heading + table(results, markdown=True) + "\n")
    return folder, record


if __name__ == "__main__":
    main()
