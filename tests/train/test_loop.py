"""Whole runs on tiny models: the same numbers however the work is split, and what they leave."""

import dataclasses
import json
import logging
import math
import shutil
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from safetensors.torch import load_file
from tiny_models import DISTANCES, read_metrics, save_dataset, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer

from fastpref.checkpoint.agreement import Agreement
from fastpref.checkpoint.store import CheckpointStore
from fastpref.config import (
    CheckpointConfig,
    Config,
    DPOConfig,
    IPOConfig,
    ModelConfig,
    PackingConfig,
    SFTConfig,
    SimPOConfig,
    TDPOConfig,
    TISDPOConfig,
)
from fastpref.distributed import init_world
from fastpref.errors import ConfigError
from fastpref.signals import StopRequest
from fastpref.train import loop
from fastpref.train.build import build_run
from fastpref.train.evaluation import evaluate
from fastpref.train.logs import metrics
from fastpref.train.resume.start import find_start
from fastpref.train.run_folder import run_place
from fastpref.train.task import train

LOSSES = {
    "sft": SFTConfig,
    "dpo": DPOConfig,
    "ipo": IPOConfig,
    "simpo": SimPOConfig,
    "tdpo1": lambda: TDPOConfig(if_tdpo2=False),
    "tdpo2": TDPOConfig,
    "tisdpo": TISDPOConfig,
    "tisdpo token_level": lambda: TISDPOConfig(token_level=True),
}


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with data and two models, one tied and one not."""
    base = tmp_path_factory.mktemp("runs")
    save_dataset(base, "words")
    save_tiny_model(base / "tied", tie_word_embeddings=True)
    save_tiny_model(base / "untied", tie_word_embeddings=False)
    return base


def make_config(
    base: Path, run_dir: Path, model: str = "tied", loss: Any = None, **options: Any
) -> Config:
    values: dict[str, Any] = {
        "model": ModelConfig(name_or_path=str(base / model), fsdp_policy_mp=None),
        "loss": loss or DPOConfig(),
        "datasets": ["words"],
        "base_data_dir": str(base),
        "run_dir": str(run_dir),
        "batch_size": 8,
        "eval_batch_size": 4,
        "eval_every": 16,
        "n_epochs": 2,
        "lr": 1e-3,
        "warmup_steps": 2,
        "max_length": 64,
        "max_prompt_length": 32,
        "sample_during_eval": False,
        "minimum_log_interval_secs": 0.0,
    }
    return Config(**(values | options))


def run(config: Config) -> Path:
    """Train in this process (or on this rank); returns the run folder."""
    world = init_world()
    try:
        train(config, world)
    finally:
        dist.destroy_process_group()
    return Path(config.run_dir)


def weights_of(run_dir: Path) -> dict[str, torch.Tensor]:
    return load_file(run_dir / "LATEST" / "model.safetensors")


def assert_same_run(ours: Path, expected: Path, *, loss_tolerance: float = 1e-5) -> None:
    for split in ("train", "eval"):
        for a, b in zip(read_metrics(ours, split), read_metrics(expected, split), strict=True):
            for key, value in b.items():
                if key.startswith(("loss", "rewards", "kl", "logps", "grad_norm")):
                    bound = loss_tolerance * max(1.0, abs(value))
                    assert abs(a[key] - value) <= bound, f"{key}: {a[key]} != {value}"
    theirs = weights_of(expected)
    for name, weight in weights_of(ours).items():
        error = (weight - theirs[name]).norm() / theirs[name].norm()
        assert error <= 1e-5, f"{name}: {error:.2e}"


@pytest.mark.parametrize("packed", [True, False])
def test_a_batch_need_not_be_a_multiple_of_its_micro_batches(base, tmp_path, packed):
    # 24 rows: batches of 5 and a last one of 4, in 3 micro-batches or in more than there are rows
    runs = []
    for steps in (1, 3, 8):
        config = make_config(
            base,
            tmp_path / str(steps),
            loss=TDPOConfig(),
            batch_size=5,
            n_epochs=1,
            gradient_accumulation_steps=steps,
            packing=PackingConfig(enabled=packed, max_tokens=8192),
        )
        config.data.drop_last = False
        runs.append(run(config))
    assert_same_run(runs[1], runs[0])
    assert_same_run(runs[2], runs[0])


PACKINGS = {
    "shared": PackingConfig(),
    "unshared": PackingConfig(share_prompt="false"),
    # a step of 8 pairs takes several micro-batches
    "small budget": PackingConfig(max_tokens=100),
    "padded": PackingConfig(enabled=False),
}


@pytest.mark.parametrize("loss", ["sft", "tdpo2"])
def test_packed_in_any_way_or_padded_a_run_is_the_same(base, tmp_path, loss):
    runs = {
        name: run(make_config(base, tmp_path / name, loss=LOSSES[loss](), packing=packing))
        for name, packing in PACKINGS.items()
    }
    computed = {
        name: read_metrics(run_dir, "train")[0]["tokens_computed"] for name, run_dir in runs.items()
    }
    assert computed["shared"] <= computed["small budget"] <= computed["unshared"]
    assert computed["unshared"] < computed["padded"]
    for name, run_dir in runs.items():
        assert_same_run(run_dir, runs["padded"])
        if loss != "sft":
            first = read_metrics(run_dir, "train")[0]["loss/train"]
            assert first == pytest.approx(math.log(2), abs=1e-6), name


def test_a_model_that_cannot_pack_trains_on_padded_rows_and_the_log_says_why(
    base, tmp_path, caplog
):
    save_tiny_model(base / "distances", **DISTANCES)
    with caplog.at_level(logging.INFO):
        run_dir = run(make_config(base, tmp_path / "run", "distances", n_epochs=1))
    assert read_metrics(run_dir, "train")[0]["loss/train"] == pytest.approx(math.log(2), abs=1e-6)
    (warning,) = [m for m in caplog.messages if "cannot be trained on packed rows" in m]
    assert "BloomForCausalLM cannot be trained on packed rows: " in warning
    config = make_config(base, tmp_path / "refused", "distances")
    config.packing.share_prompt = "true"
    with pytest.raises(ConfigError, match=r"packing\.share_prompt=true.*cannot share prompts"):
        run(config)


@pytest.mark.skipif(shutil.which("g++") is None, reason="torch.compile needs a compiler")
@pytest.mark.parametrize(("loss", "recompute"), [("sft", False), ("dpo", True)])
def test_compiled_blocks_give_the_same_step(base, tmp_path, monkeypatch, loss, recompute):
    if recompute:
        # what is computed again is the tracer's affair, not the compiler's behind it
        monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="aot_eager"))
    records = []
    for compiled in (False, True):
        torch._dynamo.reset()
        config = make_config(
            base,
            tmp_path / str(compiled),
            loss=LOSSES[loss](),
            n_examples=8,
            n_epochs=None,
            n_eval_examples=0,
            compile=str(compiled),
            activation_checkpointing=recompute,
        )
        records += read_metrics(run(config), "train")
    for key in ("loss/train", "grad_norm", "logps_train/chosen"):
        assert records[1][key] == pytest.approx(records[0][key], rel=1e-5), key


def test_rows_of_one_length_are_compiled_once(base, tmp_path, monkeypatch):
    # what is compiled again is the tracer's decision, not the compiler's behind it
    traced = partial(torch.compile, backend="aot_eager")
    monkeypatch.setattr(torch, "compile", traced)
    torch._dynamo.reset()
    graphs = torch._dynamo.utils.counters["stats"]
    config = make_config(base, tmp_path / "run", n_eval_examples=0, compile="true")
    config.packing.max_tokens = 2048
    world = init_world()
    parts = build_run(config, world, find_start("never", run_place(config), Agreement(world)))
    compiled, lengths = 0, set[int]()
    for index in range(parts.train.order.num_steps):
        (batch,) = parts.train.step(index, world).batches
        losses, _ = parts.step_loss.compute(batch, index)
        losses.sum().backward()
        parts.step_loss.done()
        if index == 1:
            # sampling, whose cache is longer after every token, compiles nothing
            compiled = graphs["unique_graphs"]
            ids = batch.input_ids[:, :5]
            parts.policy.generate(ids, torch.ones_like(ids), max_new_tokens=4)
            assert graphs["unique_graphs"] == compiled
        length = batch.input_ids.shape[1]
        assert length not in lengths or graphs["unique_graphs"] == compiled > 0
        compiled = graphs["unique_graphs"]
        if length in lengths and index > 1:
            break
        lengths.add(length)
    else:
        pytest.fail("no two rows are equally long")
    dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_in_no_step_the_host_waits_for_the_device(base, tmp_path, monkeypatch, dtype):
    train_step = loop.train_step

    def watched(run, batches, step):
        # the first one compiles kernels
        torch.cuda.set_sync_debug_mode("error" if step else "default")
        try:
            return train_step(run, batches, step)
        finally:
            torch.cuda.set_sync_debug_mode("default")

    monkeypatch.setattr(loop, "train_step", watched)
    config = make_config(base, tmp_path / "run", loss=TDPOConfig(), n_eval_examples=0)
    config.model.fsdp_policy_mp = dtype
    run(config)


def run_each(configs: list[Config]) -> None:
    """On each rank: one run after the other, in the same world."""
    world = init_world()
    for config in configs:
        train(config, world)
    dist.destroy_process_group()


def test_two_ranks_give_the_single_process_run(base, tmp_path):
    cases = {
        "tied tdpo2": {"model": "tied", "loss": TDPOConfig(), "sample_during_eval": True},
        "untied tisdpo": {"model": "untied", "loss": TISDPOConfig(token_level=True)},
        # 24 rows and batches of 20: ranks get 3 and 2 of a micro-batch, at the end 1 and 1
        "sft uneven": {"loss": SFTConfig(), "batch_size": 20, "gradient_accumulation_steps": 4},
        # 5 rows, 3 micro-batches: the last one, and those of the last batch, leave ranks without
        "tdpo2 odd": {"loss": TDPOConfig(), "batch_size": 5, "gradient_accumulation_steps": 3},
        # one rank never has a row
        "tdpo2 single": {"loss": TDPOConfig(), "batch_size": 1, "n_examples": 4},
        "dpo single padded": {"batch_size": 1, "n_examples": 4},
    }
    configs = {}
    for name, options in cases.items():
        config = make_config(base, tmp_path / name, **{"model": "tied", "n_epochs": 1, **options})
        config.data.drop_last = config.batch_size == 8
        config.packing.enabled = not name.endswith("padded")
        config.packing.max_tokens = 8192
        run(config)
        configs[name] = dataclasses.replace(config, run_dir=str(tmp_path / f"{name} x2"))
    run_on_ranks(run_each, 2, list(configs.values()))
    for name in cases:
        assert_same_run(tmp_path / f"{name} x2", tmp_path / name)
    # ranks sample together, from the same seed as one process
    samples = [(tmp_path / f"tied tdpo2{x2}" / "samples.jsonl").read_text() for x2 in ("", " x2")]
    assert samples[0].splitlines()[:16] == samples[1].splitlines()[:16]


@pytest.mark.looks_at_pictures
@pytest.mark.parametrize("loss", LOSSES)
def test_a_run_of_every_loss_learns_and_leaves_what_a_user_needs(base, tmp_path, loss):
    options = {"n_epochs": 8, "eval_every": 64}
    run_dir = run(make_config(base, tmp_path / "run", loss=LOSSES[loss](), **options))
    train_records, evals = read_metrics(run_dir, "train"), read_metrics(run_dir, "eval")
    assert [record["step"] for record in train_records] == list(range(1, 25))
    assert [record["examples"] for record in train_records] == list(range(8, 200, 8))
    # before, every 64 examples, after
    assert [record["examples"] for record in evals] == list(range(0, 193, 64))
    assert all(
        {"lr", "tokens_per_second", "peak_memory_gib"} <= set(x) for x in [*train_records, *evals]
    )
    assert train_records[-1]["loss/train"] < train_records[0]["loss/train"]
    assert (run_dir / "curves.png").stat().st_size > 10_000
    if loss not in ("sft", "ipo", "simpo"):
        assert train_records[0]["loss/train"] == pytest.approx(math.log(2), abs=1e-6)
        assert train_records[-1]["rewards_train/accuracies"] >= 0.75
    model = AutoModelForCausalLM.from_pretrained(run_dir / "LATEST")
    tokenizer = AutoTokenizer.from_pretrained(run_dir / "LATEST")
    assert model.get_input_embeddings().weight is model.get_output_embeddings().weight
    ids = tokenizer("the red cat", return_tensors="pt").input_ids
    assert model(input_ids=ids).logits.isfinite().all()


def test_without_evaluations_nothing_is_said_of_their_interval(base, tmp_path, caplog):
    options = {"eval_every": 20, "n_examples": 8, "n_epochs": 1, "do_first_eval": False}
    for n_eval_examples in (4, 0):
        caplog.clear()
        run(make_config(base, tmp_path / "run", n_eval_examples=n_eval_examples, **options))
        shutil.rmtree(tmp_path / "run")
        said = [text for text in caplog.messages if text.startswith("eval_every=20 is no multiple")]
        assert len(said) == bool(n_eval_examples)


def test_an_evaluation_is_the_mean_over_every_held_out_row(base, tmp_path):
    config = make_config(base, tmp_path / "run", loss=SFTConfig(), eval_batch_size=4)
    world = init_world()
    try:
        parts = build_run(config, world, find_start("never", run_place(config), Agreement(world)))
        with StopRequest() as stop:
            record = evaluate(parts, stop)
    finally:
        dist.destroy_process_group()
    assert parts.eval is not None and record is not None
    model, losses, num_tokens = AutoModelForCausalLM.from_pretrained(base / "tied"), [], 0
    rows = parts.eval.data.dataset
    for prompt, chosen in zip(rows["prompt_ids"], rows["chosen_ids"], strict=True):
        ids = torch.tensor([[*prompt, *chosen]])
        with torch.no_grad():
            logps = model(ids).logits[0].log_softmax(-1)[len(prompt) - 1 : -1]
        losses.append(-logps.gather(1, torch.tensor(chosen)[:, None]).sum().item())
        num_tokens += ids.numel()
    # the last batch has fewer rows than the others
    assert len(rows) % 4
    assert record["loss/eval"] == pytest.approx(sum(losses) / len(rows), rel=1e-5)
    assert record["logps_eval/chosen"] == pytest.approx(-record["loss/eval"], rel=1e-6)
    tokens_of_row = record["tokens_per_second"] / record["examples_per_second"]
    assert tokens_of_row == pytest.approx(num_tokens / len(rows))
    assert read_metrics(parts.run_dir, "eval") == [record]


def test_a_loss_without_reference_loads_one_model(base, tmp_path):
    config = make_config(base, tmp_path / "run", loss=SimPOConfig())
    world = init_world()
    try:
        start = find_start("never", run_place(config), Agreement(world))
        parts = build_run(config, world, start)
    finally:
        dist.destroy_process_group()
    assert parts.reference is None
    parts.log.close()


OPTIMIZERS = [
    *("ASGD", "Adadelta", "Adafactor", "Adagrad", "Adam", "AdamW"),
    *("Adamax", "NAdam", "RAdam", "RMSprop", "Rprop", "SGD"),
]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_every_usable_optimizer_trains(base, tmp_path, optimizer):
    # Adadelta's first steps are 1e-3 of its learning rate
    lr = 1.0 if optimizer == "Adadelta" else 1e-3
    options = {"optimizer": optimizer, "lr": lr, "n_eval_examples": 0}
    run_dir = run(make_config(base, tmp_path / "run", **options))
    records = read_metrics(run_dir, "train")
    assert records[-1]["loss/train"] < records[0]["loss/train"]


def test_sequences_that_run_off_a_position_table_are_refused(base, tmp_path):
    save_tiny_model(base / "gpt2", model_type="gpt2", max_position_embeddings=32)
    with pytest.raises(ConfigError, match="set max_length=32 or less"):
        run(make_config(base, tmp_path / "long", "gpt2"))
    run(
        make_config(
            base,
            tmp_path / "fits",
            "gpt2",
            max_length=32,
            max_prompt_length=16,
            sample_during_eval=True,
        )
    )


@pytest.mark.parametrize("model", ["tied", "untied"])
def test_tdpo1_without_the_policys_softmax_is_the_same_run(base, tmp_path, model):
    plain, fast = (
        run(
            make_config(
                base,
                tmp_path / str(every),
                model,
                loss=TDPOConfig(if_tdpo2=False, kl_metrics_every=every),
                # the closing table is then made of lines of which some have no KL
                n_eval_examples=0,
            )
        )
        for every in (1, 4)
    )
    records = read_metrics(plain, "train"), read_metrics(fast, "train")
    for ours, expected in zip(*reversed(records), strict=True):
        # a line without a KL has the same loss, gradient and rewards
        assert ("kl_train/chosen" in ours) == (ours["step"] % 4 == 1)
        shared = [key for key in ours if key.startswith(("loss", "rewards", "grad_norm", "kl"))]
        assert len(shared) >= 6
        for key in shared:
            assert ours[key] == pytest.approx(expected[key], rel=1e-5, abs=1e-5), key
    theirs = weights_of(plain)
    for name, weight in weights_of(fast).items():
        assert (weight - theirs[name]).norm() / theirs[name].norm() <= 1e-5, name


def test_activation_checkpointing_changes_nothing(base, tmp_path):
    plain = run(make_config(base, tmp_path / "plain", loss=TDPOConfig()))
    recomputed = run(
        make_config(base, tmp_path / "recomputed", loss=TDPOConfig(), activation_checkpointing=True)
    )
    assert_same_run(recomputed, plain)


def test_mixed_precision_starts_at_log_two_and_stores_master_weights(base, tmp_path):
    config = make_config(base, tmp_path / "run", loss=TDPOConfig())
    config.model.fsdp_policy_mp = "bfloat16"
    run_dir = run(config)
    first = read_metrics(run_dir, "train")[0]
    assert first["loss/train"] == pytest.approx(math.log(2), abs=1e-7)
    assert first["kl_train/chosen"] == 0 and first["rewards_train/margins"] == 0
    assert {weight.dtype for weight in weights_of(run_dir).values()} == {torch.float32}


def test_samples_of_policy_and_reference_are_written(base, tmp_path):
    config = make_config(
        base, tmp_path / "run", sample_during_eval=True, n_eval_model_samples=3, n_epochs=1
    )
    plain = run(
        dataclasses.replace(config, run_dir=str(tmp_path / "plain"), sample_during_eval=False)
    )
    run_dir = run(config)
    samples = [json.loads(line) for line in (run_dir / "samples.jsonl").open(encoding="utf-8")]
    assert [sample["examples"] for sample in samples] == [0] * 3 + [16] * 3 + [24] * 3
    # untrained, the policy is the reference: one seed, one sample
    assert all(sample["policy"] == sample["reference"] for sample in samples[:3])
    assert_same_run(run_dir, plain)


def test_samples_end_where_the_position_table_does(base, tmp_path):
    save_tiny_model(base / "table", model_type="gpt2", max_position_embeddings=128)
    config = make_config(
        *(base, tmp_path / "run", "table", SFTConfig()),
        sample_during_eval=True,
        n_eval_model_samples=2,
        n_examples=8,
        do_first_eval=False,
        # more than any row has, and than there are positions
        max_length=160,
    )
    samples = (run(config) / "samples.jsonl").read_text(encoding="utf-8").splitlines()
    assert len(samples) == 2


@pytest.mark.parametrize("loss", [DPOConfig, TDPOConfig])
def test_a_reference_in_its_checkpoints_16_bits_changes_no_number(base, tmp_path, loss):
    model = AutoModelForCausalLM.from_pretrained(base / "tied", dtype=torch.bfloat16)
    model.save_pretrained(tmp_path / "half")
    AutoTokenizer.from_pretrained(base / "tied").save_pretrained(tmp_path / "half")
    stored = {}
    for dtype in (None, "float32"):
        config = make_config(tmp_path, tmp_path / str(dtype), "half", loss(), n_epochs=1)
        config.base_data_dir = str(base)
        config.model.reference_dtype = dtype
        stored[dtype] = run(config)
    for split in ("train", "eval"):
        narrow, wide = (read_metrics(run_dir, split) for run_dir in stored.values())
        assert len(narrow) == len(wide) > 1
        for a, b in zip(narrow, wide, strict=True):
            keys = [key for key in b if key.startswith(("loss", "rewards", "kl", "logps"))]
            assert keys and all(a[key] == b[key] for key in keys)


def test_an_archive_gives_policy_and_reference_their_weights(base, tmp_path):
    trained = run(make_config(base, tmp_path / "sft", loss=SFTConfig(), n_epochs=4))
    seed_format = tmp_path / "of the seed" / "policy.pt"
    seed_format.parent.mkdir()
    state = AutoModelForCausalLM.from_pretrained(trained / "LATEST").state_dict()
    torch.save({"step_idx": 3, "state": state, "metrics": {}}, seed_format)
    archives = {"policy.pt": trained / "LATEST" / "policy.pt", "run": trained, "seed": seed_format}
    first = {}
    for name, archive in archives.items():
        config = make_config(base, tmp_path / name, n_epochs=1)
        config.model.archive = str(archive)
        run_dir = run(config)
        first[name] = read_metrics(run_dir, "eval")[0]["logps_eval/chosen"]
        assert read_metrics(run_dir, "train")[0]["loss/train"] == pytest.approx(math.log(2))
    untrained = run(make_config(base, tmp_path / "untrained", n_epochs=1))
    assert len(set(first.values())) == 1
    assert first["run"] > read_metrics(untrained, "eval")[0]["logps_eval/chosen"] + 1


def test_a_padding_token_of_the_tokenizer_alone_is_not_looked_up(base, tmp_path):
    folder = save_tiny_model(tmp_path / "model")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    rows = len(tokenizer)
    tokenizer.add_special_tokens({"pad_token": "[PAD]"})
    assert tokenizer.pad_token_id == rows
    tokenizer.save_pretrained(folder)
    options = {"n_epochs": 1, "sample_during_eval": True, "n_eval_model_samples": 4}
    runs = [
        run(make_config(base, tmp_path / name, str(folder), packing=PACKINGS[name], **options))
        for name in ("shared", "padded")
    ]
    assert_same_run(*runs)
    assert all((run_dir / "samples.jsonl").is_file() for run_dir in runs)


def test_the_time_of_a_checkpoint_does_not_count_in_the_rates(base, tmp_path, monkeypatch):
    now = 0.0

    def takes(seconds: float, call: Any) -> Any:
        def timed(*args: Any, **options: Any) -> Any:
            nonlocal now
            now += seconds
            return call(*args, **options)

        return timed

    monkeypatch.setattr(metrics, "time", SimpleNamespace(perf_counter=lambda: now))
    monkeypatch.setattr(loop, "train_step", takes(2.0, loop.train_step))
    monkeypatch.setattr(CheckpointStore, "save", takes(100.0, CheckpointStore.save))
    monkeypatch.setattr(CheckpointStore, "wait", takes(100.0, CheckpointStore.wait))
    keep = CheckpointConfig(every=1, keep_best="rewards_eval/margins", keep=1)
    run_dir = run(make_config(base, tmp_path / "run", checkpoint=keep))
    rates = [line["examples_per_second"] for line in read_metrics(run_dir, "train")]
    # batches of 8 rows, 2 s a step
    assert rates == [4.0] * len(rates)
