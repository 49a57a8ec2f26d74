"""Liger's kernels take the place of layers where they are asked for, fit, and compute the same."""

import logging
import sys
from types import SimpleNamespace

import pytest
import torch
from tiny_models import build_model
from torch import nn

from fastpref.errors import ConfigError
from fastpref.model import liger
from fastpref.model.liger import choose_liger, replace_layers

CPU = SimpleNamespace(device=torch.device("cpu"), is_main=True, on_main=lambda compute: compute())


def test_on_a_cpu_auto_and_false_leave_the_layers_and_true_is_refused():
    model = build_model("llama")
    assert not choose_liger("auto", model, CPU, compiled=False)
    assert not choose_liger("false", model, CPU, compiled=False)
    with pytest.raises(ConfigError, match="it runs on a GPU only"):
        choose_liger("true", model, CPU, compiled=False)


@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_every_norm_and_mlp_is_replaced_and_nothing_else(family, monkeypatch):
    model = build_model(family)
    layers = [module for module in model.modules() if "forward" in vars(module)]
    assert not layers
    called = []
    monkeypatch.setattr(liger, "_rms_norm", lambda module, hidden: called.append("norm") or hidden)
    monkeypatch.setattr(liger, "_swiglu", lambda module, hidden: called.append("mlp") or hidden)
    replace_layers(model)
    model(input_ids=torch.tensor([[1, 2, 3]]))
    blocks = model.config.num_hidden_layers
    assert called.count("norm") == 2 * blocks + 1 and called.count("mlp") == blocks


def test_a_layer_that_computes_something_else_is_found_out(monkeypatch):
    """A norm that is off in its gradient alone is not taken."""
    norm = build_model("llama").model.norm
    plain = type(norm).forward

    def wrong(module: nn.Module, hidden: torch.Tensor) -> torch.Tensor:
        value = plain(module, hidden)
        return value.detach() + (value - value.detach()) * 1.01

    monkeypatch.setattr(liger, "_rms_norm", plain)
    assert liger._difference(norm, torch.device("cpu")) == 0
    monkeypatch.setattr(liger, "_rms_norm", wrong)
    assert liger._difference(norm, torch.device("cpu")) > liger._TOLERANCE


def test_trying_a_layer_leaves_the_familys_rotation_as_it_is(monkeypatch):
    model = build_model("llama")
    family = sys.modules[type(model).__module__]
    plain = getattr(family, liger.ROTATION)
    plain = getattr(plain, "plain", plain)
    monkeypatch.setattr(family, liger.ROTATION, plain)
    liger._difference(model.model.norm, torch.device("cpu"))
    assert getattr(family, liger.ROTATION) is plain


def test_a_layer_that_fails_for_want_of_memory_is_no_obstacle(monkeypatch):
    def fail(layer, device):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setattr(liger, "find_spec", lambda name: name)
    monkeypatch.setattr(liger, "_difference", fail)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        liger._obstacle(build_model("llama"), torch.device("cuda"))


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("family", ["llama", "qwen2"])
def test_on_a_gpu_auto_takes_what_computes_the_same(family, caplog):
    pytest.importorskip("liger_kernel")
    gpu = SimpleNamespace(
        device=torch.device("cuda"), is_main=True, on_main=lambda compute: compute()
    )
    with caplog.at_level(logging.INFO, "fastpref"):
        assert choose_liger("auto", build_model(family), gpu, compiled=False), caplog.text
