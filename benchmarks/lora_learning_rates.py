"""DPO with LoRA at several learning rates, compared with full training at one.

    python benchmarks/lora_learning_rates.py --model MODEL_FOLDER --data FOLDER/NAME --json

One epoch over the same pairs in the same order for each, AdamW, rank 16, a constant learning rate
after warm-up over a tenth of the steps; held-out loss, reward accuracy and margin before and after.
"""

import argparse
import tempfile
from pathlib import Path
from typing import Any

from machine import write_results
from train_cases import read_rows
from train_command import run_train

RATES = (5e-6, 1e-5, 2e-5, 5e-5, 1e-4, 2e-4)
FULL_RATE = 5e-7
"""Learning rate for training all weights: the trainer's default."""
NUMBERS = ("loss/eval", "rewards_eval/accuracies", "rewards_eval/margins", "logps_eval/chosen")


def main() -> None:
    arguments = parse_arguments()
    rows = [learn(arguments, rate, adapter="lora") for rate in arguments.rates]
    if not arguments.no_full:
        rows.append(learn(arguments, FULL_RATE, adapter="none"))
    print("| what | lr |", " | ".join(NUMBERS), "|")
    for row in rows:
        numbers = " | ".join(f"{row['after'][name]:.4f}" for name in NUMBERS)
        print(f"| {row['adapter']} | {row['lr']:g} | {numbers} |")
    if arguments.json:
        record = {
            "model": arguments.model.name,
            "data": arguments.data.name,
            "pairs": arguments.pairs,
            "batch_size": arguments.batch_size,
            "max_length": arguments.max_length,
            "runs": rows,
        }
        write_results("lora_learning_rates", record)


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="folder of a model")
    parser.add_argument("--data", type=Path, required=True, help="folder of rows, both splits")
    parser.add_argument("--rates", type=float, nargs="+", default=list(RATES))
    parser.add_argument("--pairs", type=int, default=256, help="to train on")
    parser.add_argument("--held-out", type=int, default=64, help="pairs")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--max-length", type=int, default=256)
    parser.add_argument("--no-full", action="store_true", help="without training all weights")
    parser.add_argument("--json", action="store_true", help="write to the results folder")
    return parser.parse_args()


def learn(arguments: argparse.Namespace, rate: float, *, adapter: str) -> dict[str, Any]:
    """Train once; returns held-out metrics before and after."""
    with tempfile.TemporaryDirectory() as folder:
        run_dir = Path(folder) / "run"
        options = {
            "recipe": "dpo_lora",
            "adapter": adapter,
            "model": "blank_model",
            "model.name_or_path": arguments.model.resolve(),
            "model.fsdp_policy_mp": "null",
            "datasets": f"[{arguments.data.name}]",
            "base_data_dir": arguments.data.resolve().parent,
            "run_dir": run_dir,
            "lr": rate,
            "n_examples": arguments.pairs,
            "n_epochs": "null",
            "batch_size": arguments.batch_size,
            "warmup_steps": arguments.pairs // arguments.batch_size // 10,
            "eval_every": arguments.pairs,
            "n_eval_examples": arguments.held_out,
            "eval_batch_size": arguments.batch_size,
            "sample_during_eval": "false",
            "max_length": arguments.max_length,
            "max_prompt_length": arguments.max_length // 2,
        }
        run_train(*(f"{key}={value}" for key, value in options.items()))
        records = read_rows(run_dir / "metrics.jsonl")
    before, *_, after = [record for record in records if record["split"] == "eval"]
    return {
        "adapter": adapter,
        "lr": rate,
        "before": {name: before[name] for name in NUMBERS},
        "after": {name: after[name] for name in NUMBERS},
    }


if __name__ == "__main__":
    main()
