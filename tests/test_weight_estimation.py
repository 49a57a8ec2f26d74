"""Estimated token weights are what the two models' own logits say, in every row form."""

import json
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from tiny_models import save_tiny_model, text_rows, write_rows
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref.config import Config, DPOConfig, ModelConfig, TISDPOConfig, WeightsConfig
from fastpref.distributed import init_world
from fastpref.encode import load_split
from fastpref.errors import CheckpointError, DataError
from fastpref.role_templates import ROLE_SENTENCES
from fastpref.weight_estimation import estimate_weights

ROWS = text_rows(7)
DIALOGUES = [
    {
        side: f"\n\nHuman: {row['prompt']}\n\nAssistant:{row[side]}"
        for side in ("chosen", "rejected")
    }
    for row in ROWS
]
CHATS = [
    {"prompt": [{"role": "user", "content": row["prompt"]}]}
    | {side: [{"role": "assistant", "content": row[side]}] for side in ("chosen", "rejected")}
    for row in ROWS
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [str(save_tiny_model(folder / name, seed=i)) for i, name in enumerate(("good", "bad"))]


def make_config(models, tmp_path, **weights) -> Config:
    return Config(
        task="estimate_weights",
        model=ModelConfig(name_or_path=models[0], fsdp_policy_mp=None),
        loss=DPOConfig(),
        datasets=["rows"],
        base_data_dir=str(tmp_path / "data"),
        weights=WeightsConfig(
            positive=models[0],
            negative=models[1],
            output_dir=str(tmp_path / "out"),
            suffix="-weighted",
            batch_size=3,
            **weights,
        ),
    )


def estimate(config) -> list[dict]:
    world = init_world()
    try:
        estimate_weights(config, world)
    finally:
        dist.destroy_process_group()
    path = Path(config.weights.output_dir) / "rows-weighted" / "train.jsonl"
    return [json.loads(line) for line in path.open(encoding="utf-8")]


def expected_weights(models, prompt, response, prefixes=("", "")) -> torch.Tensor:
    """log π⁻ - log π⁺ of each response token, in float64, from the models' own logits."""
    logps = []
    for name, prefix in zip(models, prefixes, strict=True):
        tokenizer = AutoTokenizer.from_pretrained(name)
        model = AutoModelForCausalLM.from_pretrained(name, dtype=torch.float64)
        prompt_ids, response_ids = (
            tokenizer(text, add_special_tokens=False)["input_ids"]
            for text in (prefix + prompt, response)
        )
        logits = model(input_ids=torch.tensor([prompt_ids + response_ids])).logits[0]
        log_p = F.log_softmax(logits, -1)[len(prompt_ids) - 1 : -1]
        logps.append(log_p.gather(1, torch.tensor(response_ids)[:, None])[:, 0])
    return logps[1] - logps[0]


def test_weights_of_text_rows_equal_the_formula_in_float64(models, tmp_path):
    write_rows(tmp_path / "data" / "rows", "train", ROWS)
    written = estimate(make_config(models, tmp_path))
    for row, record in zip(ROWS, written, strict=True):
        assert {key: record[key] for key in row} == row
        for side in ("chosen", "rejected"):
            weights = torch.tensor(record[f"{side}_weight"], dtype=torch.float64)
            expected = expected_weights(models, row["prompt"], row[side])
            torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)
    origin = json.loads((tmp_path / "out" / "rows-weighted" / "train.weights.json").read_text())
    assert origin["positive"]["name_or_path"] == models[0]


@pytest.mark.parametrize("rows", [DIALOGUES, CHATS], ids=["dialogues", "chats"])
def test_other_forms_are_written_as_they_came_and_load_for_tisdpo(models, tmp_path, rows):
    write_rows(tmp_path / "data" / "rows", "train", rows)
    config = make_config(models, tmp_path)
    written = estimate(config)
    assert [{key: record[key] for key in rows[0]} for record in written] == rows
    training = Config(
        model=config.model,
        loss=TISDPOConfig(),
        datasets=["rows-weighted"],
        base_data_dir=config.weights.output_dir,
    )
    training.transform.method = "origin"
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    split = load_split(training, "train", tokenizer, vocab_size=len(tokenizer), quiet=True)
    for row, record in zip(split.dataset, written, strict=True):
        # the chosen list changes its sign, EOS weighs nothing
        chosen = [-weight for weight in record["chosen_weight"]] + [0.0]
        assert row["chosen_weights"] == pytest.approx(chosen, abs=1e-6)
        assert row["rejected_weights"] == pytest.approx([*record["rejected_weight"], 0], abs=1e-6)


def test_two_ranks_write_the_file_of_one(models, tmp_path):
    write_rows(tmp_path / "data" / "rows", "train", ROWS)
    config = make_config(models, tmp_path)
    alone = estimate(config)
    run_on_ranks(estimate, 2, config)
    path = tmp_path / "out" / "rows-weighted" / "train.jsonl"
    together = [json.loads(line) for line in path.open(encoding="utf-8")]
    for a, b in zip(together, alone, strict=True):
        assert a["chosen_weight"] == pytest.approx(b["chosen_weight"], abs=1e-5)
        assert a["rejected_weight"] == pytest.approx(b["rejected_weight"], abs=1e-5)


def test_a_template_puts_its_role_sentence_before_the_prompt(models, tmp_path):
    write_rows(tmp_path / "data" / "rows", "train", ROWS[:2])
    config = make_config(
        [models[0], models[0]], tmp_path, positive_template="harmless", negative_template="harmful"
    )
    [record, _] = estimate(config)
    sentences = [f"{ROLE_SENTENCES[name]}\n\n" for name in ("harmless", "harmful")]
    expected = expected_weights(
        [models[0]] * 2, ROWS[0]["prompt"], ROWS[0]["chosen"], prefixes=sentences
    )
    weights = torch.tensor(record["chosen_weight"], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)


def test_models_of_different_vocabularies_are_refused(models, tmp_path):
    write_rows(tmp_path / "data" / "rows", "train", ROWS)
    other = save_tiny_model(tmp_path / "other")
    tokenizer = AutoTokenizer.from_pretrained(other)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save_pretrained(other)
    with pytest.raises(CheckpointError, match="another vocabulary"):
        estimate(make_config([models[0], str(other)], tmp_path))


def test_no_split_at_all_is_refused(models, tmp_path):
    with pytest.raises(DataError, match="rows"):
        estimate(make_config(models, tmp_path))
    assert not (tmp_path / "out").exists()
