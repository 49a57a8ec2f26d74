"""What saving costs a run: the same steps with a checkpoint among them and without.

    python benchmarks/bench_checkpoint.py --model MODEL_FOLDER --data FOLDER/NAME --json

Two runs of DPO on the same rows, one after the other in one process. The first saves once, beside
the training; what its steps from there on take longer than the other's, the standstill included, is
the cost, given as a share of the time from one checkpoint to the next.
"""

import argparse
import json
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe_machine, results_folder
from train_arms import config_of, read_lines

WARM_UP_STEPS = 2
SAVED_AT, STEPS = 7, 12
"""Steps until the checkpoint, and in all: it is written by then."""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a model")
    parser.add_argument("--data", type=Path, required=True, help="folder of rows, train split")
    parser.add_argument("--every", type=int, default=50, help="steps from checkpoint to checkpoint")
    parser.add_argument("--pairs", type=int, default=8, help="per optimizer step")
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--mode", choices=["async", "sync"], default="async")
    parser.add_argument("--json", action="store_true", help="write to the results folder")
    arguments = parser.parse_args()
    result = measure(arguments)
    print(json.dumps(result, indent=1))
    if arguments.json:
        write(result)


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """Train, and read the cost off the run's own numbers."""
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
        seconds = {}
        for every in (SAVED_AT, 0):
            run_dir = Path(folder) / f"every-{every}"
            train(config_for(arguments, run_dir, every), world)
            seconds[every] = seconds_of_steps(run_dir, arguments.pairs)
    longer = seconds[SAVED_AT] - seconds[0]
    before, after = longer[WARM_UP_STEPS:SAVED_AT], longer[SAVED_AT:]
    usual = seconds[0][WARM_UP_STEPS:].mean()
    first = reports[0]
    return {
        "model": arguments.model.name,
        "mode": arguments.mode,
        "every": arguments.every,
        "pairs": arguments.pairs,
        "seconds_of_a_step": usual,
        "checkpoint_gib": first.num_bytes / 2**30,
        "standstill_seconds": first.standstill_seconds,
        "write_seconds": first.write_seconds,
        "cost_seconds": after.sum(),
        "cost_share": after.sum() / (usual * arguments.every),
        # of as many steps that nothing was saved in
        "noise_seconds": before.std() * len(after) ** 0.5,
        "drift_seconds": before.mean() * len(after),
    }


def config_for(arguments: argparse.Namespace, run_dir: Path, every: int) -> Any:
    """A run of some steps."""
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
    """Wall time of each step, with what stood between it and the one before."""
    records = read_lines(run_dir / "metrics.jsonl")
    return np.array([pairs / record["examples_per_second"] for record in records])


def write(result: dict[str, Any]) -> None:
    """To `results/<device>/checkpoint.json`."""
    path = results_folder(Path(__file__).parent / "results") / "checkpoint.json"
    path.write_text(json.dumps(describe_machine() | result, indent=1) + "\n")


if __name__ == "__main__":
    main()
