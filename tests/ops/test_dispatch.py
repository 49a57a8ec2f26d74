import logging

import pytest
import torch
from fastpref_kernels import dispatch, token_logps_torch


@pytest.fixture
def gpu_without_kernels(monkeypatch):
    """A GPU that lacks what Triton needs; the choice made for it is forgotten afterwards."""
    dispatch.implementation.cache_clear()
    monkeypatch.setattr(dispatch, "_obstacle", lambda device: "Triton is not installed")
    yield torch.device("cuda", 0)
    dispatch.implementation.cache_clear()


def test_a_gpu_without_triton_takes_torchs_path_and_says_so_once(gpu_without_kernels, caplog):
    with caplog.at_level(logging.WARNING):
        for _ in range(3):
            assert dispatch.implementation("token_logps", gpu_without_kernels) is token_logps_torch
    (record,) = caplog.records
    assert record.getMessage() == (
        "token_logps runs in plain torch on cuda:0: Triton is not installed"
    )


def test_missing_triton_is_the_obstacle(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: None)
    assert dispatch._obstacle(torch.device("cuda", 0)) == "Triton is not installed"


def test_an_old_gpu_is_the_obstacle(monkeypatch):
    monkeypatch.setattr(dispatch.importlib.util, "find_spec", lambda name: object())
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: (7, 5))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda device: "Tesla T4")
    assert dispatch._obstacle(torch.device("cuda", 0)) == "Tesla T4 is older than Ampere"
