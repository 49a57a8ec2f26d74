"""DPO training steps compared with TRL's DPOTrainer on the same pairs: tokens/s and memory.

    python benchmarks/bench_train_step.py --model MODEL_FOLDER --data FOLDER/NAME --json
    python benchmarks/bench_train_step.py --shape qwen2.5-0.5b --law UF --json      # on a GPU
    python benchmarks/bench_train_step.py --model MODEL_FOLDER --data FOLDER/NAME --rank 16 --json

With --rank both train adapters (TRL with peft), from the same initial values.

Every arm runs in a fresh process, interleaved in several rounds; the first two steps of each run
are a warm-up. Float32 master weights and bfloat16 compute in both systems (--dtype float32 for CPUs
without bfloat16 units), AdamW, constant learning rate, no dropout, the same number of threads.
Before any timing both systems train a tiny model in float32 and must agree in loss, gradient norm
and weights to a relative 1e-5, and in each weight matrix to 5e-5.

The headline is real policy tokens per second: prompt + chosen + prompt + rejected of each pair,
regardless of how many tokens were computed.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import describe_machine, results_folder
from train_arms import config_of, run_fastpref, run_trl, write_start
from train_cases import LAWS, SHAPES, write_ids, write_random_model, write_random_rows

ROOT = Path(__file__).resolve().parents[1]
WARM_UP_STEPS = 2
ARMS = {
    "T1": "TRL, no activation checkpointing, reference online",
    "T2": "TRL, reference precomputed",
    "T6": "TRL, reference precomputed, batches of like length",
    "F0": "fastpref, padded, reference online",
    "F1": "fastpref, packed, reference online",
    "F3": "fastpref, packed, prompts shared, reference online",
    "F4": "fastpref, packed, prompts shared, reference beforehand",
}
GATE_TOLERANCE = {"losses": 1e-5, "grad_norms": 1e-5, "weights": 1e-5, "a_matrix": 5e-5}
"""Relative tolerances; `weights` is for all weights together, `a_matrix` for the matrix with the
largest error. AdamW normalizes gradients near zero, which amplifies rounding in the weights."""


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        job = json.loads(Path(arguments.child).read_text())
        run = run_trl if job["arm"].startswith("T") else run_fastpref
        print("RESULT " + json.dumps(run(job)))
        return
    from fastpref.cli.command_line import set_allocators
    from fastpref.distributed import init_world

    # as the command line does; the same for all arms, which inherit the environment
    set_allocators()
    world = init_world()
    with tempfile.TemporaryDirectory() as folder:
        gate = check_equality(world, Path(folder), arguments.rank)
        case = prepare_case(arguments, world, Path(folder))
        rounds = []
        for i_round in range(arguments.rounds):
            # T F F T: neither system always runs second, on a warmer machine
            arms = arguments.arms if i_round % 2 == 0 else arguments.arms[::-1]
            rounds += [measure(case | {"arm": arm}, Path(folder)) for arm in arms]
        profile = []
        if arguments.profile:
            # a separate run, as profiling slows steps down
            profiled = case | {"arm": "F3", "steps": WARM_UP_STEPS + 1, "profile": True}
            profile = measure(profiled, Path(folder))["profile"]
    report(arguments, case, gate, rounds, profile)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, help="folder of a real model")
    parser.add_argument("--data", type=Path, help="folder of real rows with a train split")
    parser.add_argument("--shape", choices=list(SHAPES), help="a model of random weights")
    parser.add_argument("--law", choices=list(LAWS), default="UF", help="lengths of random rows")
    parser.add_argument("--arms", nargs="+", choices=list(ARMS), default=list(ARMS))
    parser.add_argument("--pairs", type=int, default=8, help="per optimizer step")
    parser.add_argument("--micro-batches", type=int, default=1, help="of a padded step")
    parser.add_argument("--max-tokens", default="auto", help="of a packed micro-batch: N or auto")
    parser.add_argument("--steps", type=int, default=8, help="per arm and round, 2 not counted")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--max-length", type=int, default=512)
    parser.add_argument("--rank", type=int, help="of adapters; all weights are trained without")
    parser.add_argument("--compile", default="false", help="of fastpref: true, false or auto")
    parser.add_argument("--liger", default="auto", help="of fastpref: true, false or auto")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", action="store_true", help="write to the results folder")
    parser.add_argument("--profile", action="store_true", help="and where an F3 step's time goes")
    parser.add_argument("--name", help="of the files written; the rows' name unless given")
    parser.add_argument("--results", type=Path, default=Path(__file__).parent / "results")
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.child and bool(arguments.shape) == bool(arguments.model):
        parser.error("give --model and --data, or --shape")
    if arguments.model and not arguments.data:
        parser.error("--model needs --data")
    if arguments.steps <= WARM_UP_STEPS:
        parser.error(f"--steps must be > {WARM_UP_STEPS}, which are not counted")
    return arguments


def prepare_case(arguments: argparse.Namespace, world: Any, folder: Path) -> dict[str, Any]:
    """Write model, rows and ids of the comparison; returns the case."""
    if arguments.shape:
        model, rows = folder / "model", folder / "rows" / arguments.law
        write_random_model(arguments.shape, model)
        num_rows = arguments.pairs * arguments.steps * 2
        write_random_rows(arguments.law, SHAPES[arguments.shape]["vocab_size"], num_rows, rows)
    else:
        model, rows = arguments.model.resolve(), arguments.data.resolve()
    case = {
        "model": str(model),
        "data": str(rows.parent),
        "name": rows.name,
        "pairs": arguments.pairs,
        "micro_batches": arguments.micro_batches,
        "max_tokens": arguments.max_tokens,
        "steps": arguments.steps,
        "max_length": arguments.max_length if arguments.model else 2048,
        "dtype": arguments.dtype,
        "rank": arguments.rank,
        "compile": arguments.compile,
        "liger": arguments.liger,
        "lr": 1e-6,
        "ids": str(folder / f"{rows.name}.jsonl"),
    }
    write_ids(config_of(case, folder / "unused"), world, arguments.steps, Path(case["ids"]))
    return case


def check_equality(world: Any, folder: Path, rank: int | None) -> dict[str, float]:
    """Train a tiny model, or adapters of this rank, in float32 with both systems.

    Returns:
        Largest relative differences of loss, gradient norm and weights.

    Raises:
        SystemExit: one exceeds its tolerance: the systems do not compute the same.
    """
    write_random_model("tiny", folder / "tiny")
    write_random_rows("UF", SHAPES["tiny"]["vocab_size"], 32, folder / "gate" / "words")
    case = {
        "model": str(folder / "tiny"),
        "data": str(folder / "gate"),
        "name": "words",
        "pairs": 8,
        "micro_batches": 1,
        "max_tokens": 8192,
        "steps": 3,
        "max_length": 512,
        "dtype": "float32",
        "rank": rank,
        "lr": 1e-3,
        "ids": str(folder / "gate.jsonl"),
    }
    write_ids(config_of(case, folder / "unused"), world, case["steps"], Path(case["ids"]))
    if rank:
        case["start"] = str(folder / "start.safetensors")
        write_start(case, world, Path(case["start"]))
    runs = {
        arm: measure(case | {"arm": arm, "weights": str(folder / f"{arm}.safetensors")}, folder)
        for arm in ("T1", "F3")
    }
    import torch
    from safetensors.torch import load_file

    theirs, ours = (load_file(str(folder / f"{arm}.safetensors")) for arm in ("T1", "F3"))
    gate = {
        name: max(
            abs(a - b) / abs(a) for a, b in zip(runs["T1"][name], runs["F3"][name], strict=True)
        )
        for name in ("losses", "grad_norms")
    }
    norms = torch.tensor(
        [
            [(ours[name].float() - weight.float()).norm(), weight.float().norm()]
            for name, weight in theirs.items()
            if name in ours
        ]
    )
    differences, sizes = norms.unbind(1)
    gate["weights"] = (differences.norm() / sizes.norm()).item()
    gate["a_matrix"] = (differences / sizes).max().item()
    print("equality gate, relative differences:", gate)
    if any(gate[name] > bound for name, bound in GATE_TOLERANCE.items()):
        sys.exit(f"the two systems do not compute the same: {gate}")
    return gate


def measure(job: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Run an arm in a fresh process."""
    path = folder / "job.json"
    path.write_text(json.dumps(job))
    # keep the caller's PYTHONPATH, after ours: installed packages may depend on it
    paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
    paths += filter(None, [os.environ.get("PYTHONPATH")])
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join(paths),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    command = [sys.executable, __file__, "--child", str(path)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder)
    lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
    if done.returncode or not lines:
        sys.exit(f"{job['arm']} failed:\n{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
    result = json.loads(lines[-1].removeprefix("RESULT "))
    result |= {"arm": job["arm"], "tokens_per_second": rate(result)}
    print(
        f"{job['arm']}: {result['tokens_per_second']:8.1f} tokens/s"
        f"{result['peak_memory_gib']:8.2f} GiB   {ARMS[job['arm']]}",
        *(f"\n    {line}" for line in result.get("memory", [])),
        flush=True,
    )
    return result


def rate(result: dict[str, Any]) -> float:
    """Real policy tokens per second over the steps after the warm-up."""
    seconds, tokens = (result[name][WARM_UP_STEPS:] for name in ("seconds", "tokens"))
    return sum(tokens) / sum(seconds) if seconds else float("nan")


def report(
    arguments: argparse.Namespace,
    case: dict[str, Any],
    gate: dict[str, float],
    rounds: list[dict[str, Any]],
    profile: list[dict[str, Any]],
) -> None:
    """Table of medians over rounds with the ratios to T1 and T2, and the JSON."""
    by_arm = {arm: [run for run in rounds if run["arm"] == arm] for arm in arguments.arms}
    arms = {arm: medians(runs) for arm, runs in by_arm.items()}
    lines = [*table(arms), *table_of_profile(profile)]
    print("\n".join(["", *lines]))
    if arguments.json:
        record = {"gate": gate, "arms": arms, "runs": rounds, "profile": profile}
        write(arguments, case, record, lines)


def medians(runs: list[dict[str, Any]]) -> dict[str, float]:
    """Medians over the rounds of an arm."""
    rates = [run["tokens_per_second"] for run in runs]
    return {
        "tokens_per_second": statistics.median(rates),
        "tokens_per_second_min": min(rates),
        "tokens_per_second_max": max(rates),
        "peak_memory_gib": statistics.median(run["peak_memory_gib"] for run in runs),
    }


def table(arms: dict[str, dict[str, float]]) -> list[str]:
    """One line per arm, with ratios to TRL's arms if they ran."""

    def ratio(name: str, arm: str, peer: str) -> str:
        return f"{arms[arm][name] / arms[peer][name]:.2f}" if peer in arms else ""

    lines = ["| arm | tokens/s (min - max) | x T1 | x T2 | GiB | x T1 | |", "|---" * 7 + "|"]
    for arm, row in arms.items():
        rate, memory = "tokens_per_second", "peak_memory_gib"
        lines.append(
            f"| {arm} | {row[rate]:.0f} ({row[f'{rate}_min']:.0f} - {row[f'{rate}_max']:.0f}) | "
            f"{ratio(rate, arm, 'T1')} | {ratio(rate, arm, 'T2')} | {row[memory]:.2f} | "
            f"{ratio(memory, arm, 'T1')} | {ARMS[arm]} |"
        )
    return lines


def table_of_profile(profile: list[dict[str, Any]]) -> list[str]:
    """One line per operation; empty without a profile."""
    if not profile:
        return []
    return [
        *("", "| operation of F3, its first steps included | calls | share of the time |"),
        "|---" * 3 + "|",
        *(f"| `{e['operation']}` | {e['calls']} | {e['share']:.1%} |" for e in profile),
    ]


def write(
    arguments: argparse.Namespace, case: dict[str, Any], record: dict[str, Any], lines: list[str]
) -> None:
    """Write the JSON and the tables to the results folder of this device."""
    folder, machine = results_folder(arguments.results), describe_machine()
    what = f"{arguments.shape}-{arguments.law}" if arguments.shape else case["name"]
    what = arguments.name or what
    keys = (
        *("pairs", "micro_batches", "max_tokens", "steps", "max_length", "lr"),
        *("dtype", "rank", "compile", "liger"),
    )
    record = {
        **machine,
        "model": arguments.shape or arguments.model.name,
        "case": {key: case[key] for key in keys},
        **record,
    }
    (folder / f"train-{what}.json").write_text(json.dumps(record, indent=1) + "\n")
    heading = f"# Training steps on {machine['device']}, {record['model']}, {what}, "
    text = f"{heading}{machine['date']}\n\n" + "\n".join(lines) + "\n"
    (folder / f"train-{what}.md").write_text(text)
    print(f"\nwritten to {folder}: train-{what}.json, train-{what}.md")


if __name__ == "__main__":
    main()
