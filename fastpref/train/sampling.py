"""Samples of policy and reference on held-out prompts, beside the numbers of an evaluation."""

import json
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence
from transformers import StoppingCriteria, StoppingCriteriaList

from fastpref.batches.loader import pad_token_id
from fastpref.complete_files import append_whole
from fastpref.distributed import World
from fastpref.heartbeat import await_device
from fastpref.memory.repetition import Repetition
from fastpref.model.own_reference import OwnReference
from fastpref.model.scorer import TokenScorer
from fastpref.signals import StopRequest


def sample_responses(
    scorer: TokenScorer | OwnReference,
    prompts: Sequence[Sequence[int]],
    tokenizer: Any,
    *,
    max_length: int,
    batch_size: int,
    seed: int,
    world: World,
    stop: StopRequest,
    repetition: Repetition,
) -> list[str] | None:
    """One sampled response a prompt, of all tokens at temperature 1.

    Every rank samples the same prompts from the same seed, because the blocks of a sharded model
    are gathered by all ranks together. The training run's random state is left alone. Where memory
    runs out, fewer are sampled at once, and draw other numbers.

    Args:
        prompts: Token ids.
        max_length: Prompt and response tokens together.
        stop: Whether to: one process stops after a token, ranks after a batch.
        repetition: What to do where memory runs out.

    Returns:
        The decoded responses, without prompt and special tokens; None if it was to stop.
    """
    pad = pad_token_id(tokenizer, scorer.num_embeddings)
    options = {
        "do_sample": True,
        # transformers' own is 50
        "top_k": 0,
        "pad_token_id": pad,
        "eos_token_id": tokenizer.eos_token_id,
        "synced_gpus": world.size > 1,
        "stopping_criteria": StoppingCriteriaList(
            [StopOnSignal(stop) if world.size == 1 else AwaitDevice(world)]
        ),
    }

    def sample_chunk(chunk: Sequence[Sequence[int]]) -> list[str]:
        input_ids, attention_mask = (x.to(world.device) for x in pad_on_the_left(chunk, pad))
        _, L = input_ids.shape
        limit = max(max_length, L + 1)
        output = scorer.generate(input_ids, attention_mask, max_length=limit, **options)
        return tokenizer.batch_decode(output[:, L:], skip_special_tokens=True)

    responses = list[str]()
    with torch.random.fork_rng([world.device] if world.device.type == "cuda" else []):
        torch.manual_seed(seed)
        for start in range(0, len(prompts), batch_size):
            if stop.agreed(world):
                break
            responses += repetition.compute_items(
                prompts[start : start + batch_size],
                sample_chunk,
                tokens=lambda prompt: max(max_length, len(prompt) + 1),
            )
    return None if stop.agreed(world) else responses


def pad_on_the_left(prompts: Sequence[Sequence[int]], pad: int) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, (B, L) int64."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    pad_rows = partial(pad_sequence, batch_first=True, padding_side="left")
    return pad_rows(rows, padding_value=pad), pad_rows([torch.ones_like(row) for row in rows])


class StopOnSignal(StoppingCriteria):
    """Ends the sampling of a batch once a signal came or the deadline is near."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), self._stop.requested, device=input_ids.device)


class AwaitDevice(StoppingCriteria):
    """Ends nothing: waits for a token before `generate` fetches whether all ranks have theirs."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        await_device(self._world)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def write_samples(path: Path, step: int, examples: int, samples: Sequence[dict[str, str]]) -> None:
    """Append samples to `samples.jsonl`: step, examples, prompt, policy, reference, chosen.

    Raises:
        CheckpointError: it cannot be written.
    """
    records = ({"step": step, "examples": examples, **sample} for sample in samples)
    append_whole(path, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in records))
