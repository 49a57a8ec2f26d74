"""Estimation of token weights compared with the TIS-DPO repository: throughput and memory.

    python benchmarks/bench_weight_estimation.py --model FOLDER --data FILE --rows 200

The repository's method follows its `token_weight_estimation.py`: both models in memory, four rows
at a time in file order, chosen and rejected separately and padded; the log-softmax of every
position over the whole vocabulary is copied to the host, where the weights are gathered. Both
models are float32, or with --repository-dtype auto in the checkpoint's dtype: the script sets none,
for which transformers used float32 before version 5 and uses the checkpoint's dtype since. Ours is
`task=estimate_weights`, by default in float32 too. The rows are groups of four consecutive rows
(the repository's batches) at equal distances in the whole file. Each method runs in a fresh
process, --rounds times, interleaved; the time includes loading the models but not imports. The
differences between both sets of weights are recorded too.

Writes <results>/<device>/weight_estimation-<model>-<dtype>.json, with -as-loaded if the
repository's method uses the checkpoint's dtype.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from importlib import import_module
from pathlib import Path
from typing import Any

from machine import RESULTS, peak_resident_gib, write_results
from train_cases import read_rows
from train_command import run_train

BATCH_SIZE = 4
PERTURB = """
import sys, torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
torch.manual_seed(0)
with torch.no_grad():
    for parameter in model.parameters():
        parameter += 0.02 * parameter.float().std() * torch.randn_like(parameter)
model.save_pretrained(sys.argv[2])
AutoTokenizer.from_pretrained(sys.argv[1]).save_pretrained(sys.argv[2])
"""
"""Creates the second model, in a separate process so that its memory does not count."""
ASSISTANT = "\n\nAssistant:"


def split_row(row: dict[str, str]) -> tuple[str, str, str]:
    """Prompt, chosen and rejected of a row, which may have whole HH dialogues and no prompt."""
    if "prompt" in row:
        return row["prompt"], row["chosen"], row["rejected"]
    end = row["chosen"].rfind(ASSISTANT) + len(ASSISTANT)
    return row["chosen"][:end], row["chosen"][end:], row["rejected"][end:]


def run_repository(models: list[str], data: Path, dtype: str) -> list[list[list[float]]]:
    """The repository's method in `dtype`; returns chosen and rejected weights of each row."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(models[0])
    tokenizer.pad_token = tokenizer.eos_token
    loaded = [AutoModelForCausalLM.from_pretrained(m, dtype=dtype) for m in models]
    rows = [split_row(row) for row in read_rows(data)]
    sides: list[list[list[float]]] = []
    for side in (2, 1):
        weights = []
        for start in range(0, len(rows), BATCH_SIZE):
            batch = rows[start : start + BATCH_SIZE]
            ids = [
                [tokenizer(row[i], add_special_tokens=False)["input_ids"] for i in (0, side)]
                for row in batch
            ]
            longest = max(len(prompt) + len(response) for prompt, response in ids)
            input_ids = torch.full((len(batch), longest), tokenizer.pad_token_id)
            mask = torch.zeros_like(input_ids)
            for i, (prompt, response) in enumerate(ids):
                size = len(prompt) + len(response)
                input_ids[i, :size] = torch.tensor(prompt + response)
                mask[i, :size] = 1
            with torch.no_grad():
                logps = [
                    model(input_ids=input_ids, attention_mask=mask)
                    .logits.float()
                    .log_softmax(-1)
                    .cpu()
                    for model in loaded
                ]
            for i, (prompt, response) in enumerate(ids):
                span = slice(len(prompt) - 1, len(prompt) + len(response) - 1)
                target = torch.tensor(response)[:, None]
                good, bad = (part[i, span].gather(1, target)[:, 0] for part in logps)
                weights.append((bad - good).tolist())
        sides.append(weights)
    rejected, chosen = sides
    return [list(pair) for pair in zip(chosen, rejected, strict=True)]


def run_fastpref(models: list[str], data: Path, dtype: str) -> list[list[list[float]]]:
    """`task=estimate_weights`, computing in `dtype`."""
    output = data.parent.parent / "out"
    run_train(
        "task=estimate_weights",
        "model=blank_model",
        f"model.name_or_path={models[0]}",
        f"model.fsdp_policy_mp={dtype}",
        f"weights.positive={models[0]}",
        f"weights.negative={models[1]}",
        f"weights.output_dir={output}",
        f"base_data_dir={data.parent.parent}",
        f"datasets=[{data.parent.name}]",
        f"data.cache_dir={output / 'cache'}",
    )
    rows = read_rows(output / data.parent.name / "train.jsonl")
    return [[row["chosen_weight"], row["rejected_weight"]] for row in rows]


METHODS = {
    "repository": ["transformers.models.llama.modeling_llama"],
    "fastpref": [
        "transformers.models.llama.modeling_llama",
        "fastpref.cli.run",
        "fastpref.tisdpo.estimate",
    ],
}
"""Modules imported before timing starts; their memory counts."""


def measure(options: argparse.Namespace) -> None:
    """Child process: estimate, and write the weights, the seconds and the peak memory."""
    models, data = options.models, options.data
    for module in METHODS[options.method]:
        import_module(module)
    started = time.perf_counter()
    if options.method == "repository":
        weights = run_repository(models, data, options.repository_dtype)
    else:
        weights = run_fastpref(models, data, options.dtype)
    seconds = time.perf_counter() - started
    peak_gib = peak_resident_gib()
    options.output.write_text(
        json.dumps({"seconds": seconds, "peak_gib": peak_gib, "weights": weights})
    )


def differences(a: list[list[list[float]]], b: list[list[list[float]]]) -> list[float]:
    """Absolute differences between two sets of weights, per token, in nats."""
    return [
        abs(x - y)
        for row_a, row_b in zip(a, b, strict=True)
        for side_a, side_b in zip(row_a, row_b, strict=True)
        for x, y in zip(side_a, side_b, strict=True)
    ]


def prepare(folder: Path, model: Path, source: Path, num_rows: int) -> tuple[list[str], Path]:
    """Prepare the model, a slightly perturbed copy, and groups of rows spread over the data."""
    models = [str(folder / "positive"), str(folder / "negative")]
    (folder / "positive").symlink_to(model.resolve())
    subprocess.run([sys.executable, "-c", PERTURB, *models], check=True)
    # training and `task=estimate_weights` drop rows with an empty response
    found = [row for row in read_rows(source) if all(part.strip() for part in split_row(row))]
    groups = [found[i : i + BATCH_SIZE] for i in range(0, len(found), BATCH_SIZE)]
    wanted = -(-num_rows // BATCH_SIZE)
    rows = [row for k in range(wanted) for row in groups[k * len(groups) // wanted]]
    data = folder / "data" / "rows" / "train.jsonl"
    data.parent.mkdir(parents=True)
    data.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return models, data


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", type=Path, required=True, help="a Hugging Face folder")
    parser.add_argument("--data", type=Path, required=True, help="JSON Lines, may end in .gz")
    parser.add_argument("--rows", type=int, default=200, help="a multiple of four")
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--repository-dtype", choices=("float32", "auto"), default="float32")
    parser.add_argument("--results", type=Path, default=RESULTS)
    parser.add_argument("--method", choices=METHODS, help=argparse.SUPPRESS)
    parser.add_argument("--models", nargs=2, help=argparse.SUPPRESS)
    parser.add_argument("--output", type=Path, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.method:
        measure(options)
        return
    found: dict[str, list[dict[str, Any]]] = {method: [] for method in METHODS}
    for _ in range(options.rounds):
        for method in METHODS:
            with tempfile.TemporaryDirectory() as name:
                folder = Path(name)
                models, data = prepare(folder, options.model, options.data, options.rows)
                output = folder / "measured.json"
                arguments = ["--method", method, "--models", *models, "--output", str(output)]
                fixed = ["--model", str(options.model), "--data", str(data)]
                fixed += ["--dtype", options.dtype]
                fixed += ["--repository-dtype", options.repository_dtype]
                command = [sys.executable, __file__, *arguments, *fixed]
                subprocess.run(command, check=True)
                found[method].append(json.loads(output.read_text()))
    report(found, options)


def report(found: dict[str, list[dict[str, Any]]], options: argparse.Namespace) -> None:
    """Print the medians and their ratios, and write them to the results file."""
    by_token = differences(*(runs[0].pop("weights") for runs in found.values()))
    record: dict[str, Any] = {
        "model": options.model.name,
        "rows": options.rows,
        "dtype": options.dtype,
        "repository_dtype": options.repository_dtype,
        "median_difference_nats": statistics.median(by_token),
        "largest_difference_nats": max(by_token),
    }
    for method, runs in found.items():
        seconds = statistics.median(run["seconds"] for run in runs)
        record[method] = {
            "seconds": [run["seconds"] for run in runs],
            "rows_per_second": options.rows / seconds,
            "peak_gib": statistics.median(run["peak_gib"] for run in runs),
        }
    ours, theirs = record["fastpref"], record["repository"]
    record["speedup"] = ours["rows_per_second"] / theirs["rows_per_second"]
    record["memory_ratio"] = ours["peak_gib"] / theirs["peak_gib"]
    as_loaded = "-as-loaded" if options.repository_dtype == "auto" else ""
    name = f"weight_estimation-{options.model.name}-{options.dtype}{as_loaded}"
    print(json.dumps(record, indent=2))
    write_results(name, record, results=options.results)


if __name__ == "__main__":
    main()
