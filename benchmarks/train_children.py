"""The arms of `bench_train_step`, each in a fresh process that ends with the benchmark's time."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

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


class ArmError(Exception):
    """An arm has no result; the message says why."""


class AbsentError(ArmError):
    """An arm's library is not installed, or the time was over before the arm had ended."""


class Children:
    """Runs arms in processes of their own, one after another, each for half of the time left."""

    def __init__(self, folder: Path, seconds: float | None) -> None:
        self._folder = folder
        self._end = None if seconds is None else time.monotonic() + seconds

    def measure(self, job: dict[str, Any]) -> dict[str, Any]:
        """Run an arm.

        Raises:
            AbsentError: its library is missing, or the time is over.
            ArmError: it failed.
        """
        left = None if self._end is None else self._end - time.monotonic()
        if left is not None and left <= 0:
            raise AbsentError("the time is over")
        path = self._folder / "job.json"
        path.write_text(json.dumps(job))
        command = [sys.executable, str(ROOT / "benchmarks" / "bench_train_step.py")]
        command += ["--child", str(path)]
        try:
            done = subprocess.run(
                command,
                capture_output=True,
                text=True,
                env=self._environment(),
                cwd=self._folder,
                # one that hangs leaves time for the others
                timeout=None if left is None else left / 2,
            )
        except subprocess.TimeoutExpired as expired:
            raise AbsentError(f"the time is over\n{_last_lines(expired.stderr)}") from None
        results = answers(done.stdout, "RESULT ")
        if done.returncode or not results:
            for reason in answers(done.stdout, "ABSENT "):
                raise AbsentError(reason)
            raise ArmError(f"{done.stdout[-2000:]}\n{done.stderr[-4000:]}")
        result = results[-1]
        result |= {"arm": job["arm"], "tokens_per_second": rate(result)}
        print(
            f"{job['arm']}: {result['tokens_per_second']:8.1f} tokens/s"
            f"{result['peak_memory_gib']:8.2f} GiB   {ARMS[job['arm']]}",
            *(f"\n    {line}" for line in result.get("memory", [])),
            flush=True,
        )
        return result

    def outcome(self, job: dict[str, Any]) -> dict[str, Any]:
        """The result of an arm, or under "absent" or "failure" why it has none."""
        try:
            return self.measure(job)
        except ArmError as error:
            kind = "absent" if isinstance(error, AbsentError) else "failure"
            print(f"{job['arm']}, {kind}: {error}", flush=True)
            return {"arm": job["arm"], kind: str(error)}

    def _environment(self) -> dict[str, str]:
        # keep the caller's PYTHONPATH, after ours: installed packages may depend on it
        paths = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]
        paths += filter(None, [os.environ.get("PYTHONPATH")])
        return os.environ | {
            "PYTHONPATH": os.pathsep.join(paths),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            # what arms leave goes with the folder
            "TMPDIR": str(self._folder),
        }


def answer(job: dict[str, Any], run: Callable[[dict[str, Any]], dict[str, Any]]) -> None:
    """In an arm's process: print its result, or that a peer's library is missing."""
    try:
        print("RESULT " + json.dumps(run(job)))
    except ImportError as error:
        if not is_peer(job["arm"]):
            raise
        print("ABSENT " + json.dumps(str(error)))
        sys.exit(1)


def answers(output: str, kind: str) -> list[Any]:
    lines = [line for line in output.splitlines() if line.startswith(kind)]
    return [json.loads(line.removeprefix(kind)) for line in lines]


def is_peer(arm: str) -> bool:
    return arm.startswith("T")


def rate(result: dict[str, Any]) -> float:
    """Real policy tokens per second over the steps after the warm-up."""
    seconds, tokens = (result[name][WARM_UP_STEPS:] for name in ("seconds", "tokens"))
    return sum(tokens) / sum(seconds) if seconds else float("nan")


def _last_lines(stderr: bytes | str | None) -> str:
    # bytes, whatever `text` says (python/cpython#87597)
    text = stderr.decode(errors="replace") if isinstance(stderr, bytes) else stderr or ""
    return text[-4000:]
