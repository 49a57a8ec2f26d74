"""Whether two checkouts train to the same numbers: same_numbers.py ONE OTHER

Runs the default, SFT, DPO (packed, padded and in bfloat16), TDPO1, TDPO2, IPO and the whole TIS-DPO
recipe on the embedded model, on one CPU thread, in both checkouts. All numbers in all metrics.jsonl
and weights files must be bitwise equal, except rates and memory. If not, exits with 1 and the names
of the runs that differ.
"""

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

COMMON = (
    *("n_examples=64", "n_eval_examples=32", "batch_size=16", "eval_every=32"),
    *("sample_during_eval=false", "model.fsdp_policy_mp=null", "minimum_log_interval_secs=0"),
)
RUNS: dict[str, tuple[str, ...]] = {
    "default": ("n_examples=128", "n_eval_examples=32", "minimum_log_interval_secs=0"),
    "sft": (*COMMON, "loss=sft"),
    "dpo": (*COMMON, "loss=dpo"),
    "padded": (*COMMON, "loss=dpo", "packing.enabled=false"),
    "bfloat16": (*COMMON, "loss=dpo", "model.fsdp_policy_mp=bfloat16"),
    "tdpo1": (*COMMON, "loss=tdpo", "loss.if_tdpo2=false"),
    "tdpo2": (*COMMON, "loss=tdpo"),
    "ipo": (*COMMON, "loss=ipo"),
    "tisdpo": (*COMMON, "recipe=tisdpo_d", "stages.contrast_n_epochs=1", "loss.token_level=true"),
}
LEFT_OUT = ("examples_per_second", "tokens_per_second", "peak_memory_gib")


def train(root: Path, options: tuple[str, ...], folder: Path) -> dict[str, list[Any]]:
    """Run a checkout's train.py in `folder`; returns all numbers of its results, by file."""
    environment = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(root), str(root / "kernels")]),
        "OMP_NUM_THREADS": "1",
        "HF_DATASETS_CACHE": str(folder.parent / "cache"),
    }
    command = [sys.executable, str(root / "train.py"), *options, f"run_dir={folder}"]
    done = subprocess.run(
        command, env=environment, cwd=folder.parent, capture_output=True, text=True
    )
    if done.returncode:
        sys.exit(
            f"{root}: {' '.join(options)} ended with {done.returncode}:\n{done.stderr[-2000:]}"
        )
    found = [*folder.rglob("metrics.jsonl"), *folder.glob("weights/*/*.jsonl")]
    return {str(path.relative_to(folder)): read_numbers(path) for path in sorted(found)}


def read_numbers(path: Path) -> list[dict[str, Any]]:
    """Records of a JSON Lines file, without what depends on the machine."""
    return [
        {key: value for key, value in json.loads(line).items() if key not in LEFT_OUT}
        for line in path.read_text(encoding="utf-8").splitlines()
    ]


def main(one: str, other: str) -> None:
    roots = Path(one).resolve(), Path(other).resolve()
    different = []
    for name, options in RUNS.items():
        with tempfile.TemporaryDirectory() as first, tempfile.TemporaryDirectory() as second:
            folders = Path(first) / "run", Path(second) / "run"
            numbers = [train(r, options, f) for r, f in zip(roots, folders, strict=True)]
        same = numbers[0] == numbers[1] and all(numbers[0].values())
        print(f"{name:10} {'same' if same else 'DIFFERENT'}", flush=True)
        different += [] if same else [name]
    sys.exit(f"different: {', '.join(different)}" if different else 0)


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit(__doc__)
    main(*sys.argv[1:])
