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
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

from machine import RESULTS, describe_machine, results_folder
from train_arms import config_of, run_fastpref, run_trl
from train_cases import LAWS, SHAPES, write_ids, write_random_model, write_random_rows
from train_children import ARMS, WARM_UP_STEPS, Children, answer, is_peer
from train_gate import check_equality

SWITCH = ("true", "false", "auto")


def main() -> None:
    arguments = parse_arguments()
    if arguments.child:
        job = json.loads(Path(arguments.child).read_text())
        answer(job, run_trl if is_peer(job["arm"]) else run_fastpref)
        return
    from fastpref.cli.command_line import set_allocators
    from fastpref.distributed import init_world

    # as the command line does; the same for all arms, which inherit the environment
    set_allocators()
    world = init_world()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        children = Children(folder, arguments.seconds_budget)
        gate = check_equality(children, world, folder, arguments.rank)
        case = prepare_case(arguments, world, folder)
        rounds: list[dict[str, Any]] = []
        for i_round in range(arguments.rounds):
            # T F F T: neither system always runs second, on a warmer machine
            for arm in arguments.arms if i_round % 2 == 0 else arguments.arms[::-1]:
                rounds.append(children.outcome(case | {"arm": arm}))
                # the end of the machine's time must not take what is measured
                report(arguments, case, gate, rounds, [])
        profile = []
        if arguments.profile:
            # a separate run, as profiling slows steps down
            profiled = case | {"arm": "F3", "steps": WARM_UP_STEPS + 1, "profile": True}
            profile = children.outcome(profiled).get("profile", [])
    print("\n".join(["", *report(arguments, case, gate, rounds, profile)]))
    if any("failure" in run and not is_peer(run["arm"]) for run in rounds):
        sys.exit("fastpref failed, see above")


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
    parser.add_argument("--compile", choices=SWITCH, default="false", help="of fastpref")
    parser.add_argument("--liger", choices=SWITCH, default="auto", help="of fastpref")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--json", action="store_true", help="write to the results folder")
    parser.add_argument("--profile", action="store_true", help="and where an F3 step's time goes")
    parser.add_argument("--name", help="of the files written; from rows and options unless given")
    parser.add_argument("--seconds-budget", type=float, help="end after; no end unless given")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if not arguments.child and bool(arguments.shape) == bool(arguments.model):
        parser.error("give --model and --data, or --shape")
    if arguments.model and not arguments.data:
        parser.error("--model needs --data")
    for folder in filter(None, (arguments.model, arguments.data)):
        # here, not after the minutes of the equality gate
        if not folder.is_dir():
            parser.error(f"no folder {folder}")
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


def report(
    arguments: argparse.Namespace,
    case: dict[str, Any],
    gate: dict[str, Any],
    rounds: list[dict[str, Any]],
    profile: list[dict[str, Any]],
) -> list[str]:
    """Lines of medians over rounds with the ratios to T1 and T2; with --json written too."""
    by_arm: dict[str, list[dict[str, Any]]] = {arm: [] for arm in arguments.arms}
    for run in rounds:
        if "tokens_per_second" in run:
            by_arm[run["arm"]].append(run)
    arms = {arm: medians(runs) for arm, runs in by_arm.items() if runs}
    lines = [*table(arms), *table_of_profile(profile)]
    if arguments.json:
        record = {"gate": gate, "arms": arms, "runs": rounds, "profile": profile}
        write(arguments, case, record, lines)
    return lines


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
    what = arguments.name or name_of(arguments, case["name"])
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
    print(f"written to {folder}: train-{what}.json, train-{what}.md", flush=True)


def name_of(arguments: argparse.Namespace, rows: str) -> str:
    """Name of the files of a run, distinct for runs to be compared."""
    of_case = f"{arguments.shape}-{arguments.law}" if arguments.shape else rows
    compiled = {"false": "", "true": "-compiled"}.get(arguments.compile, "-compile-auto")
    return of_case + "-lora" * bool(arguments.rank) + compiled


if __name__ == "__main__":
    main()
