"""Overhead of saving checkpoints: the same training steps with and without saves.

    python benchmarks/bench_checkpoint.py --model MODEL_FOLDER --data FOLDER/NAME --json

DPO runs on the same rows, one after another in one process; every second run saves twice during
training. The cost of a save is the additional time of the steps during it, blocking time included,
compared with the same steps of the runs before and after; it is reported as a share of the time
between two checkpoints. A run's first save is reported separately: it touches the memory of the
copies for the first time. The first pair of runs is a warm-up.
"""

import argparse
import json
import shutil
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from machine import write_results
from train_arms import config_of
from train_cases import read_rows

WARM_UP_STEPS = 2
SAVE_EVERY, DURING = 5, 3
"""Steps between saves, and the most steps that an asynchronous save overlaps with."""
STEPS = 2 * SAVE_EVERY + DURING


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a model")
    parser.add_argument("--data", type=Path, required=True, help="folder of rows, train split")
    parser.add_argument("--every", type=int, default=50, help="steps from checkpoint to checkpoint")
    parser.add_argument("--repeats", type=int, default=2, help="runs that save and are counted")
    parser.add_argument("--pairs", type=int, default=8, help="per optimizer step")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--mode", choices=["async", "sync"], default="async")
    parser.add_argument("--json", action="store_true", help="write to the results folder")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(json.dumps(result, indent=1))
    if arguments.json:
        write_results("checkpoint", result)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, and compute the cost from the runs' own metrics."""
    from fastpref.checkpoint import store
    from fastpref.distributed import init_world
    from fastpref.train.task import train

    reports: list[Any] = []
    make = store.SaveReport

    def keep(**values: Any) -> Any:
        reports.append(make(**values))
        return reports[-1]

    store.SaveReport = keep
    world = init_world()
    with tempfile.TemporaryDirectory() as folder:
        runs = []
        for number in range(2 * arguments.repeats + 3):
            run_dir = Path(folder) / str(number)
            train(config_for(arguments, run_dir, SAVE_EVERY * (number % 2)), world)
            runs.append(seconds_of_steps(run_dir, arguments.pairs))
            shutil.rmtree(run_dir)
    seconds = np.array(runs[2:])
    usual = seconds[::2].mean(0)
    longer = seconds[1::2] - (seconds[:-2:2] + seconds[2::2]) / 2
    first = longer[:, SAVE_EVERY : SAVE_EVERY + DURING].sum(1)
    later = longer[:, 2 * SAVE_EVERY :].sum(1)
    idle = longer[:, WARM_UP_STEPS:SAVE_EVERY].sum(1)
    between = usual[WARM_UP_STEPS:].mean() * arguments.every
    saves = [report for report in reports if report.step == 2 * SAVE_EVERY][1:]
    return {
        "model": arguments.model.name,
        "mode": arguments.mode,
        "every": arguments.every,
        "pairs": arguments.pairs,
        "seconds_of_a_step": usual[WARM_UP_STEPS:].mean(),
        "checkpoint_gib": saves[0].num_bytes / 2**30,
        "standstill_seconds": [save.standstill_seconds for save in saves],
        "write_seconds": [save.write_seconds for save in saves],
        "first_cost_seconds": first.tolist(),
        "cost_seconds": later.tolist(),
        "cost_share": later.mean() / between,
        "cost_share_standard_error": later.std(ddof=1) / len(later) ** 0.5 / between,
        # control: the same difference for the steps before the first save
        "nothing_seconds": idle.tolist(),
    }


def config_for(arguments: argparse.Namespace, run_dir: Path, every: int) -> Any:
    """Config of a run of `STEPS` steps that saves every `every` steps."""
    case = {
        "model": str(arguments.model.resolve()),
        "dtype": "bfloat16",
        "name": arguments.data.resolve().name,
        "data": str(arguments.data.resolve().parent),
        "pairs": arguments.pairs,
        "micro_batches": 1,
        "steps": STEPS,
        "lr": 1e-6,
        "max_length": arguments.max_length,
    }
    config = config_of(case, run_dir)
    config.checkpoint.every = every
    config.checkpoint.mode = arguments.mode
    return config


def seconds_of_steps(run_dir: Path, pairs: int) -> np.ndarray:
    """Wall time of each step, including the time since the step before."""
    records = read_rows(run_dir / "metrics.jsonl")
    return np.array([pairs / record["examples_per_second"] for record in records])


if __name__ == "__main__":
    main()
