"""What sees or hears is loaded as what of it reads text: the same numbers, packed too."""

import logging
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from tiny_models import random_rows
from tiny_wrappers import KINDS, save_wrapper
from torch import Tensor
from transformers import AutoModelForMultimodalLM

from fastpref.batches.packed import pack_rows
from fastpref.batches.padded import pad_rows
from fastpref.config import (
    AdapterConfig,
    Config,
    DPOConfig,
    ModelConfig,
    PackingConfig,
    TrainingOptions,
)
from fastpref.distributed import init_world
from fastpref.model.files.families import other_parts
from fastpref.model.files.paths import find_model
from fastpref.model.logit_path import measure_logit_path
from fastpref.model.pair import build_pair
from fastpref.model.source import build_empty, build_meta, load_model, read_vocab_size

OTHERS = ("vision", "visual", "projector")


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("wrappers")
    for kind in KINDS:
        save_wrapper(base / kind, kind)
    return base


@pytest.fixture
def world():
    yield init_world()
    dist.destroy_process_group()


def plain_logps(folder: Path, ids: Tensor) -> Tensor:
    """From the wrapper's own class, with all that it has."""
    model = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32).eval()
    # Llama 4's own forward fails in transformers 5.24 once it has its logits
    text = model.language_model if model.config.model_type == "llama4" else model
    with torch.no_grad():
        return text(input_ids=ids, use_cache=False).logits.log_softmax(-1)


@pytest.mark.parametrize("kind", KINDS)
def test_a_wrapper_is_loaded_without_what_text_does_not_go_through(folders, kind, caplog):
    source = find_model(str(folders / kind))
    with caplog.at_level(logging.WARNING):
        model = load_model(source, dtype=torch.float32)
    # all that is said to have no place is what transformers has none for
    said = [line for line in caplog.text.splitlines() if "UNEXPECTED" in line or "no place" in line]
    assert not [line for line in said if any(other in line for other in OTHERS)]
    assert other_parts(model) and read_vocab_size(source) == 352
    for like in (model, build_empty(source, dtype=torch.float32)):
        names = [name for name, _ in like.named_parameters()]
        assert names and not [n for n in names if any(other in n for other in OTHERS)]
    meta = build_meta(source, dtype=torch.bfloat16)
    assert [n for n, _ in meta.named_parameters()] == [n for n, _ in model.named_parameters()]


def values_and_gradients(scorer, batch) -> list[Tensor]:
    scorer.zero_grad()
    logps = scorer(batch)[torch.argsort(batch.sequence_ids, stable=True)]
    logps.backward(torch.linspace(-1, 1, len(logps)))
    return [logps.detach(), *(p.grad.clone() for p in scorer.trained() if p.grad is not None)]


def options_of(folder: Path, **options) -> TrainingOptions:
    model = ModelConfig(name_or_path=str(folder), fsdp_policy_mp=None)
    config = Config(model=model, loss=DPOConfig(), datasets=["planted"], batch_size=2, **options)
    return config.training


@pytest.mark.parametrize("kind", KINDS)
def test_packed_shared_and_padded_rows_score_as_the_wrapper_itself_does(folders, kind, world):
    rows = random_rows()
    rows.append(rows[0]._replace(chosen_ids=rows[1].chosen_ids))
    pair = build_pair(options_of(folders / kind), PackingConfig(), world, longest=32)
    assert pair.layout.name == "packed, prompts shared"
    padded = build_pair(
        options_of(folders / kind), PackingConfig(enabled=False), world, longest=32
    ).policy
    expected = values_and_gradients(padded, pad_rows(rows, pad_token_id=0))
    assert len(expected) == 1 + len(padded.trained())
    for share_prompt in (False, True):
        batch = pack_rows(rows, pad_token_id=0, share_prompt=share_prompt)
        found = values_and_gradients(pair.policy, batch)
        for ours, theirs in zip(found, expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
    sequences = [(r.prompt_ids, r.chosen_ids) for r in rows]
    sequences += [(r.prompt_ids, r.rejected_ids) for r in rows]
    logps = []
    for prompt, response in sequences:
        ids = torch.tensor([[*prompt, *response]])
        own = plain_logps(folders / kind, ids)[0, len(prompt) - 1 : -1]
        logps.append(own.gather(1, torch.tensor(response)[:, None])[:, 0])
    torch.testing.assert_close(expected[0], torch.cat(logps), rtol=1e-5, atol=1e-5)


def test_what_is_sampled_is_what_the_wrapper_samples(folders, world):
    ids = torch.tensor([[5, 6, 7, 8]])
    for kind in ("gemma3", "qwen2_5_vl", "llava"):
        policy = build_pair(options_of(folders / kind), PackingConfig(), world, longest=32).policy
        options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0, "eos_token_id": -1}
        ours = policy.generate(ids, torch.ones_like(ids), **options)
        plain = AutoModelForMultimodalLM.from_pretrained(folders / kind, dtype=torch.float32)
        assert torch.equal(ours, plain.eval().generate(ids, **options))


@pytest.mark.parametrize("targets", [None, ["q_proj", "v_proj"]])
@pytest.mark.parametrize("kind", ["gemma3", "mistral3"])
def test_adapters_of_a_wrapper_are_in_layers_of_text_alone(folders, kind, targets, world):
    adapter = AdapterConfig(kind="lora", r=2, target_modules=targets)
    options = options_of(folders / kind, adapter=adapter)
    policy = build_pair(options, PackingConfig(), world, longest=32).policy
    plain = AutoModelForMultimodalLM.from_pretrained(folders / kind)
    layers = policy.adapters.config.target_modules
    # no layer of the whole model ends so but these
    meant = {n for n, _ in plain.named_modules() if any(n.endswith(end) for end in layers)}
    assert meant == set(layers) and not [n for n in meant if "language_model" not in n]
    if targets:
        assert {n.rpartition(".")[2] for n in layers} == set(targets)


def test_logits_are_measured_on_what_is_there(folders):
    model = load_model(find_model(str(folders / "gemma3")), dtype=torch.float32)
    path = measure_logit_path(model)
    assert path.vocab_size == 352 and path.body
