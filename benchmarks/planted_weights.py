"""Do estimated token weights find the planted wrong tokens, and does training with them help?

    python benchmarks/planted_weights.py [--results benchmarks/results] [--seeds 5]
    python benchmarks/planted_weights.py --estimators-only --seeds 3

1. For each estimator of TIS-DPO (D, S, P; D and S also with adapters): the recipe up to its weights
   on all 2048 training pairs of `planted`, and the ROC-AUC of a rejected token's weight as a
   classifier of planted tokens.
2. TIS-DPO with the weights of (D) and transform=paper, compared with random weights and a constant
   weight of the same mean, for several seeds and numbers of steps. The measure is independent of
   the weights: held-out log-ratios of whole responses relative to the starting model.

Writes <results>/<device>/planted_weights.json, or with --estimators-only planted_auc.json with
several seeds per estimator, and prints a summary.
"""

import argparse
import json
import math
import statistics
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from machine import RESULTS, write_results
from train_cases import read_rows
from train_command import run_train

from fastpref.token_weights import transform_weights

ESTIMATORS = {
    "D": ("recipe=tisdpo_d",),
    "D-adapters": ("recipe=tisdpo_d", "adapter=lora"),
    "S": ("recipe=tisdpo_s",),
    "S-adapters": ("recipe=tisdpo_s", "adapter=lora"),
    "P": ("recipe=tisdpo_p",),
}
NUM_EXAMPLES = (256, 512)
"""Training pairs: 8 and 16 steps of 32."""
QUIET = ("sample_during_eval=false", "n_eval_examples=0", "minimum_log_interval_secs=60")


def estimate(estimator: str, seed: int, run_dir: Path) -> float:
    """Run a recipe; returns the ROC-AUC that its weights stage reports."""
    run_train(*ESTIMATORS[estimator], f"seed={seed}", f"run_dir={run_dir}", *QUIET)
    result = json.loads((run_dir / "weights" / "stage.json").read_text(encoding="utf-8"))["result"]
    return float(result.rpartition(" ")[2])


def mean_paper_weight(path: Path) -> float:
    """Mean of a file's weights after transform=paper, over chosen and rejected tokens."""
    signed = [
        sign * np.array(row[f"{side}_weight"])
        for row in read_rows(path)
        for side, sign in (("chosen", -1), ("rejected", 1))
    ]
    return float(np.mean(transform_weights(np.concatenate(signed), "paper")))


def arms(mean: float) -> dict[str, list[str]]:
    """Options for each kind of weights, all with the same mean."""
    low, high = math.exp(-0.5), math.exp(1.5)
    scale = mean / ((low + high) / 2)
    constant = [f"transform.threshold.lower_threshold={mean}"]
    constant += [f"transform.threshold.upper_threshold={mean + 1e-6}", "transform.method=threshold"]
    return {
        "estimated": ["transform=paper"],
        "random": [
            "transform.method=random",
            f"transform.random.min_val={low * scale}",
            f"transform.random.max_val={high * scale}",
        ],
        "constant": constant,
    }


def held_out(policy: Path, data: Path, folder: Path) -> dict[str, float]:
    """Accuracy and margin of whole responses under a policy, relative to the starting model.

    Computed with the weight estimator: its value for a token is log π_start - log π_policy.
    """
    output = folder / f"score_{policy.name}"
    run_train(
        "task=estimate_weights",
        f"weights.positive={policy}",
        "weights.negative=tiny",
        f"weights.output_dir={output}",
        f"base_data_dir={data}",
        "datasets=[test_only]",
    )
    margins = [
        sum(row["rejected_weight"]) - sum(row["chosen_weight"])
        for row in read_rows(output / "test_only" / "test.jsonl")
    ]
    return {
        "accuracy": sum(margin > 0 for margin in margins) / len(margins),
        "margin_nats": statistics.mean(margins),
    }


def compare(weights: Path, folder: Path, num_seeds: int) -> list[dict[str, Any]]:
    """Train with each kind of weights for every seed and number of examples."""
    test_only = folder / "data" / "test_only"
    test_only.mkdir(parents=True)
    rows = read_rows(weights / "planted" / "test.jsonl")
    fields = ("prompt", "chosen", "rejected")
    lines = [json.dumps({field: row[field] for field in fields}) + "\n" for row in rows]
    (test_only / "test.jsonl").write_text("".join(lines), encoding="utf-8")
    results = []
    for arm, options in arms(mean_paper_weight(weights / "planted" / "train.jsonl")).items():
        for num_examples in NUM_EXAMPLES:
            for seed in range(num_seeds):
                run_dir = folder / f"{arm}_{num_examples}_{seed}"
                run_train(
                    "loss=tisdpo",
                    *options,
                    f"base_data_dir={weights}",
                    f"n_examples={num_examples}",
                    f"seed={seed}",
                    f"run_dir={run_dir}",
                    *QUIET,
                )
                found = held_out(run_dir, folder / "data", folder)
                results.append({"weights": arm, "examples": num_examples, "seed": seed} | found)
    return results


def summarise(results: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Mean and standard deviation over seeds."""
    table = []
    for arm, examples in dict.fromkeys((row["weights"], row["examples"]) for row in results):
        chosen = [r for r in results if (r["weights"], r["examples"]) == (arm, examples)]
        line: dict[str, Any] = {"weights": arm, "examples": examples, "seeds": len(chosen)}
        for key in ("accuracy", "margin_nats"):
            values = [row[key] for row in chosen]
            line[f"{key}_mean"] = statistics.mean(values)
            line[f"{key}_sd"] = statistics.stdev(values) if len(values) > 1 else 0.0
        table.append(line)
    return table


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--estimators-only", action="store_true", help="the first part, all seeds")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as name:
        if options.estimators_only:
            auc_of_seeds(Path(name), options.results, options.seeds)
        else:
            auc_and_training(Path(name), options.results, options.seeds)


def auc_of_seeds(folder: Path, results: Path, num_seeds: int) -> None:
    """The ROC-AUC of each estimator for several seeds."""
    auc = {
        name: [estimate(name, seed, folder / f"{name}_{seed}") for seed in range(num_seeds)]
        for name in ESTIMATORS
    }
    for name, values in auc.items():
        each = " ".join(f"{value:.3f}" for value in values)
        print(f"{name:12} ROC-AUC {statistics.mean(values):.3f} ({each})")
    write_results("planted_auc", {"roc_auc": auc}, results=results)


def auc_and_training(folder: Path, results: Path, num_seeds: int) -> None:
    """The ROC-AUC of each estimator for one seed, and the effect of training with D's weights."""
    auc = {name: estimate(name, 0, folder / name) for name in ESTIMATORS}
    runs = compare(folder / "D" / "weights", folder, num_seeds)
    summary = summarise(runs)
    print("\nROC-AUC of a rejected token's weight for the planted tokens:", auc)
    for line in summary:
        print(
            f"{line['weights']:10} {line['examples']:4} pairs: "
            f"accuracy {line['accuracy_mean']:.3f} ± {line['accuracy_sd']:.3f}, "
            f"margin {line['margin_nats_mean']:.2f} ± {line['margin_nats_sd']:.2f} nats"
        )
    found = {"roc_auc": auc, "summary": summary, "runs": runs}
    write_results("planted_weights", found, results=results)


if __name__ == "__main__":
    sys.exit(main())
