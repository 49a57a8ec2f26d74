"""DPO on packed and on padded rows, on a CPU, for models whose layers are not all full attention.

    python benchmarks/bench_windows.py [--rounds 3] [--json]

Small models with random weights, of the architectures of Gemma 3 and gpt-oss (sliding windows of
128 tokens in five of six layers, and in every other one), LFM2 (convolutions) and Qwen3-Next
(linear attention, experts); 16 pairs of the length distribution `UF`, at most 1,024 tokens,
float32. A step is the policy's forward and backward and the reference's forward. The largest
difference between both layouts' log-probabilities is reported too.
"""

import argparse
import statistics
import time
from typing import Any

import numpy as np
import torch
from machine import write_results
from train_cases import LAWS
from transformers import AutoConfig, AutoModelForCausalLM

from fastpref.batch import Batch, EncodedRow
from fastpref.batches.packed import pack_rows
from fastpref.batches.padded import pad_rows
from fastpref.model.attention.interface import build_attention
from fastpref.model.blocks import find_blocks
from fastpref.model.logit_path import measure_logit_path
from fastpref.model.mixers import find_mixers, isolate_mixers
from fastpref.model.scorer import TokenScorer

SIZE: dict[str, Any] = {
    "hidden_size": 256,
    "num_hidden_layers": 6,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "vocab_size": 4096,
    "sliding_window": 128,
    "max_position_embeddings": 2048,
}
SHAPES: dict[str, dict[str, Any]] = {
    "gemma3_text": {"intermediate_size": 1024},
    "gpt_oss": {"intermediate_size": 256, "num_local_experts": 4, "num_experts_per_tok": 2},
    "lfm2": {
        "intermediate_size": 1024,
        "layer_types": ["conv", "conv", "full_attention"] * 2,
        "conv_L_cache": 3,
    },
    "qwen3_next": {
        "layer_types": ["linear_attention", "linear_attention", "full_attention"] * 2,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 64,
        "linear_value_head_dim": 64,
        "moe_intermediate_size": 128,
        "shared_expert_intermediate_size": 128,
        "num_experts": 8,
        "num_experts_per_tok": 2,
    },
}
PAIRS = 16
MAX_LENGTH = 1024


def make_rows(vocab_size: int) -> list[EncodedRow]:
    """Pairs of random tokens with lengths from the distribution `UF`."""
    rng = np.random.default_rng(0)
    *medians, spread = LAWS["UF"]
    rows = []
    for _ in range(PAIRS):
        lengths = [int(n * np.exp(rng.normal(0, spread))) for n in medians]
        prompt, *responses = (min(max(n, 4), MAX_LENGTH // 2) for n in lengths)
        ids = [rng.integers(5, vocab_size, n).tolist() for n in (prompt, *responses)]
        rows.append(EncodedRow(*ids))
    return rows


def by_sequence(logps: torch.Tensor, batch: Batch) -> torch.Tensor:
    return logps[torch.argsort(batch.sequence_ids, stable=True)]


def step(policy: TokenScorer, reference: TokenScorer, batch: Batch) -> float:
    """Run a step's forwards and backward; returns seconds."""
    policy.zero_grad()
    start = time.perf_counter()
    with torch.no_grad():
        theirs = reference(batch)
    (policy(batch) - theirs).sum().backward()
    return time.perf_counter() - start


def compare(shape: str, rounds: int) -> dict[str, Any]:
    """Tokens computed and median seconds, packed and padded."""
    torch.manual_seed(0)
    config = AutoConfig.for_model(shape, **SIZE, **SHAPES[shape])
    models = [AutoModelForCausalLM.from_config(config, dtype=torch.float32) for _ in range(2)]
    models[1].load_state_dict(models[0].state_dict())
    models[1].requires_grad_(False)
    rows = make_rows(SIZE["vocab_size"])
    path = measure_logit_path(models[0])
    padded = [TokenScorer(model, path=path) for model in models], pad_rows(rows, pad_token_id=0)
    with torch.no_grad():
        expected = by_sequence(padded[0][0](padded[1]), padded[1])
    seconds: dict[str, list[float]] = {"padded": [], "packed": []}
    # padded first: preparing a model for packed rows replaces its attention
    for _ in range(rounds + 1):
        seconds["padded"].append(step(*padded[0], padded[1]))
    for model in models:
        isolate_mixers(find_mixers(model, find_blocks(model, None))[0])
    attention = build_attention("sdpa")
    packed = [TokenScorer(model, attention, path) for model in models]
    batch = pack_rows(rows, pad_token_id=0, share_prompt=True)
    with torch.no_grad():
        error = (by_sequence(packed[0](batch), batch) - expected).abs().max().item()
    for _ in range(rounds + 1):
        seconds["packed"].append(step(*packed, batch))
    # the first step of each is a warm-up
    median = {name: statistics.median(values[1:]) for name, values in seconds.items()}
    return {
        "shape": shape,
        "largest_difference_nats": error,
        "tokens_padded": padded[1].input_ids.numel(),
        "tokens_packed": batch.input_ids.numel(),
        "seconds_padded": median["padded"],
        "seconds_packed": median["packed"],
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", action="store_true", help="write to the results folder")
    arguments = parser.parse_args()
    found = [compare(shape, arguments.rounds) for shape in SHAPES]
    for row in found:
        tokens = row["tokens_packed"] / row["tokens_padded"]
        faster = row["seconds_padded"] / row["seconds_packed"]
        print(
            f"{row['shape']}: {row['tokens_packed']:,} of {row['tokens_padded']:,} tokens computed "
            f"({tokens:.2f}), {faster:.1f} x as fast ({row['seconds_packed']:.2f} s and "
            f"{row['seconds_padded']:.2f} s), {row['largest_difference_nats']:.1e} nats apart"
        )
    if arguments.json:
        write_results("windows", {"rounds": arguments.rounds, "runs": found}, device="cpu")


if __name__ == "__main__":
    main()
