"""Profile of a training step in one process: python benchmarks/profile_step.py --shape qwen2.5-0.5b

DPO on random rows with a random model, like the arms F3 and F4 of `bench_train_step.py`: packed,
prompts shared, the reference online or precomputed (--reference cache). Steps are timed one by one;
the last one is profiled.
Prints real policy tokens per second, the share of time that the device is busy, kernel launches,
and the profiled step's device time (on a CPU: CPU time) by part and by operation.
MFU is as in metrics.jsonl: see `fastpref.train.logs.utilization`.
"""

import argparse
import tempfile
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from machine import RESULTS, write_results
from torch.autograd import DeviceType
from train_arms import config_of, now, without_saving
from train_cases import LAWS, MAX_LENGTH, SHAPES, read_rows, write_random_model, write_random_rows

from fastpref.cli.run import configure_logging
from fastpref.distributed import init_world
from fastpref.model import scorer
from fastpref.train import loop, step
from fastpref.train.task import train

WARM_UP_STEPS = 2
OF_AUTOGRAD = "autograd::engine::evaluate_function"
"""Prefix of the profiler's names of autograd nodes."""
HEAD_OPS = ("token_logps", "token_logps_and_kl", "tdpo1_token_values")


class Profile:
    """Times the steps of a run, and profiles the last one."""

    def __init__(self, num_steps: int) -> None:
        self._num_steps = num_steps
        self.seconds: list[float] = []
        self.profiled_seconds = 0.0
        self.events: list[Any] = []
        self.calls: list[Any] = []
        """Every call separately; `events` are aggregated by name."""

    def around(self, train_step: Callable[..., Any]) -> Callable[..., Any]:
        """Wrap the trainer's step to be timed, and in the last step profiled."""

        def timed(run: Any, batches: Any, number: int) -> Any:
            if number == self._num_steps - 1:
                return self._profiled(train_step, run, batches, number)
            result, seconds = clocked(train_step, run, batches, number)
            self.seconds.append(seconds)
            return result

        return timed

    def _profiled(self, train_step: Callable[..., Any], *arguments: Any) -> Any:
        with named_parts(), torch.profiler.profile() as profiler:
            result, self.profiled_seconds = clocked(train_step, *arguments)
        self.events, self.calls = list(profiler.key_averages()), list(profiler.events())
        return result


def clocked(function: Callable[..., Any], *arguments: Any) -> tuple[Any, float]:
    """A function's result, and its seconds, device work included."""
    start = now()
    result = function(*arguments)
    return result, now() - start


@contextmanager
def named_parts() -> Iterator[None]:
    """Label the parts of a step for the profiler."""

    def body_of(*_: Any) -> str:
        return "policy body" if torch.is_grad_enabled() else "reference body"

    places: list[tuple[Any, str, Callable[..., str]]] = [
        (scorer.TokenScorer, "hidden_states", body_of),
        *((scorer, name, lambda *_: "head") for name in HEAD_OPS),
        (torch.Tensor, "backward", lambda *_: "backward"),
        (step, "clip_gradients", lambda *_: "clipping"),
    ]
    before = [(holder, name, getattr(holder, name)) for holder, name, _ in places]
    for holder, name, label in places:
        setattr(holder, name, under_name(getattr(holder, name), label))
    try:
        yield
    finally:
        for holder, name, function in before:
            setattr(holder, name, function)


def under_name(function: Callable[..., Any], label: Callable[..., str]) -> Callable[..., Any]:
    """Wrap a function in a profiler range named by `label`."""

    def named(*arguments: Any, **options: Any) -> Any:
        with torch.profiler.record_function(f"part: {label(*arguments)}"):
            return function(*arguments, **options)

    return named


def summarize(profile: Profile, records: list[dict[str, Any]]) -> dict[str, Any]:
    """Results of the timed steps after the warm-up, and of the profiled one."""
    on_gpu = torch.cuda.is_available()
    total = "device_time_total" if on_gpu else "cpu_time_total"
    own = "self_device_time_total" if on_gpu else "self_cpu_time_total"
    counted = range(WARM_UP_STEPS, len(profile.seconds))
    tokens = [record["tokens_per_second"] / record["examples_per_second"] for record in records]
    seconds = sum(profile.seconds[i] for i in counted)
    pairs = records[0]["counters/examples"]
    calls = [event for event in profile.events if event.device_type == DeviceType.CPU]
    # the device time of a kernel is also included in that of the CPU call that launched it
    kernels = [e for e in profile.events if e not in calls and not e.is_user_annotation]
    computing = kernels if on_gpu else [e for e in calls if not e.key.startswith("part: ")]
    parts = {
        event.key.removeprefix("part: "): getattr(event, total) / 1e6
        for event in calls
        if event.key.startswith("part: ")
    }
    parts["backward"] += backward_apart(profile.calls, total)
    own_names = {
        "optimizer": lambda key: key.startswith("Optimizer.step#"),
        "of it the head's backward": lambda key: key.startswith("fastpref::") and "bwd" in key,
    }
    for part, is_part in own_names.items():
        parts[part] = sum(getattr(e, total) for e in calls if is_part(e.key)) / 1e6
    busy = sum(getattr(event, own) for event in kernels) / 1e6
    launches = sum(event.count for event in calls if "LaunchKernel" in event.key)
    mean = seconds / len(counted)
    return {
        "tokens_per_second": sum(tokens[i] for i in counted) * pairs / seconds,
        "mfu": records[-2].get("mfu"),
        "seconds_per_step": mean,
        "seconds_profiled": profile.profiled_seconds,
        "device_busy_share": busy / mean if on_gpu else None,
        "launches": launches if on_gpu else None,
        "operator_calls": sum(e.count for e in calls if e.key.startswith("aten::")),
        "seconds_by_part": parts,
        "most": [
            {"operation": event.key, "calls": event.count, "seconds": getattr(event, own) / 1e6}
            for event in sorted(computing, key=lambda event: -getattr(event, own))[:25]
        ],
    }


def backward_apart(calls: Iterable[Any], total: str) -> float:
    """Seconds of backward work in autograd's own thread, as for a GPU: "part: backward" is in the
    main thread, and device time counts only for enclosing calls of the launching thread.

    Args:
        calls: The profiler's calls, not aggregated.
        total: Name of their attribute with the total time in microseconds.
    """
    outermost = (call for call in calls if call.cpu_parent is None)
    return sum(getattr(c, total) for c in outermost if c.name.startswith(OF_AUTOGRAD)) / 1e6


def main() -> None:
    arguments = parse_arguments()
    # log the choice of attention, micro-batch size and compilation
    configure_logging(is_main=True)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        rows = folder / "rows" / arguments.law
        write_random_model(arguments.shape, folder / "model")
        num_rows = arguments.pairs * arguments.steps
        write_random_rows(arguments.law, SHAPES[arguments.shape]["vocab_size"], num_rows, rows)
        case = {
            "model": str(folder / "model"),
            "data": str(rows.parent),
            "name": rows.name,
            "pairs": arguments.pairs,
            "micro_batches": 1,
            "steps": arguments.steps,
            "max_length": MAX_LENGTH,
            "dtype": arguments.dtype,
            "rank": arguments.rank,
            "lr": 1e-6,
        }
        config = config_of(case, folder / "run")
        config.packing.max_tokens = arguments.max_tokens
        config.reference.mode = arguments.reference
        config.reference.cache_dir = str(folder / "reference")
        config.compile, config.model.liger = str(arguments.compile).lower(), arguments.liger
        profile = Profile(arguments.steps)
        loop.train_step = profile.around(loop.train_step)
        with without_saving():
            train(config, init_world())
        found = summarize(profile, read_rows(folder / "run" / "metrics.jsonl"))
    report(arguments, found)


def report(arguments: argparse.Namespace, found: dict[str, Any]) -> None:
    """Print the results; with --json also write them."""
    for name in ("tokens_per_second", "mfu", "seconds_per_step", "seconds_profiled"):
        print(f"{name:20} {found[name]}")
    for name in ("device_busy_share", "launches", "operator_calls"):
        print(f"{name:20} {found[name]}")
    for part, seconds in found["seconds_by_part"].items():
        print(f"{part:26} {seconds:8.3f} s")
    for row in found["most"]:
        print(f"{row['seconds'] * 1e3:10.1f} ms {row['calls']:7} {row['operation'][:90]}")
    if arguments.json:
        options = {key: value for key, value in vars(arguments).items() if key != "results"}
        record = {"options": options, **found}
        write_results(file_name(arguments), record, results=arguments.results)


def file_name(arguments: argparse.Namespace) -> str:
    """Name of the results, distinct for runs to be compared."""
    kind = "-lora" * bool(arguments.rank) + "-cache" * (arguments.reference == "cache")
    kind += {False: "", True: "-compiled"}.get(arguments.compile, "-compile-auto")
    return f"profile-{arguments.shape}-{arguments.law}{kind}"


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=list(SHAPES), default="qwen2.5-0.5b")
    parser.add_argument("--law", choices=list(LAWS), default="UF", help="lengths of random rows")
    parser.add_argument("--pairs", type=int, default=64, help="per optimizer step")
    parser.add_argument("--steps", type=int, default=7, help="2 of warm-up, the last is profiled")
    parser.add_argument("--max-tokens", default="auto", help="of a micro-batch")
    parser.add_argument("--rank", type=int, help="of adapters; all weights are trained without")
    parser.add_argument("--dtype", choices=("bfloat16", "float32"), default="bfloat16")
    parser.add_argument("--reference", choices=("online", "cache"), default="online")
    switch = {"true": True, "false": False}
    parser.add_argument(
        "--compile",
        nargs="?",
        type=lambda text: switch.get(text, text),
        choices=(True, False, "auto"),
        const=True,
        default=False,
        help="true, false or auto",
    )
    parser.add_argument("--liger", choices=("auto", "true", "false"), default="auto")
    parser.add_argument("--json", action="store_true", help="write to the results folder")
    parser.add_argument("--results", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    if arguments.steps < WARM_UP_STEPS + 2:
        parser.error(f"--steps must be >= {WARM_UP_STEPS + 2}, got {arguments.steps}")
    return arguments


if __name__ == "__main__":
    main()
