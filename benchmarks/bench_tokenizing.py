"""Time to check and tokenize 100,000 dialogues, with a cold and with a warm cache.

    python benchmarks/bench_tokenizing.py --model FOLDER --data FOLDER [--rows 100000] [--json]

The rows of FOLDER/train.jsonl(.gz) are repeated, each with a number in its prompt so that all
prompts differ. `task=audit` reads, checks, tokenizes and counts them in a fresh process, imports
included: with one tokenizing process and with one per core, each first without a cache and then
with it.
"""

import argparse
import itertools
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import write_results
from train_cases import read_rows

ROOT = Path(__file__).resolve().parents[1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a tokenizer")
    parser.add_argument("--data", type=Path, required=True, help="folder of dialogues")
    parser.add_argument("--rows", type=int, default=100_000)
    parser.add_argument("--json", action="store_true", help="write to the results folder")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_rows(arguments.data, folder / "data" / "dialogues", arguments.rows)
        found = {
            num_proc: [audit(arguments.model, folder, num_proc) for _ in range(2)]
            for num_proc in ("1", "auto")
        }
    for num_proc, (first, second) in found.items():
        print(f"data.num_proc={num_proc}: {first:.1f} s, again {second:.1f} s")
    if arguments.json:
        record = {"rows": arguments.rows, "seconds_first_and_second": found}
        write_results("tokenizing", record, device="cpu")


def write_rows(source: Path, folder: Path, num_rows: int) -> None:
    """Write `num_rows` training rows with distinct prompts, cycling the source; 64 test rows."""
    [path] = source.glob("train.jsonl*")
    rows = read_rows(path)
    folder.mkdir(parents=True)
    for split, length in (("train", num_rows), ("test", 64)):
        with (folder / f"{split}.jsonl").open("w") as file:
            for number, row in enumerate(itertools.islice(itertools.cycle(rows), length)):
                numbered = {
                    side: row[side].replace("Human:", f"Human: {number}", 1)
                    for side in ("chosen", "rejected")
                }
                file.write(json.dumps(numbered) + "\n")


def audit(model: Path, folder: Path, num_proc: str) -> float:
    """Run `task=audit`; returns its wall time in seconds."""
    options = {
        "task": "audit",
        "datasets": "[dialogues]",
        "base_data_dir": folder / "data",
        "model": "blank_model",
        "model.name_or_path": model.resolve(),
        "data.cache_dir": folder / f"cache-{num_proc}",
        "data.num_proc": num_proc,
    }
    command = [sys.executable, str(ROOT / "train.py"), *(f"{k}={v}" for k, v in options.items())]
    start = time.perf_counter()
    subprocess.run(command, check=True, capture_output=True)
    return time.perf_counter() - start


if __name__ == "__main__":
    main()
