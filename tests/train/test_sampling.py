"""Samples are draws of the model itself, whatever its checkpoint says of generating."""

import json
import os
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from ranks import ALONE
from tiny_models import save_tiny_model

from fastpref.distributed import World, init_world
from fastpref.errors import LostRankError
from fastpref.memory.repetition import Repetition
from fastpref.model.files.paths import find_model
from fastpref.model.scorer import TokenScorer
from fastpref.model.source import load_model, load_tokenizer
from fastpref.signals import NON_FINITE, StopRequest
from fastpref.train import sampling
from fastpref.train.sampling import sample_responses, write_samples

GENERATIONS = {
    "longer": {"max_new_tokens": 100_000, "min_p": 0.5, "repetition_penalty": 3.0},
    "shorter": {"max_new_tokens": 3, "max_time": 0.0, "suppress_tokens": list(range(3, 90))},
    "greedy": {"do_sample": True, "top_k": 1, "temperature": 0.01},
    "another shape": {"return_dict_in_generate": True, "output_scores": True, "num_beams": 2},
    "refused by transformers": {"num_return_sequences": 2, "temperature": 0.0},
}
MAX_LENGTH = 40
PROMPTS = [[5, 6, 7, 8], [9, 10, 11, 12]]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return save_tiny_model(tmp_path_factory.mktemp("model"))


def draw(model, tokenizer, seed: int) -> list[str]:
    """From all tokens by their probabilities, without a cache and without `generate`."""
    torch.manual_seed(seed)
    ids, is_done = torch.tensor(PROMPTS), torch.zeros(len(PROMPTS), dtype=torch.bool)
    while ids.shape[1] < MAX_LENGTH and not is_done.all():
        with torch.no_grad():
            logits = model(input_ids=ids).logits[:, -1].float()
        new = torch.multinomial(logits.softmax(-1), num_samples=1)
        new[is_done] = tokenizer.pad_token_id
        is_done |= new[:, 0] == tokenizer.eos_token_id
        ids = torch.cat([ids, new], dim=1)
    return tokenizer.batch_decode(ids[:, len(PROMPTS[0]) :], skip_special_tokens=True)


def sample(folder: Path, world: World, stop: StopRequest) -> list[str] | None:
    return sample_responses(
        TokenScorer(load_model(find_model(str(folder)), dtype=torch.float32)),
        PROMPTS,
        load_tokenizer(str(folder), None),
        max_length=MAX_LENGTH,
        batch_size=2,
        seed=3,
        world=world,
        stop=stop,
        repetition=Repetition(num_ranks=world.size),
    )


@pytest.mark.parametrize("kind", GENERATIONS)
def test_a_generation_config_has_no_part_in_samples(folder, kind):
    (folder / "generation_config.json").write_text(json.dumps(GENERATIONS[kind]))
    model = load_model(find_model(str(folder)), dtype=torch.float32).eval()
    tokenizer = load_tokenizer(str(folder), None)
    world = init_world()
    samples = sample(folder, world, StopRequest())
    dist.destroy_process_group()
    assert samples == draw(model, tokenizer, seed=3)


def test_a_response_is_what_follows_its_prompt_without_special_tokens(folder):
    tokenizer, stop, limits = load_tokenizer(str(folder), None), StopRequest(), []

    def generate(ids: torch.Tensor, mask: torch.Tensor, *, max_length: int, **_: object):
        limits.append(max_length)
        new = torch.tensor([[20, tokenizer.eos_token_id]] * len(ids))
        return torch.cat([ids, new], dim=1)

    def respond() -> list[str] | None:
        return sample_responses(
            SimpleNamespace(num_embeddings=len(tokenizer), generate=generate),
            PROMPTS,
            tokenizer,
            max_length=4,
            batch_size=2,
            seed=3,
            world=ALONE,
            stop=stop,
            repetition=Repetition(num_ranks=1),
        )

    assert respond() == [tokenizer.decode([20])] * 2
    stop.ask(NON_FINITE)
    # nothing is sampled any more; one token where the prompt already takes what there is
    assert respond() is None and limits == [5]


def test_ranks_hear_of_a_lost_one_while_they_sample(folder, monkeypatch):
    def lost(world: World) -> None:
        raise LostRankError("a GPU waits, with no word of rank 1")

    monkeypatch.setattr(sampling, "await_device", lost)
    monkeypatch.setattr(World, "agree_max", lambda self, value: value)
    world = init_world()
    try:
        with pytest.raises(LostRankError):
            sample(folder, replace(world, size=2), StopRequest())
    finally:
        dist.destroy_process_group()


def test_a_single_process_stops_in_the_middle_of_a_response(folder, monkeypatch):
    stop, lengths = StopRequest(), []
    call = sampling.StopOnSignal.__call__

    def ask(self: sampling.StopOnSignal, input_ids: torch.Tensor, *arguments: object) -> object:
        lengths.append(input_ids.shape[1])
        stop.ask(NON_FINITE)
        return call(self, input_ids, *arguments)

    monkeypatch.setattr(sampling.StopOnSignal, "__call__", ask)
    world = init_world()
    try:
        responses = sample(folder, world, stop)
    finally:
        dist.destroy_process_group()
    # one token after the prompts; half a response is none
    assert (responses, lengths) == (None, [len(PROMPTS[0]) + 1])


def test_samples_are_kept_as_readable_text(tmp_path):
    write_samples(tmp_path / "samples.jsonl", 1, 4, [{"prompt": "grün"}, {"prompt": "\n"}])
    text = (tmp_path / "samples.jsonl").read_text(encoding="utf-8")
    assert "grün" in text
    assert [json.loads(line)["prompt"] for line in text.splitlines()] == ["grün", "\n"]


def test_samples_are_on_the_disk_before_their_evaluation_counts_as_done(tmp_path, monkeypatch):
    path, synced = tmp_path / "samples.jsonl", []
    monkeypatch.setattr(os, "fsync", lambda file: synced.append(os.fstat(file).st_size))
    write_samples(path, 1, 4, [{"prompt": "a"}])
    assert synced == [path.stat().st_size]
    # a device has nothing to sync
    write_samples(Path(os.devnull), 1, 4, [{"prompt": "a"}])
