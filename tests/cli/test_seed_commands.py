"""The seed repositories' README commands run to the end, with tiny models and data in place."""

import json
import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch.distributed as dist
from tiny_models import read_metrics, save_tiny_model, text_rows, write_rows

import train
from fastpref.cli.command_line import main

ROOT = Path(__file__).resolve().parents[2]

TDPO = (
    "python -u train.py model=pythia28 datasets=[hh] loss={loss} "
    "exp_name=anthropic_tdpo_pythia28 gradient_accumulation_steps=2 batch_size=64 "
    "eval_batch_size=32 trainer=FSDPTrainer sample_during_eval=false "
    "model.fsdp_policy_mp=bfloat16"
)
TISDPO = (
    "python -u train.py model=qwen model.name_or_path=models/Qwen/Qwen2.5-3B-sft "
    "datasets=[{data}] loss={loss} loss.beta=0.1 gradient_accumulation_steps=2 batch_size=32 "
    "eval_batch_size=32 trainer=FSDPTrainer sample_during_eval=false base_data_dir={base} "
    "reverse_dataset={reverse}"
)
# those of a README's first and last command; what each of the others computes, test_token_weights
# and test_config hold
TRANSFORMS = ["rank_based", "threshold"]


def run_command(line: str, *more: str) -> Path:
    """Run a command line in this process and folder; returns the run folder it made."""
    before = set(Path("output").glob("*"))
    arguments = shlex.split(line)[3:]
    assert main([*arguments, *more], train.compose_choices, train.CONFIG_DIR) == 0
    assert not dist.is_initialized()
    (run_dir,) = set(Path("output").glob("*")) - before
    return run_dir


@pytest.fixture(scope="module")
def workplace(tmp_path_factory) -> Path:
    """What the READMEs have a user download, in small."""
    folder = tmp_path_factory.mktemp("seeds")
    rows = text_rows(80, seed=3)
    write_rows(folder / "datasets" / "ultra-feedback", "train", rows)
    write_rows(folder / "datasets" / "ultra-feedback", "test", rows[:40])
    dialogues = [
        {
            side: f"\n\nHuman: {row['prompt']}\n\nAssistant:{row[side]}"
            for side in ("chosen", "rejected")
        }
        for row in rows
    ]
    write_rows(folder / "hh-rlhf" / "hh", "train", dialogues)
    write_rows(folder / "hh-rlhf" / "hh", "test", dialogues[:40])
    # the README downloads to models/NAME and trains from models/Qwen/NAME
    save_tiny_model(folder / "models" / "Qwen2.5-3B-sft", model_type="qwen2")
    save_tiny_model(folder / "pythia", model_type="gpt_neox", num_key_value_heads=4)
    return folder


@pytest.fixture(autouse=True)
def in_workplace(workplace, monkeypatch):
    monkeypatch.chdir(workplace)


def test_the_tdpo_readme_sft_then_tdpo2_then_tdpo1():
    # what stands in for EleutherAI/pythia-2.8b and the hub's Anthropic/hh-rlhf
    local = ("model.name_or_path=pythia", "base_data_dir=hh-rlhf")
    sft = run_command(TDPO.format(loss="sft"), *local)
    archive = f"model.archive={sft}/LATEST/policy.pt"
    kl_of = {}
    for variant in ("loss.if_tdpo2=true", "loss.if_tdpo2=false"):
        line = TDPO.format(loss="tdpo loss.alpha=0.5 loss.beta=0.1")
        readme = [] if variant.endswith("true") else [variant]
        # the first step is one and the same: the KL of two equal models has no gradient
        more = ("n_epochs=3", "lr=1e-3", "warmup_steps=0")
        run_dir = run_command(line, *readme, archive, *local, *more)
        record = read_metrics(run_dir, "train")[0]
        assert record["examples"] == 64 and abs(record["loss/train"] - 0.693147) < 1e-5
        assert ("if_tdpo2: true" in (run_dir / "config.yaml").read_text()) == (not readme)
        kl_of[variant] = read_metrics(run_dir, "eval")[-1]["kl_eval/rejected"]
    # different variants push the rejected KL differently
    assert kl_of["loss.if_tdpo2=true"] != kl_of["loss.if_tdpo2=false"]


def test_the_tisdpo_readme_from_two_dpo_runs_over_weights_to_transforms(workplace):
    common = {"data": "ultra-feedback", "loss": "dpo", "base": "datasets/"}
    positive = run_command(TISDPO.format(**common, reverse="false"))
    negative = run_command(TISDPO.format(**common, reverse="true"))
    assert positive.name.startswith("dpo_Qwen2.5-3B-sft_ultra-feedback_2")
    assert negative.name.startswith("dpo_Qwen2.5-3B-sft_ultra-feedback_reverse_2")

    models = {"MODEL_NAME_1": str(positive), "MODEL_NAME_2": str(negative)}
    subprocess.run(
        ["bash", str(ROOT / "scripts" / "token_weight_estimation.sh")],
        env=os.environ | models | {"PYTHON": sys.executable, "OMP_NUM_THREADS": "1"},
        check=True,
        timeout=120,
    )
    weighted = workplace / "generated-data" / "ultra-feedback-tisdpo" / "train.jsonl"
    rows = [json.loads(line) for line in weighted.open(encoding="utf-8")]
    assert len(rows) == 80 and set(rows[0]) >= {"prompt", "chosen_weight", "rejected_weight"}

    common = {"data": "ultra-feedback-tisdpo", "loss": "tisdpo", "base": "generated-data/"}
    for method in TRANSFORMS:
        line = TISDPO.format(**common, reverse="false") + f" transform.method={method}"
        run_dir = run_command(line)
        assert f"_ultra-feedback-tisdpo_{method}" in run_dir.name
        losses = [record["loss/train"] for record in read_metrics(run_dir, "train")]
        # two steps at the README's learning rate and warm-up: the model has hardly moved
        assert losses == pytest.approx([0.693147] * 2, abs=1e-3)


def test_the_dpo_readme_with_a_block_name_and_ipo():
    line = (
        "python -u train.py model=blank_model model.name_or_path=models/Qwen2.5-3B-sft "
        "model.block={block} datasets=[hh] loss={loss} batch_size=32 eval_batch_size=32 "
        "gradient_accumulation_steps=2 trainer=FSDPTrainer sample_during_eval=false"
    )
    for loss in ("dpo loss.beta=0.1 loss.label_smoothing=0.1", "ipo loss.beta=0.1"):
        command = line.format(loss=loss, block="Qwen2DecoderLayer")
        run_dir = run_command(command, "base_data_dir=hh-rlhf", "activation_checkpointing=true")
        assert len(read_metrics(run_dir, "train")) == 2
