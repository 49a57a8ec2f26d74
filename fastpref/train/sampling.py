"""Samples of policy and reference on held-out prompts, as part of an evaluation."""

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
from fastpref.complete_files import append_whole, sync, writing
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
    """Sample one response per prompt, from the whole vocabulary at temperature 1.

    Every rank samples the same prompts from the same seed, because all ranks gather the blocks of a
    sharded model together. The random state of the training run is unchanged. If memory runs out,
    smaller batches are sampled, which draw other random numbers.

    Args:
        prompts: Token ids.
        max_length: Limit on prompt and response tokens together.
        stop: Checked after each token in a single process, after each batch on several ranks.
        repetition: Samples smaller batches when memory runs out.

    Returns:
        The decoded responses, without prompt and special tokens; None if asked to stop.
    """
    pad = pad_token_id(tokenizer, scorer.num_embeddings)
    options = {
        "do_sample": True,
        # all tokens: the default of transformers is 50
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
    """Token ids and attention mask, each (B, L) int64, padded on the left."""
    rows = [torch.tensor(prompt) for prompt in prompts]
    pad_rows = partial(pad_sequence, batch_first=True, padding_side="left")
    return pad_rows(rows, padding_value=pad), pad_rows([torch.ones_like(row) for row in rows])


class StopOnSignal(StoppingCriteria):
    """Ends the sampling of a batch after a signal, or when the deadline is near."""

    def __init__(self, stop: StopRequest) -> None:
        self._stop = stop

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        return torch.full((len(input_ids),), self._stop.requested, device=input_ids.device)


class AwaitDevice(StoppingCriteria):
    """Never stops: waits for each token, so that `generate` does not block on a lost rank."""

    def __init__(self, world: World) -> None:
        self._world = world

    def __call__(self, input_ids: Tensor, scores: Any, **_: Any) -> Any:
        await_device(self._world)
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)


def write_samples(path: Path, step: int, examples: int, samples: Sequence[dict[str, str]]) -> None:
    """Append samples to `samples.jsonl`: step, examples, prompt, policy, reference, chosen.

    The file is synced: a checkpoint after this evaluation counts it as done.

    Raises:
        CheckpointError: it cannot be written.
    """
    records = ({"step": step, "examples": examples, **sample} for sample in samples)
    append_whole(path, "".join(json.dumps(x, ensure_ascii=False) + "\n" for x in records))
    if path.is_file():
        with writing(path):
            sync(path)
