"""Trackers are looked at before anything is made, and cost no run once it goes."""

import sys

import pytest
import torch

from fastpref.cli.run import main
from fastpref.config import Config, DPOConfig, ModelConfig
from fastpref.train.metrics import MetricsLog


@pytest.fixture
def config(tmp_path, monkeypatch):
    # torch finds no tensorboard, whatever is installed
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    config = Config(
        model=ModelConfig(name_or_path="tiny"),
        loss=DPOConfig(),
        datasets=["planted"],
        run_dir=str(tmp_path / "run"),
    )
    config.tensorboard.enabled = True
    return config


def test_a_tracker_that_cannot_start_is_refused_and_leaves_no_folder(config, tmp_path, capsys):
    assert main(config) == 2
    message = capsys.readouterr().err
    assert "tensorboard.enabled=true: torch.utils.tensorboard cannot be imported" in message
    assert not (tmp_path / "run").exists()


class Failing:
    """A service that is gone."""

    name = "the service"

    def log(self, record):
        raise ConnectionError("network is unreachable")

    def close(self):
        raise ConnectionError("network is unreachable")


def test_a_tracker_that_fails_later_is_said_once_and_the_lines_go_on(tmp_path, caplog):
    log = MetricsLog(
        path=tmp_path / "metrics.jsonl",
        min_interval_seconds=0,
        device=torch.device("cpu"),
        trackers=[Failing()],
    )
    for step in range(3):
        log.write({"step": step, "split": "train", "loss/train": 0.5})
    log.close()
    assert len((tmp_path / "metrics.jsonl").read_text().splitlines()) == 3
    assert len([m for m in caplog.messages if "the service" in m]) == 1
