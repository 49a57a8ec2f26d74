"""Runs of the command line within a test's process, stopped after some steps, and their ends."""

import json
import os
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import train
from fastpref.checkpoint.manifest import read_manifest
from fastpref.cli.command_line import main
from fastpref.train import loop

OF_THE_MACHINE = ("examples_per_second", "tokens_per_second", "peak_memory_gib")


def run(arguments: list[str]) -> int:
    """The command line, within this process; its exit code."""
    if "RANK" in os.environ:
        # torch keeps the store of a process's first start on its port; others from below those
        # that the system gives to connections
        port = int(os.environ["MASTER_PORT"]) + 1
        os.environ["MASTER_PORT"] = str(20_000 + port % 10_000)
    return main(arguments, train.compose_choices, train.CONFIG_DIR)


def small_command(base: Path, run_dir: Path, *options: str) -> list[str]:
    """DPO of the tiny model in `base` on its rows `words`, in float32, eight rows a step, every
    step logged; of an option that is given again the last value counts."""
    return [
        *("model=blank_model", f"model.name_or_path={base / 'model'}", "model.fsdp_policy_mp=null"),
        *("datasets=[words]", f"base_data_dir={base}", f"run_dir={run_dir}", "loss=dpo"),
        *("max_length=64", "max_prompt_length=32", "batch_size=8", "n_epochs=null", "lr=1e-3"),
        *("n_eval_examples=8", "eval_batch_size=8", "sample_during_eval=false"),
        *("minimum_log_interval_secs=0", "checkpoint.every=0", *options),
    ]


@contextmanager
def stopping_after(num_steps: int) -> Iterator[None]:
    """A scheduler that takes the machine away after some steps of a start."""
    real, done = loop.train_step, []

    def train_step(*args: Any) -> Any:
        result = real(*args)
        done.append(result)
        if len(done) == num_steps:
            signal.raise_signal(signal.SIGTERM)
        return result

    loop.train_step = train_step
    try:
        yield
    finally:
        loop.train_step = real


def lines_of(run_dir: Path) -> list[dict[str, Any]]:
    """Records of the metrics, but for times."""
    lines = (run_dir / "metrics.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    return [{k: v for k, v in record.items() if k not in OF_THE_MACHINE} for record in records]


def last_state(run_dir: Path) -> dict[str, Any]:
    """Digests of all that the last checkpoint holds, and its record."""
    folder = max((run_dir / "checkpoints").glob("step-*"))
    assert folder.name == f"step-{lines_of(run_dir)[-1]['step']:08d}"
    files = dict(read_manifest(folder).files)
    # paths and times are in these two
    del files["state.json"], files[".metadata"]
    state = json.loads((folder / "state.json").read_text())
    return files | {name: state[name] for name in ("optimizer", "scheduler")}


def assert_same_end(
    ours: Path,
    expected: Path,
    *,
    files: Sequence[str] = ("samples.jsonl", "LATEST/model.safetensors"),
    untold: Sequence[str] = (),
) -> None:
    """Bit for bit, but for metrics that `ours` cannot tell."""
    told = [{k: v for k, v in x.items() if k not in untold} for x in lines_of(expected)]
    assert lines_of(ours) == told
    assert last_state(ours) == last_state(expected)
    for name in files:
        assert (ours / name).read_bytes() == (expected / name).read_bytes(), name


def run_in_starts(command: list[str], steps_of_starts: int) -> list[int]:
    """A run that is stopped again and again, after as many steps each time; the exit codes."""
    codes = []
    while not codes or codes[-1] == 75:
        with stopping_after(steps_of_starts):
            codes.append(run([*command, "resume=auto"]))
    return codes
