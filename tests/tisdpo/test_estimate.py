"""Estimated token weights are what the two models' own logits say, in every row form."""

import errno
import fcntl
import json
import logging
import os
import shutil
import signal
import threading
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import Mock

import numpy as np
import peft
import pytest
import torch
import torch.distributed as dist
from estimation import estimate, load, make_config, output_path, run, written_rows
from exhaustion import no_more_files
from ranks import ALONE, run_on_ranks
from tiny_models import rows_of_other_numbers, save_tiny_model, text_rows, write_rows
from tokenizers import pre_tokenizers
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref import deadline
from fastpref.batch import EncodedRow
from fastpref.batches.padded import pad_rows
from fastpref.config import DataConfig, ModelConfig, PackingConfig, SFTConfig
from fastpref.distributed import World, init_world
from fastpref.errors import (
    CheckpointError,
    ConfigError,
    DataError,
    InterruptionError,
    LostRankError,
    MemoryExhaustedError,
    PreemptionError,
)
from fastpref.model.files.identity import side_model
from fastpref.scoring import progress, ranks
from fastpref.scoring.models import SideModels, find_shared_base, load_frozen_scorer
from fastpref.scoring.ranks import repeat_scoring
from fastpref.scoring.shards import Shards, rows_digest
from fastpref.scoring.side import Side, check_finite, check_rows
from fastpref.tisdpo import settings, weight_rows
from fastpref.tisdpo.templates import ROLE_SENTENCES, apply_to_messages, apply_to_text

ROWS = text_rows(7)
SIDES = ("chosen", "rejected")
DIALOGUES = [
    {side: f"\n\nHuman: {row['prompt']}\n\nAssistant:{row[side]}" for side in SIDES} for row in ROWS
]
CHATS = [
    {"prompt": [{"role": "user", "content": row["prompt"]}]}
    | {side: [{"role": "assistant", "content": row[side]}] for side in SIDES}
    for row in ROWS
]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    return [str(save_tiny_model(folder / name, seed=i)) for i, name in enumerate(("good", "bad"))]


@pytest.fixture
def world():
    yield init_world()
    dist.destroy_process_group()


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


@pytest.mark.parametrize(("batch_size", "packed"), [(None, True), (3, False)])
def test_weights_of_text_rows_equal_the_formula_in_float64(models, tmp_path, batch_size, packed):
    write_rows(tmp_path / "data" / "rows", "train", ROWS)
    config = make_config(models, tmp_path, batch_size=batch_size)
    config.packing = PackingConfig(enabled=packed, max_tokens=40)
    written = estimate(config)
    for row, record in zip(ROWS, written, strict=True):
        assert {key: record[key] for key in row} == row
        for side in ("chosen", "rejected"):
            weights = torch.tensor(record[f"{side}_weight"], dtype=torch.float64)
            expected = expected_weights(models, row["prompt"], row[side])
            torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)
    origin = json.loads((tmp_path / "out" / "rows-weighted" / "train.weights.json").read_text())
    assert origin["positive"]["name_or_path"] == models[0]


def save_adapter(
    base: str, folder: Path, seed: int, *, rows: int | None = None, **options: Any
) -> str:
    torch.manual_seed(seed)
    options = {"r": 4, "target_modules": "all-linear"} | options
    config = peft.LoraConfig(task_type="CAUSAL_LM", **options)
    model = AutoModelForCausalLM.from_pretrained(base)
    if rows is not None:
        model.resize_token_embeddings(rows)
    adapted = peft.get_peft_model(model, config)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    adapted.save_pretrained(folder)
    AutoTokenizer.from_pretrained(base).save_pretrained(folder)
    return str(folder)


@pytest.mark.parametrize("num_ranks", [1, 2])
def test_adapters_of_one_base_stand_on_one_model_in_memory(models, tmp_path, num_ranks):
    """And give the weights that two merged models do; the base itself may be one of the sides."""
    write_rows(tmp_path / "data" / "rows", "train", ROWS)
    adapters = [save_adapter(models[0], tmp_path / f"adapter-{i}", i) for i in range(2)]
    # which sides there are is the same on every rank
    for sides in (adapters, [adapters[0], models[0]])[: 3 - num_ranks]:
        config = make_config(sides, tmp_path)
        assert find_shared_base([side_model(config.model, name) for name in sides]) is not None
        if num_ranks == 1:
            written = estimate(config)
        else:
            run_on_ranks(run, num_ranks, config)
            written = written_rows(config)
        for row, record in zip(ROWS, written, strict=True):
            weights = torch.tensor(record["chosen_weight"], dtype=torch.float64)
            expected = expected_weights(sides, row["prompt"], row["chosen"])
            torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float32"])
def test_adapters_stay_in_float32_whatever_the_model_computes_in(models, tmp_path, world, dtype):
    adapter = save_adapter(models[0], tmp_path / "adapter", 0, lora_alpha=256)
    options = ModelConfig(name_or_path=models[0], fsdp_policy_mp=dtype)
    padded = PackingConfig(enabled=False)
    scorer, _ = load_frozen_scorer(options, padded, world, longest=40, adapters={"side": adapter})
    assert {p.dtype for p in scorer.adapters.parameters()} == {torch.float32}
    batch = pad_rows([EncodedRow([3, 4, 5], [6, 7], [8])], pad_token_id=0)
    with torch.no_grad():
        bare = scorer(batch)
        scorer.adapters.activate("side")
        adapted = scorer(batch)
    exact = replace(options, name_or_path=adapter, fsdp_policy_mp=None, policy_dtype="float32")
    merged, _ = load_frozen_scorer(exact, padded, world, longest=40)
    with torch.no_grad():
        expected = merged(batch)
    tolerance = 1e-5 if dtype == "float32" else 0.025
    torch.testing.assert_close(adapted, expected, rtol=0, atol=tolerance)
    assert (bare - expected).abs().max() > 4 * tolerance


@pytest.mark.parametrize("quantized", [False, True])
def test_sides_of_one_base_are_one_loaded_model(models, tmp_path, world, quantized):
    if quantized:
        pytest.importorskip("bitsandbytes")
    names = [save_adapter(models[0], tmp_path / f"adapter-{i}", i) for i in range(2)]
    model = ModelConfig(name_or_path=models[0], fsdp_policy_mp=None)
    sides = [
        Side(label, side_model(model, name), None, None, quantized)
        for label, name in zip(("positive", "negative"), names, strict=True)
    ]
    loads = SideModels(sides, PackingConfig(enabled=False), world, longest=40)
    scorers = []
    for side in sides:
        scorers.append(loads.load(side)[0])
        loads.release(side)
    assert scorers[0] is scorers[1]
    in_four_bits = [m for m in scorers[0].modules() if type(m).__name__ == "Linear4bit"]
    assert bool(in_four_bits) == quantized


def test_tied_adapters_stand_on_one_base(models, tmp_path):
    """As they are written by a run that made them."""
    base = tmp_path / "base"
    save_tiny_model(base, tie_word_embeddings=True)
    write_rows(tmp_path / "data" / "rows", "train", ROWS)
    tied = {"target_modules": ["q_proj", "lm_head"], "ensure_weight_tying": True}
    adapters = [save_adapter(str(base), tmp_path / f"tied-{i}", i, **tied) for i in range(2)]
    config = make_config(adapters, tmp_path)
    assert find_shared_base([side_model(config.model, name) for name in adapters]) is not None
    for row, record in zip(ROWS, estimate(config), strict=True):
        weights = torch.tensor(record["chosen_weight"], dtype=torch.float64)
        expected = expected_weights(adapters, row["prompt"], row["chosen"])
        torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)


def test_models_that_share_no_base_or_have_to_be_merged_are_loaded_one_by_one(models, tmp_path):
    adapters = [save_adapter(models[i], tmp_path / f"adapter-{i}", i) for i in range(2)]
    model = ModelConfig(name_or_path=models[0])

    def shared(*names: str) -> bool:
        return find_shared_base([side_model(model, name) for name in names]) is not None

    assert shared(models[0], models[0]) and shared(adapters[0], models[0])
    assert not shared(*models) and not shared(*adapters) and not shared(adapters[0], models[1])
    edited = tmp_path / "edited"
    shutil.copytree(adapters[0], edited)
    config = json.loads((edited / "adapter_config.json").read_text())
    (edited / "adapter_config.json").write_text(json.dumps(config | {"bias": "all"}))
    assert not shared(str(edited), models[0])
    # rows of its own for added tokens
    assert not shared(save_adapter(models[0], tmp_path / "added", 0, rows=360), models[0])


ORCA = [
    {"system": "Be brief.", "question": row["prompt"]} | {side: row[side] for side in SIDES}
    for row in ROWS
]
ULTRAFEEDBACK = [
    {"prompt": chat["prompt"][0]["content"]} | {side: chat["prompt"] + chat[side] for side in SIDES}
    for chat in CHATS
]
NUMBERED = [
    {"prompt": row["prompt"], "response_0": row[SIDES[i % 2]], "response_1": row[SIDES[1 - i % 2]]}
    | {"better_response_id": i % 2}
    for i, row in enumerate(ROWS)
]
FORMS = {
    "dialogues": DIALOGUES,
    "chats": CHATS,
    "orca": ORCA,
    "ultrafeedback": ULTRAFEEDBACK,
    "numbered": NUMBERED,
}


@pytest.mark.parametrize("rows", FORMS.values(), ids=FORMS)
def test_other_forms_are_written_as_they_came_and_load_for_tisdpo(models, tmp_path, rows):
    write_rows(tmp_path / "data" / "rows", "train", rows)
    config = make_config(models, tmp_path)
    written = estimate(config)
    assert [{key: record[key] for key in rows[0]} for record in written] == rows
    for row, record in zip(load(config), written, strict=True):
        # the chosen list changes its sign, EOS weighs nothing
        chosen = [-weight for weight in record["chosen_weight"]] + [0.0]
        assert row["chosen_weights"] == pytest.approx(chosen, abs=1e-6)
        assert row["rejected_weights"] == pytest.approx([*record["rejected_weight"], 0], abs=1e-6)


@pytest.mark.parametrize("has_units", [True, False])
def test_bfloat16_gives_way_to_float32_on_a_cpu_without_units(
    models, tmp_path, monkeypatch, has_units
):
    name = "fastpref.model.precision.has_units"
    monkeypatch.setattr(name, lambda dtype: has_units)
    write_rows(tmp_path / "data" / "rows", "train", ROWS[:2])
    config = make_config(models, tmp_path)
    config.model = ModelConfig(name_or_path=models[0])
    [record, _] = estimate(config)
    expected = expected_weights(models, ROWS[0]["prompt"], ROWS[0]["chosen"])
    weights = torch.tensor(record["chosen_weight"], dtype=torch.float64)
    error = (weights - expected).abs().max()
    assert (error > 1e-5) == has_units
    origin = json.loads((output_path(config).parent / "train.weights.json").read_text())
    assert origin["compute_dtype"] == ("bfloat16" if has_units else "float32")


@pytest.mark.parametrize("batch_size", [None, 2])
def test_two_ranks_write_the_file_of_one(models, tmp_path, batch_size):
    write_rows(tmp_path / "data" / "rows", "train", ROWS)
    config = make_config(models, tmp_path, batch_size=batch_size, shard_rows=5)
    config.packing.max_tokens = 40
    alone = estimate(config)
    output_path(config).unlink()
    run_on_ranks(run, 2, config)
    for a, b in zip(written_rows(config), alone, strict=True):
        assert a["chosen_weight"] == pytest.approx(b["chosen_weight"], abs=1e-5)
        assert a["rejected_weight"] == pytest.approx(b["rejected_weight"], abs=1e-5)


def test_no_number_is_fetched_from_a_gpu_that_waits_for_a_lost_rank(models, tmp_path, monkeypatch):
    def lost(world: World) -> None:
        raise LostRankError("a GPU waits, with no word of rank 1")

    monkeypatch.setattr(ranks, "await_device", lost)
    write_rows(tmp_path / "data" / "rows", "train", text_rows(3))
    with pytest.raises(LostRankError):
        run(make_config(models, tmp_path))


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


def test_weights_round_as_the_tisdpo_code_rounds(models, tmp_path):
    write_rows(tmp_path / "data" / "rows", "train", ROWS)
    exact = estimate(make_config(models, tmp_path))
    rounded = estimate(make_config(models, tmp_path, round=2))
    for a, b in zip(exact, rounded, strict=True):
        assert [round(weight, 2) for weight in a["chosen_weight"]] == b["chosen_weight"]
    assert any(len(str(weight)) > 6 for weight in exact[0]["chosen_weight"])


def test_eos_gets_a_weight_on_request_and_keeps_it_in_training(models, tmp_path):
    write_rows(tmp_path / "data" / "rows", "train", ROWS)
    config = make_config(models, tmp_path, include_eos=True)
    written = estimate(config)
    without = estimate(make_config(models, tmp_path))
    for a, b in zip(written, without, strict=True):
        assert len(a["chosen_weight"]) == len(b["chosen_weight"]) + 1
        assert a["chosen_weight"][:-1] == pytest.approx(b["chosen_weight"], abs=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    [last] = expected_weights(models, ROWS[0]["prompt"] + ROWS[0]["chosen"], tokenizer.eos_token)
    assert written[0]["chosen_weight"][-1] == pytest.approx(last.item(), abs=1e-5)

    estimate(config)
    for row, record in zip(load(config), written, strict=True):
        expected = [-weight for weight in record["chosen_weight"]]
        assert row["chosen_weights"] == pytest.approx(expected, abs=1e-6)
    assert load(config, eos_weight=0.25)[0]["rejected_weights"][-1] == 0.25


def test_models_may_be_run_folders_and_archives(models, tmp_path):
    write_rows(tmp_path / "data" / "rows", "train", ROWS)
    expected = estimate(make_config(models, tmp_path))
    run_folder = tmp_path / "run"
    run_folder.mkdir()
    (run_folder / "LATEST").symlink_to(models[0])
    state = AutoModelForCausalLM.from_pretrained(models[1]).state_dict()
    archive = tmp_path / "policy.pt"
    torch.save({"step_idx": 1, "state": state, "metrics": {}}, archive)
    config = make_config(models, tmp_path)
    config.weights.positive, config.weights.negative = str(run_folder), str(archive)
    output_path(config).unlink()
    assert estimate(config) == expected


def test_a_system_message_holds_the_template_of_a_conversation(models, tmp_path):
    write_rows(tmp_path / "data" / "rows", "train", CHATS[:2])
    text = "Answer as a liar would."
    config = make_config([models[0]] * 2, tmp_path, negative_template=text)
    [record, _] = estimate(config)
    tokenizer = AutoTokenizer.from_pretrained(models[0])
    system = {"role": "system", "content": text}
    prompts = [
        tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        for messages in (CHATS[0]["prompt"], [system, *CHATS[0]["prompt"]])
    ]
    full = tokenizer.apply_chat_template(
        CHATS[0]["prompt"] + CHATS[0]["chosen"], tokenize=False
    ).removeprefix(prompts[0])
    response = full.rstrip().removesuffix(tokenizer.eos_token)
    # the two prompts are written out: nothing comes before them
    expected = expected_weights([models[0]] * 2, "", response, prefixes=prompts)
    weights = torch.tensor(record["chosen_weight"], dtype=torch.float64)
    torch.testing.assert_close(weights, expected, rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("", "Q"),
        ("Be good.", "Be good.\n\nQ"),
        ("Lie! {prompt} Now:", "Lie! Q Now:"),
    ],
)
def test_a_template_goes_before_a_text_prompt_or_around_it(text, expected):
    assert apply_to_text(text, "Q") == expected


def test_a_template_joins_the_system_message_or_wraps_the_last_question():
    system, first, answer, last = (
        {"role": role, "content": role[0]} for role in ("system", "user", "assistant", "user")
    )
    assert apply_to_messages("T T", [system, first]) == [
        {"role": "system", "content": "T T\n\ns"},
        first,
    ]
    wrapped = apply_to_messages("<{prompt}>", [first, answer, last])
    assert wrapped == [first, answer, {"role": "user", "content": "<u>"}]


def test_a_template_takes_content_that_is_missing_or_a_list_of_parts():
    parts = {"role": "user", "content": [{"type": "text", "text": "u"}, "v"]}
    calls = {"role": "assistant", "content": None, "tool_calls": [{}]}
    assert apply_to_messages("<{prompt}>", [parts, calls]) == [parts | {"content": "<uv>"}, calls]
    assert apply_to_messages("T", [parts | {"role": "system"}])[0]["content"] == "T\n\nuv"
    assert apply_to_messages("T", [{"role": "system"}])[0]["content"] == "T"


class Interrupter(threading.Thread):
    """Sends a signal to this process once so many shards are there."""

    def __init__(self, folder: Path, num_shards: int) -> None:
        super().__init__(daemon=True)
        self.folder, self.num_shards = folder, num_shards

    def run(self) -> None:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            if len(list(self.folder.glob("*/*.npz"))) >= self.num_shards:
                os.kill(os.getpid(), signal.SIGINT)
                return
            time.sleep(0.0005)


def test_an_interrupted_estimation_goes_on_and_writes_the_identical_file(models, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="fastpref")
    write_rows(tmp_path / "data" / "rows", "train", text_rows(120))
    config = make_config(models, tmp_path, batch_size=1, shard_rows=6)
    estimate(config)
    path = output_path(config)
    whole = path.read_bytes()
    path.unlink()

    shards = path.with_name("train.shards")
    stopper = Interrupter(shards, 3)
    stopper.start()
    with pytest.raises(InterruptionError, match="shards of the positive model"):
        run(config)
    stopper.join()
    kept = {file: file.stat().st_mtime_ns for file in shards.glob("*/*.npz")}
    assert 3 <= len(kept) < 20 and not path.exists()

    # what a power failure may leave: half a shard, and a file that was being written
    damaged = min(kept)
    damaged.write_bytes(damaged.read_bytes()[:100])
    # and a disk in the end: one bit of a number
    flipped = max(kept)
    content = bytearray(flipped.read_bytes())
    content[len(content) // 2] ^= 1
    flipped.write_bytes(content)
    (damaged.parent / "000019.npz.partial").write_bytes(b"x")
    # another model's shards lie in the same place and are not taken for its own
    other = replace(config, weights=replace(config.weights, negative=models[0], positive=models[1]))
    stopper = Interrupter(shards, len(kept) + 2)
    stopper.start()
    with pytest.raises(InterruptionError):
        run(other)
    stopper.join()
    assert len({file.parent.name for file in shards.glob("*/*.npz")}) == 2

    # the rows were staged anew
    os.utime(tmp_path / "data" / "rows" / "train.jsonl", (1, 1))
    caplog.clear()
    run(config)
    assert path.read_bytes() == whole
    assert not shards.exists()
    assert f"positive model: {len(kept) - 2} of 20 shards are there already" in caplog.text
    for file in (damaged, flipped):
        assert f"{file} is damaged and scored again" in caplog.text


@pytest.mark.parametrize(("side", "num_written"), [("positive", 1), ("negative", 2)])
def test_a_signal_during_the_last_shard_of_a_model_is_not_forgotten(
    models, tmp_path, monkeypatch, side, num_written
):
    write_rows(tmp_path / "data" / "rows", "train", ROWS)
    config = make_config(models, tmp_path)
    real, written = Shards.write, []

    def write(self: Shards, *shard: Any) -> None:
        real(self, *shard)
        written.append(shard)
        if len(written) == num_written:
            signal.raise_signal(signal.SIGTERM)

    monkeypatch.setattr(Shards, "write", write)
    with pytest.raises(PreemptionError, match=f"1 of 1 shards of the {side} model are kept"):
        run(config)
    assert len(written) == num_written and not output_path(config).exists()
    run(config)
    assert len(written) == 2 and output_path(config).exists()


def test_shards_hold_the_longest_rows_first_and_give_them_back_in_file_order(tmp_path):
    lengths = ((1, 2, 1), (4, 3, 2), (2, 1, 5))
    rows = [EncodedRow([1] * p, [2] * chosen, [3] * rejected) for p, chosen, rejected in lengths]
    shards = Shards.of(tmp_path, rows, 2)
    assert (len(shards), shards.longest) == (2, 7)
    assert [shards.rows_of(shard) for shard in range(2)] == [[1, 2], [0]]
    # a prompt counts for both sequences
    assert [shards.num_tokens([shard]) for shard in range(2)] == [13 + 10, 5]
    shards.write(0, np.arange(11, dtype=np.float32))
    assert shards.missing() == [1]
    shards.write(1, np.zeros(2, np.float32))
    with pytest.raises(CheckpointError, match="is scored anew"):
        shards.read()
    shards.write(1, np.arange(3, dtype=np.float32))
    found = [[side.tolist() for side in pair] for pair in shards.read()]
    assert found == [[[0, 1], [2]], [[0, 1, 2], [3, 4]], [[5], [6, 7, 8, 9, 10]]]


def test_rows_of_other_tokens_or_masks_are_not_those_that_were_scored():
    rows = rows_of_other_numbers()
    digests = {rows_digest(some) for some in (*([row] for row in rows), rows[:1] * 2)}
    assert len(digests) == 1 + len(rows)


def test_a_shard_of_pickled_objects_is_not_loaded(tmp_path):
    shards = Shards.of(tmp_path, [EncodedRow([1], [2], [3])], 1)
    np.savez(tmp_path / "000000.npz", logps=np.array([-1.0, None]))
    assert shards.missing() == [0]


def test_a_shard_that_no_descriptor_is_left_for_is_not_called_damaged(tmp_path, caplog):
    row = EncodedRow([1], [2], [3])
    shards = Shards.of(tmp_path, [row], 1)
    shards.write(0, np.zeros(2, np.float32))
    with pytest.raises(OSError) as raised, no_more_files():
        shards.missing()
    assert raised.value.errno == errno.EMFILE and not caplog.text
    assert shards.missing() == []


def test_without_a_terminal_the_log_says_how_far_scoring_is(monkeypatch, caplog):
    caplog.set_level(logging.INFO, logger="fastpref")
    seconds = iter([50.0, 58.0, 70.0, 75.0])
    monkeypatch.setattr(progress, "time", SimpleNamespace(perf_counter=lambda: next(seconds)))
    with progress.ScoringProgress("bad model", 1000, num_shards=3, visible=True) as scoring:
        for tokens in (100, 300, 100):
            scoring.advance(tokens)
        scoring.shard_is_done()
    assert caplog.messages == ["bad model: 40 % of 1,000 tokens, 20 tokens/s, 30 s left"]
    assert scoring.done == "1 of 3 shards of the bad model"


def test_an_estimation_ends_by_its_deadline_and_goes_on(models, tmp_path, monkeypatch):
    write_rows(tmp_path / "data" / "rows", "train", text_rows(12))
    config = make_config(models, tmp_path, shard_rows=3)
    whole = estimate(config)
    path = output_path(config)
    path.unlink()
    shards = path.with_name("train.shards")

    def seconds_since_start() -> float:
        return 100.0 if len(list(shards.glob("*/*.npz"))) == 2 else 0.0

    config.checkpoint.deadline = "00:01:30"
    with monkeypatch.context() as patch:
        patch.setattr(deadline, "seconds_since_start", seconds_since_start)
        words = "checkpoint.deadline is near; 2 of 4 shards of the positive model are kept"
        with pytest.raises(PreemptionError, match=words):
            run(config)
        # no model is loaded when the time is over
        patch.setattr(SideModels, "load", None)
        with pytest.raises(PreemptionError, match="is near; shards that are complete are kept"):
            run(config)
    assert len(list(shards.glob("*/*.npz"))) == 2
    config.checkpoint.deadline = None
    assert estimate(config) == whole


def test_a_finished_file_is_not_estimated_again_until_something_changes(
    models, tmp_path, monkeypatch
):
    data = write_rows(tmp_path / "data" / "rows", "train", ROWS)
    config = make_config(models, tmp_path)
    # killed once it was written
    with monkeypatch.context() as patch:
        patch.setattr(weight_rows.shutil, "rmtree", lambda *args, **options: None)
        before = estimate(config)
    path = output_path(config)
    assert len(list(path.parent.glob("train.shards/*"))) == 2
    (path.parent / "train.jsonl.complete.partial").write_text("half a row")
    written = path.stat().st_mtime_ns
    os.utime(data, (1, 1))
    estimate(config)
    assert path.stat().st_mtime_ns == written
    left = {child.name for child in path.parent.iterdir()} - {"weights.html", "weights.png"}
    assert left == {".lock", "train.jsonl", "train.weights.json"}
    # a column that no weight depends on
    write_rows(data.parent, "train", [row | {"source": "web"} for row in ROWS])
    assert estimate(config) == [row | {"source": "web"} for row in before]
    path.write_text(path.read_text(encoding="utf-8")[:-200], encoding="utf-8")
    assert len(estimate(config)) == len(ROWS)
    before = estimate(config)
    config.weights.negative_template = "You lie a lot."
    assert estimate(config)[0]["chosen_weight"] != before[0]["chosen_weight"]


def test_another_stored_dtype_or_library_makes_other_weights(models, tmp_path, monkeypatch, caplog):
    write_rows(tmp_path / "data" / "rows", "train", ROWS)
    config = make_config(models, tmp_path)
    config.weights.round = None
    caplog.set_level("INFO", "fastpref")
    before = estimate(config)
    assert "will be replaced" not in caplog.text
    config.model.reference_dtype = "float16"
    rounded = estimate(config)
    assert f"{output_path(config)} holds weights of other models, settings or rows" in caplog.text
    assert rounded[0]["chosen_weight"] != before[0]["chosen_weight"]
    written = output_path(config).stat().st_mtime_ns
    monkeypatch.setattr(settings, "version", lambda name: f"newer {name}")
    assert estimate(config) == rounded
    assert output_path(config).stat().st_mtime_ns != written


def test_one_process_at_a_time_writes_the_weights_of_a_dataset(models, tmp_path):
    write_rows(tmp_path / "data" / "rows", "train", ROWS)
    config = make_config(models, tmp_path)
    folder = output_path(config).parent
    folder.mkdir(parents=True)
    with (folder / ".lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        words = f"weights.output_dir: another process is writing to {folder}"
        with pytest.raises(ConfigError, match=words):
            run(config)
    assert [child.name for child in folder.iterdir()] == [".lock"]
    assert len(estimate(config)) == len(load(config)) == len(ROWS)


def test_files_of_others_are_not_written_over(models, tmp_path):
    write_rows(tmp_path / "data" / "rows", "train", ROWS)
    source = tmp_path / "data" / "rows" / "train.jsonl"
    config = make_config(models, tmp_path)
    path = output_path(config)
    path.parent.mkdir(parents=True)
    path.write_text("hours of another tool\n")
    with pytest.raises(ConfigError, match=r"train.jsonl is there and has no record"):
        run(config)
    assert path.read_text() == "hours of another tool\n"
    path.unlink()
    path.symlink_to(source)
    with pytest.raises(ConfigError, match=r"is a file whose rows are read; set another folder"):
        run(config)
    assert [json.loads(line) for line in source.open()] == ROWS
    # one file under the names of two splits is estimated once
    path.unlink()
    source.rename(source.with_name("all.jsonl"))
    config.data = DataConfig(split_names={"train": "all", "test": "all"})
    run(config)
    assert [child.name for child in path.parent.glob("*.jsonl")] == ["all.jsonl"]
    assert len((path.parent / "all.jsonl").read_text().splitlines()) == len(ROWS)


def test_the_options_that_read_the_rows_read_their_weights(models, tmp_path):
    """Shards, splits and columns of other names: the same options find the file of weights."""
    data = {
        "columns": {"question": "ask", "chosen": "good", "rejected": "bad"},
        "split_names": {"train": "train_prefs"},
    }
    rows = [{"ask": row["prompt"], "good": row["chosen"], "bad": row["rejected"]} for row in ROWS]
    for i, part in enumerate((rows[:3], rows[3:])):
        write_rows(tmp_path / "data" / "rows" / "data", f"train_prefs-0000{i}-of-00002", part)
    config = make_config(models, tmp_path)
    config.data = DataConfig(**data)
    run(config)
    folder = output_path(config).parent
    assert (folder / "train_prefs.jsonl").is_file() and not output_path(config).exists()
    written = [json.loads(line) for line in (folder / "train_prefs.jsonl").open()]
    assert [{key: record[key] for key in rows[0]} for record in written] == rows
    for row, record in zip(load(config, **data), written, strict=True):
        assert row["rejected_weights"] == pytest.approx([*record["rejected_weight"], 0], abs=1e-6)


def test_weights_of_another_rendering_are_refused_with_its_arguments(models, tmp_path):
    write_rows(tmp_path / "data" / "rows", "train", CHATS)
    template = tmp_path / "template.jinja"
    template.write_text(
        "{{ tone | default('plain') }}: {% for m in messages %}[{{ m['role'] }}] {{ m['content'] }}"
        "{% endfor %}{% if add_generation_prompt %}[assistant] {% endif %}"
    )
    config = make_config(models, tmp_path)
    told = {"chat_template": str(template), "template_kwargs": {"tone": "kind"}}
    config.data = DataConfig(**told)
    estimate(config)
    assert load(config, **told)
    with pytest.raises(DataError, match=r"estimated with data\.template_kwargs=.*'tone': 'kind'"):
        load(config, chat_template=str(template))


def test_rows_of_one_response_have_no_weights(models, tmp_path):
    rows = [{"prompt": row["prompt"], "completion": row["chosen"]} for row in ROWS]
    write_rows(tmp_path / "data" / "rows", "train", rows)
    config = make_config(models, tmp_path)
    config.loss = SFTConfig()
    with pytest.raises(DataError, match=r"train\.jsonl:1:rejected: one response a row"):
        run(config)


def test_weights_beside_other_tokens_are_refused_by_file_and_row(models, tmp_path):
    write_rows(tmp_path / "data" / "rows", "train", ROWS)
    config = make_config(models, tmp_path)
    rows = estimate(config)
    path = output_path(config)

    def refusal(tokenizer=None) -> str:
        with pytest.raises(DataError) as refused:
            load(config, tokenizer)
        assert refused.value.exit_code == 3
        return str(refused.value)

    tokenizer = AutoTokenizer.from_pretrained(models[0])
    # one word of text changes places: as many tokens as before
    changed = [dict(row) for row in rows]
    changed[3]["chosen"] = " ".join([" ", *reversed(ROWS[3]["chosen"].split())])
    write_rows(path.parent, "train", changed)
    assert f"{path}:4" in refusal() and "was changed" in refusal()
    changed = [dict(row) for row in rows]
    changed[1]["rejected_weight"] = changed[1]["rejected_weight"][:-1]
    write_rows(path.parent, "train", changed)
    assert f"{path}:2:rejected_weight" in refusal() and "expected" in refusal()
    changed[1]["rejected_weight"] = [float("nan")] * len(rows[1]["rejected_weight"])
    write_rows(path.parent, "train", changed)
    assert f"{path}:2:rejected_weight" in refusal() and "nan" in refusal()
    write_rows(path.parent, "train", rows[:5])
    assert f"{path}:5: the file ends here, 7 rows were written" in refusal()
    write_rows(path.parent, "train", rows)
    tokenizer.backend_tokenizer.pre_tokenizer = pre_tokenizers.Sequence([])
    assert f"{path}:1" in refusal(tokenizer) and "another one" in refusal(tokenizer)
    path.with_name("train.weights.json").write_text('{"rows": 7')
    assert "train.weights.json: not a record" in refusal()


def test_a_model_of_nan_is_named_with_its_weights(models, tmp_path):
    write_rows(tmp_path / "data" / "rows", "train", ROWS)
    broken = AutoModelForCausalLM.from_pretrained(models[1])
    # one word is poisoned
    torch.nn.init.constant_(broken.get_input_embeddings().weight[7], torch.nan)
    broken.save_pretrained(tmp_path / "broken")
    AutoTokenizer.from_pretrained(models[1]).save_pretrained(tmp_path / "broken")
    config = make_config([models[0], str(tmp_path / "broken")], tmp_path)
    with pytest.raises(CheckpointError, match=r"/broken\) are not finite.*: model\.embed_tokens"):
        run(config)
    assert not output_path(config).exists()
    # what the sound model said is kept
    assert list(output_path(config).parent.glob("train.shards/positive-*/*.npz"))


def test_a_log_probability_of_nan_is_named_with_its_row_and_token():
    rows = SimpleNamespace(place=lambda i: f"train.jsonl:{i + 1}")
    origin = SimpleNamespace(name_or_path="broken")
    side = SimpleNamespace(label="negative", origin=origin)
    sound, broken = np.array([-1.0, -2.0]), np.array([-1.0, np.nan])
    check_finite([(sound, sound)], [0], rows, side)
    with pytest.raises(
        CheckpointError, match=r"broken gives .* nan at .*train.jsonl:2:rejected.* 2"
    ):
        check_finite([(sound, sound), (sound, broken)], [0, 1], rows, side)
    with pytest.raises(CheckpointError, match=r"of -inf at train.jsonl:1:chosen, token 1"):
        check_finite([(np.array([-np.inf, -1.0]), sound)], [0], rows, side)


def test_a_log_probability_that_is_not_finite_is_not_stored(models, tmp_path, monkeypatch):
    write_rows(tmp_path / "data" / "rows", "train", ROWS)
    config = make_config(models, tmp_path)
    real = ranks.split_sequences
    infinite = [np.array([-np.inf], np.float32)]
    monkeypatch.setattr(
        ranks,
        "split_sequences",
        lambda logps_N, batch: real(np.concatenate([*infinite, logps_N[1:]]), batch),
    )
    with pytest.raises(CheckpointError, match=r"-inf at .*train\.jsonl:\d:chosen, token 1"):
        run(config)
    assert not list(output_path(config).parent.glob("train.shards/*/*.npz"))


@pytest.mark.parametrize(
    ("batch_size", "remedy"), [(None, "packing.max_tokens=3"), (4, "a smaller weights.batch_size")]
)
def test_memory_that_runs_out_names_the_option_that_sets_the_batch(batch_size, remedy, caplog):
    results = iter([torch.OutOfMemoryError("Tried to allocate 2.00 GiB"), [1], [2]])

    def score(rows: list[int]) -> list[int]:
        result = next(results)
        if isinstance(result, Exception):
            raise result
        return result

    scored = repeat_scoring(ALONE, batch_size).compute_items([3, 4], score, tokens=int)
    assert scored == [1, 2] and f"{remedy} starts with that" in caplog.text


def test_a_row_that_scoring_has_no_memory_for_is_not_told_of_activations(
    models, tmp_path, monkeypatch
):
    write_rows(tmp_path / "data" / "rows", "train", ROWS)
    no_memory = Mock(side_effect=torch.OutOfMemoryError("Tried to allocate 2.00 GiB"))
    monkeypatch.setattr(ranks.Ranks, "_score", no_memory)
    with pytest.raises(MemoryExhaustedError, match="single row; a smaller max_length or more GPUs"):
        run(make_config(models, tmp_path))


def test_rows_longer_than_a_model_was_made_for_are_told(tmp_path, caplog):
    short = [str(save_tiny_model(tmp_path / "model", max_position_embeddings=8))] * 2
    write_rows(tmp_path / "data" / "rows", "train", ROWS)
    run(make_config(short, tmp_path, negative_template="You lie."))
    [told, *_] = [x for x in caplog.messages if "LlamaForCausalLM was made for 8 by" in x]
    tokenizer = AutoTokenizer.from_pretrained(short[0])
    lengths = [len(tokenizer(row["prompt"] + row[x])["input_ids"]) for row in ROWS for x in SIDES]
    assert f"the longest sequence has {max(lengths)} tokens" in told


def test_rows_that_a_model_has_no_embedding_or_positions_for_are_refused_by_file_and_row():
    embedding = torch.nn.Embedding(10, 4)
    body = torch.nn.ModuleList([embedding, torch.nn.Embedding(6, 4)])
    config = SimpleNamespace(max_position_embeddings=6)
    config.get_text_config = lambda: config
    twin = SimpleNamespace(
        config=config, get_input_embeddings=lambda: embedding, get_decoder=lambda: body
    )
    rows = SimpleNamespace(place=lambda i: f"train.jsonl:{i + 1}")
    origin = SimpleNamespace(name_or_path="small")
    side = SimpleNamespace(label="positive", twin=twin, origin=origin)
    fits = EncodedRow([1, 2, 3], [9], [4, 5, 6])
    check_rows(rows, [fits], side)
    with pytest.raises(CheckpointError, match=r"positive: train.jsonl:2 has token id 10, "):
        check_rows(rows, [fits, EncodedRow([1], [2], [10])], side)
    with pytest.raises(DataError, match=r"train.jsonl:2: 7 tokens, small has positions for 6"):
        check_rows(rows, [fits, EncodedRow([1, 2, 3], [4], [4, 5, 6, 7])], side)


@pytest.mark.parametrize("key", ["positive", "negative"])
def test_a_missing_model_is_named_by_its_option(models, tmp_path, key):
    write_rows(tmp_path / "data" / "rows", "train", ROWS)
    config = make_config(models, tmp_path)
    setattr(config.weights, key, str(tmp_path / "no" / "model"))
    with pytest.raises(CheckpointError, match=f"weights.{key}: no folder"):
        run(config)


def test_a_source_without_rows_is_refused(models, tmp_path):
    write_rows(tmp_path / "data" / "rows", "train", [])
    with pytest.raises(DataError, match="0 rows in split 'train'"):
        run(make_config(models, tmp_path))
