"""The command lines of the DPO, TDPO and TIS-DPO READMEs, and what a wrong one looks like."""

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
from omegaconf import OmegaConf

import fastpref.cli.run
import train
from fastpref import __version__
from fastpref.cli.command_line import ALLOCATOR_VARIABLES, HUGE_PAGES_VARIABLE, main
from fastpref.cli.overrides import read_config
from fastpref.config import LOSSES, Config, TDPOConfig

ROOT = Path(train.__file__).parent


def read_command(line: str) -> Config:
    """The configuration of a `python -u train.py ...` line."""
    words = shlex.split(line.replace("\\\n", " "))
    arguments = words[words.index("train.py") + 1 :]
    return read_config(arguments, train.compose_choices, train.CONFIG_DIR)


def run_train(*arguments: str) -> subprocess.CompletedProcess:
    """train.py in a process of its own, from another folder."""
    return subprocess.run(
        [sys.executable, ROOT / "train.py", *arguments],
        cwd="/",
        env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/kernels"},
        capture_output=True,
        text=True,
        timeout=60,
    )


PYTHIA = (
    "gradient_accumulation_steps=2 batch_size=64 eval_batch_size=32 trainer=FSDPTrainer "
    "sample_during_eval=false"
)
ARCHIVE = "model.archive=/path/to/archive/from/sft/LATEST/policy.pt"
TDPO = f"""\
python -u train.py model=pythia28 datasets=[hh] loss=tdpo loss.alpha=0.5 loss.beta=0.1 \
exp_name=anthropic_tdpo_pythia28 {PYTHIA} model.fsdp_policy_mp=bfloat16 {ARCHIVE}"""
QWEN = """\
python -u train.py model=qwen model.name_or_path=models/Qwen/Qwen2.5-3B-sft \\
  datasets=[{data}] loss={loss} loss.beta=0.1 \\
  gradient_accumulation_steps=2 batch_size=32 eval_batch_size=32 \\
  trainer=FSDPTrainer sample_during_eval=false \\
  base_data_dir={folder} reverse_dataset={reverse}"""


@pytest.mark.parametrize(("extra", "if_tdpo2"), [("", True), (" loss.if_tdpo2=false", False)])
def test_tdpo_readme_runs_tdpo2_unless_told_otherwise(extra, if_tdpo2):
    config = read_command(TDPO + extra)
    assert config.loss == TDPOConfig(beta=0.1, alpha=0.5, if_tdpo2=if_tdpo2)
    assert config.lr == 5e-6
    assert config.model.name_or_path == "EleutherAI/pythia-2.8b"
    assert config.model.archive == "/path/to/archive/from/sft/LATEST/policy.pt"
    assert config.trainer == "FSDPTrainer"
    assert (config.batch_size, config.gradient_accumulation_steps) == (64, 2)
    assert (config.eval_batch_size, config.sample_during_eval) == (32, False)
    assert (config.max_length, config.max_prompt_length, config.warmup_steps) == (512, 256, 150)
    assert (config.datasets, config.exp_name) == (["hh"], "anthropic_tdpo_pythia28")


@pytest.mark.parametrize(
    ("arguments", "loss", "model"),
    [
        ("model=pythia28 datasets=[hh] loss=sft exp_name=x", "sft", "EleutherAI/pythia-2.8b"),
        ("model=pythia69 datasets=[hh] loss=sft exp_name=x", "sft", "EleutherAI/pythia-6.9b"),
        (
            "model=pythia69 datasets=[hh] loss=dpo loss.beta=0.1 exp_name=x "
            "model.archive=/path/to/checkpoint/from/sft/step-XXXX/policy.pt",  # as in DPO's README
            "dpo",
            "EleutherAI/pythia-6.9b",
        ),
        (
            "model=pythia28 datasets=[hh] loss=dpo loss.beta=0.1 exp_name=x "
            f"model.fsdp_policy_mp=bfloat16 {ARCHIVE}",
            "dpo",
            "EleutherAI/pythia-2.8b",
        ),
        (
            "model=blank_model model.name_or_path=/PATH/TO/LLAMA/WEIGHTS "
            "model.block_name=LlamaDecoderLayer datasets=[hh,shp] loss=sft exp_name=x",
            "sft",
            "/PATH/TO/LLAMA/WEIGHTS",
        ),
        (
            "loss=sft model=blank_model model.name_or_path=gpt2-xl model.block=GPT2Block",
            "sft",
            "gpt2-xl",
        ),
        ("model=pythia28 datasets=[hh] loss=ipo loss.beta=0.1", "ipo", "EleutherAI/pythia-2.8b"),
        (
            "model=pythia28 loss=dpo loss.label_smoothing=0.1 model.fsdp_policy_mp=float16 "
            "activation_checkpointing=true",
            "dpo",
            "EleutherAI/pythia-2.8b",
        ),
    ],
)
def test_dpo_readme_commands_compose(arguments, loss, model):
    config = read_command(f"python -u train.py {arguments} {PYTHIA}")
    assert (config.loss.name, config.model.name_or_path) == (loss, model)
    assert config.lr == 5e-7
    assert config.datasets[0] == "hh"


@pytest.mark.parametrize(
    ("reverse", "name"),
    [
        ("false", "dpo_Qwen2.5-3B-sft_ultra-feedback"),
        ("true", "dpo_Qwen2.5-3B-sft_ultra-feedback_reverse"),
    ],
)
def test_tisdpo_readme_first_step_names_its_runs(reverse, name):
    command = QWEN.format(data="ultra-feedback", loss="dpo", folder="datasets/", reverse=reverse)
    config = read_command(command)
    assert config.computed_exp_name() == name
    assert config.reverse_dataset is (reverse == "true")
    assert (config.base_data_dir, config.lr) == ("datasets/", 5e-7)


@pytest.mark.parametrize(
    ("method", "label"),
    [
        ("rank_based", "rank_based0.7_1.3"),
        ("random", "random0.7_1.3"),
        ("threshold_and_scale", "threshold_and_scale0.7_1.3"),
        ("binary", "binary100"),
        ("origin", "origin"),
        ("threshold", "threshold1.0_-1.0"),
    ],
)
def test_tisdpo_readme_last_step_names_its_run(method, label):
    command = QWEN.format(
        data="ultra-feedback-tisdpo", loss="tisdpo", folder="generated-data/", reverse="false"
    )
    config = read_command(f"{command} \\\n  transform.method={method}")
    assert config.computed_exp_name() == f"tisdpo_Qwen2.5-3B-sft_ultra-feedback-tisdpo_{label}"
    assert config.transform.method == method
    assert not config.loss.token_level


def test_readme_environment_lines_find_their_files():
    assert (ROOT / "requirements.txt").read_text().split() == ["-e", "."]
    environment = OmegaConf.load(ROOT / "environment.yml")
    assert environment.name == "tis-dpo"


@pytest.mark.parametrize(
    "arguments",
    [["loss=tdpoo"], ["loss.beta=-1"], ["--lr", "1"], ["model=blank_model"], ["lr=x", "sed=0"]],
)
def test_wrong_options_exit_2_with_one_message(arguments, capsys):
    assert main(arguments, train.compose_choices, train.CONFIG_DIR) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert output.err.startswith("fastpref: ") and output.err.count("fastpref:") == 1


def test_bytes_that_the_encoding_does_not_have_are_refused(capsys):
    assert main(["exp_name=gr\udcf6sse"], train.compose_choices, train.CONFIG_DIR) == 2
    assert "has bytes that are no utf-8" in capsys.readouterr().err


def test_the_version_is_printed(capsys):
    assert main(["--version"], train.compose_choices, train.CONFIG_DIR) == 0
    assert capsys.readouterr().out == f"fastpref {__version__}\n"


@pytest.mark.parametrize("width", ["0", "-1", "wide", "²", "9" * 5000])
def test_a_width_that_is_none_counts_for_unset(monkeypatch, capsys, width):
    monkeypatch.setenv("COLUMNS", width)
    assert main(["--cfg"], train.compose_choices, train.CONFIG_DIR) == 0
    assert "COLUMNS" not in os.environ


GROWS = {"PYTORCH_ALLOC_CONF": "expandable_segments:True"}


@pytest.mark.parametrize(
    ("given", "has_huge_pages", "expected"),
    [
        ({}, True, GROWS | {"THP_MEM_ALLOC_ENABLE": "1"}),
        ({}, False, GROWS),
        (of_user := {"THP_MEM_ALLOC_ENABLE": "0"}, True, GROWS | of_user),
        (of_user := {"PYTORCH_ALLOC_CONF": "max_split_size_mb:512"}, False, of_user),
        (of_user := {"PYTORCH_CUDA_ALLOC_CONF": "expandable_segments:False"}, False, of_user),
    ],
)
def test_allocators_are_set_unless_the_user_has(
    monkeypatch, tmp_path, given, has_huge_pages, expected
):
    names = (*ALLOCATOR_VARIABLES, HUGE_PAGES_VARIABLE)
    for name in names:
        # known before, so that it is as it was afterwards
        monkeypatch.setenv(name, "")
        monkeypatch.delenv(name)
    for name, value in given.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(
        "fastpref.cli.command_line.HUGE_PAGES", tmp_path if has_huge_pages else tmp_path / "none"
    )
    found = {}

    def run(*_):
        found.update({name: os.environ[name] for name in names if name in os.environ})
        return 0

    monkeypatch.setattr(fastpref.cli.run, "main", run)
    assert main([], train.compose_choices, train.CONFIG_DIR) == 0
    assert found == expected


def test_only_the_first_rank_prints(capsys, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    assert main(["loss=tdpoo"], train.compose_choices, train.CONFIG_DIR) == 2
    assert capsys.readouterr().err == ""


def test_a_typo_is_refused_without_a_traceback():
    process = run_train("loss=tdpoo")
    assert process.returncode == 2
    names = ", ".join(sorted(LOSSES))
    assert process.stderr == (
        f"fastpref: loss=tdpoo: there is no such loss, only {names}; nearest: tdpo\n"
    )


def test_options_are_checked_before_torch_is_imported():
    code = (
        "import sys, train\n"
        "train.main(['--cfg'], train.compose_choices, train.CONFIG_DIR)\n"
        "heavy = {'torch', 'transformers', 'datasets', 'numpy'} & set(sys.modules)\n"
        "sys.exit(f'imported {heavy}' if heavy else 0)"
    )
    process = subprocess.run(
        [sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60
    )
    assert process.returncode == 0, process.stderr


def test_cfg_prints_the_composed_options_and_stops():
    process = run_train("loss=dpo", "loss.beta=0.3", "--cfg", "job")
    assert process.returncode == 0 and process.stderr == ""
    printed = OmegaConf.create(process.stdout)
    assert (printed.loss.name, printed.loss.beta, printed.datasets) == ("dpo", 0.3, ["planted"])


def test_help_lists_choices_and_options():
    process = run_train("--help")
    assert process.returncode == 0 and process.stderr == ""
    assert "model=" in process.stdout and "loss=tdpo:" in process.stdout


def test_train_is_short_and_alone_in_importing_hydra():
    assert len((ROOT / "train.py").read_text().splitlines()) <= 40
    importers = [
        path.name
        for path in (ROOT / "fastpref").rglob("*.py")
        if any(line.split()[1:2] == ["hydra"] for line in path.read_text().splitlines())
    ]
    assert importers == []
