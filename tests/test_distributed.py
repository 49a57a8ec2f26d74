"""What rank 0 finds out, or fails at, is every rank's."""

import shutil
from pathlib import Path

import pytest
import torch
from ranks import run_on_ranks
from safetensors.torch import load_file, save_file
from tiny_models import save_dataset, save_tiny_model

from fastpref.cli.run import main
from fastpref.config import Config, DPOConfig, ModelConfig
from fastpref.distributed import init_world
from fastpref.errors import CheckpointError


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    base = tmp_path_factory.mktemp("probes")
    save_dataset(base, "words")
    save_tiny_model(base / "sound")
    return base


def broken_copy(base: Path, name: str) -> Path:
    folder = base / name
    shutil.copytree(base / "sound", folder)
    return folder


def nan_weights(base: Path) -> dict:
    """check_model fails."""
    folder = broken_copy(base, "nan")
    weights = load_file(folder / "model.safetensors")
    weights["model.norm.weight"][0] = torch.nan
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    return {"model": ModelConfig(name_or_path=str(folder))}


def damaged_weights(base: Path) -> dict:
    """load_model fails."""
    folder = broken_copy(base, "damaged")
    (folder / "model.safetensors").write_bytes(b"1234567890")
    return {"model": ModelConfig(name_or_path=str(folder))}


def missing_archive(base: Path) -> dict:
    """The archive fails."""
    archive = str(base / "gone" / "policy.pt")
    return {"model": ModelConfig(name_or_path=str(base / "sound"), archive=archive)}


def liger_on_a_cpu(base: Path) -> dict:
    """choose_liger fails."""
    return {"model": ModelConfig(name_or_path=str(base / "sound"), liger="true")}


def assert_every_rank_ends_with(code: int, options: dict, base: str, run_dir: str) -> None:
    config = Config(
        **{"loss": DPOConfig(), "datasets": ["words"], "base_data_dir": base, "run_dir": run_dir},
        **options,
        sample_during_eval=False,
    )
    found = main(config)
    assert found == code, f"exit code {found}"


@pytest.mark.parametrize(
    ("fault", "code"),
    [
        (nan_weights, 4),
        (damaged_weights, 4),
        (missing_archive, 4),
        (liger_on_a_cpu, 2),
    ],
)
def test_a_probe_that_fails_on_rank_0_ends_every_rank_with_its_code(base, tmp_path, fault, code):
    options = fault(base)
    run_on_ranks(assert_every_rank_ends_with, 2, code, options, str(base), str(tmp_path / "run"))


def share_and_fail() -> None:
    world = init_world()
    assert world.on_main(lambda: {"seen": world.rank}) == {"seen": 0}

    def fail() -> None:
        raise CheckpointError("gone: no such model")

    with pytest.raises(CheckpointError, match="gone: no such model"):
        world.on_main(fail)


def test_results_and_errors_of_rank_0_are_every_ranks():
    run_on_ranks(share_and_fail, 2)
