"""Samples of policy and reference on held-out prompts, beside the numbers of an evaluation."""

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from fastpref.distributed import World
from fastpref.model import TokenScorer
from fastpref.pretrained import pad_token_id

logger = logging.getLogger("fastpref")


def sample_responses(
    scorer: TokenScorer,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    max_length: int,
    batch_size: int,
    seed: int,
    world: World,
) -> list[str]:
    """One sampled response a prompt, at temperature 1.

    Every rank samples the same prompts from the same seed, because the blocks of a sharded model
    are gathered by all ranks together. The training run's random state is left alone.

    Args:
        prompts: Token ids.
        max_length: Prompt and response tokens together.
        batch_size: Prompts at a time.
        seed: Of the sampling.

    Returns:
        The decoded responses, without prompt and special tokens.
    """
    responses: list[str] = []
    pad = pad_token_id(tokenizer, scorer.num_embeddings)
    devices = [world.device] if world.device.type == "cuda" else []
    was_training = scorer.training
    scorer.eval()
    with torch.random.fork_rng(devices=devices):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            chunk = prompts[start : start + batch_size]
            L = max(len(prompt) for prompt in chunk)
            input_ids = torch.full((len(chunk), L), pad, dtype=torch.int64)
            attention_mask = torch.zeros_like(input_ids)
            for row, prompt in enumerate(chunk):
                input_ids[row, L - len(prompt) :] = torch.tensor(prompt)
                attention_mask[row, L - len(prompt) :] = 1
            output = scorer.generate(
                input_ids.to(world.device),
                attention_mask.to(world.device),
                do_sample=True,
                max_length=max(max_length, L + 1),
                pad_token_id=pad,
                eos_token_id=tokenizer.eos_token_id,
                synced_gpus=world.size > 1,
            )
            responses += tokenizer.batch_decode(output[:, L:], skip_special_tokens=True)
    scorer.train(was_training)
    return responses


def write_samples(path: Path, step: int, examples: int, samples: Sequence[dict[str, str]]) -> None:
    """Append samples to `samples.jsonl`: step, examples, prompt, policy, reference, chosen."""
    with path.open("a", encoding="utf-8") as lines:
        for sample in samples:
            record = {"step": step, "examples": examples, **sample}
            lines.write(json.dumps(record, ensure_ascii=False) + "\n")
