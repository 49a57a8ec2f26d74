"""A model that cannot compute packed rows is found out, in 16 bits as in 32, and left as it was."""

import re

import pytest
import torch
from tiny_models import FAMILIES, build_family, build_model
from torch import Tensor, nn
from torch.nn import functional as F

from fastpref.model.attention.packing_probe import probe_packing, probe_rows
from fastpref.model.logit_path import measure_logit_path

DTYPES = [torch.float32, torch.bfloat16]


def obstacle_of(model, *, share_prompt=True, longest=32) -> str | None:
    path = measure_logit_path(model)
    return probe_packing(model, path, share_prompt=share_prompt, longest=longest).obstacle


CANNOT = {
    # distances in the scores, taken from the attention mask and not from position ids
    "bloom": ({"hidden_size": 32, "n_layer": 2, "n_head": 4}, "its attention is one of its own"),
}


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("model_type", CANNOT)
def test_a_model_that_cannot_pack_is_found_out_and_left_as_it_was(model_type, dtype):
    config, says = CANNOT[model_type]
    model = build_family(model_type, **config).to(dtype).eval()
    ids = torch.tensor([[3, 4, 5, 6]])
    before, implementation = model(input_ids=ids).logits, model.config._attn_implementation
    for share_prompt in (True, False):
        assert re.search(says, obstacle_of(model, share_prompt=share_prompt))
        assert model.config._attn_implementation == implementation
    assert torch.equal(model(input_ids=ids).logits, before)
    assert {p.dtype for p in model.parameters()} == {dtype}


class Neighbours(nn.Module):
    """An MLP that adds a little of the token before, whosever it is."""

    def __init__(self, mlp: nn.Module, share: float) -> None:
        super().__init__()
        self.mlp, self.share = mlp, share

    def forward(self, hidden: Tensor) -> Tensor:
        return self.mlp(hidden) + self.share * F.pad(hidden, (0, 0, 1, 0))[:, :-1]


class Convolved(nn.Module):
    """An MLP before a convolution over two tokens."""

    def __init__(self, mlp: nn.Module) -> None:
        super().__init__()
        self.mlp, self.conv = mlp, nn.Conv1d(32, 32, 2, bias=False)
        nn.init.zeros_(self.conv.weight)

    def forward(self, hidden: Tensor) -> Tensor:
        convolved = self.conv(F.pad(hidden, (0, 0, 1, 0)).mT).mT
        return self.mlp(hidden) + convolved


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_leak_between_rows_that_16_bits_would_hide_is_found(dtype):
    model = build_model("llama")
    layer = model.model.layers[0]
    layer.mlp = Neighbours(layer.mlp, 0.003)
    assert "differ by" in obstacle_of(model.to(dtype))


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_convolution_is_seen_however_little_it_leaks(dtype):
    model = build_model("llama")
    layer = model.model.layers[1]
    layer.mlp = Convolved(layer.mlp)
    model = model.to(dtype)
    probe = probe_packing(model, measure_logit_path(model), share_prompt=True, longest=32)
    assert (probe.mixers, probe.obstacle) == ("Convolved", None)


def test_layers_that_no_text_goes_through_do_not_count():
    model = build_model("llama")
    model.model.audio_tower = nn.ModuleList([Convolved(nn.Identity())])
    model._no_split_modules = ["LlamaDecoderLayer", "Convolved"]
    assert obstacle_of(model) is None


def calls_of(model, longest: int) -> set[bool]:
    probe = probe_packing(model, measure_logit_path(model), share_prompt=True, longest=longest)
    assert probe.obstacle is None
    return {call.has_window for call in probe.calls}


def test_a_window_is_asked_for_where_a_sequence_is_longer_and_stays_what_it_is():
    for family, windows in (("mistral", {True}), ("gemma2", {True, False})):
        model = build_model(family, sliding_window=16)
        assert calls_of(model, longest=16) == {False}
        assert calls_of(model, longest=17) == windows
        assert model.config.sliding_window == 16
        assert {getattr(m, "sliding_window", 16) for m in model.modules()} <= {16, None}


def test_a_window_that_a_family_does_not_hand_on_is_found_out():
    model = build_model("gemma2", sliding_window=16)
    for layer in model.model.layers:
        # what it tells its attention; the masks go by the config
        layer.self_attn.__dict__["sliding_window"] = None
    assert "differ by" in obstacle_of(model, longest=32)
    assert obstacle_of(model, longest=16) is None


@pytest.mark.parametrize("dtype", DTYPES)
# GPT-J can in newer versions of transformers only
@pytest.mark.parametrize("family", [family for family in FAMILIES if family != "gpt-j"])
def test_every_family_that_can_pack_says_what_its_layers_ask_for(family, dtype):
    model = build_model(family, **({"sliding_window": 32} if family == "gemma2" else {})).to(dtype)
    path = measure_logit_path(model)
    calls, _, obstacle = probe_packing(model, path, share_prompt=True, longest=32)
    assert obstacle is None
    (call,) = calls
    kv_heads = getattr(model.config, "num_key_value_heads", None) or 4
    assert call[:4] == (4, kv_heads, 8, 8)
    scales = {"gemma2": 256**-0.5, "granite": 1.0, "opt": 1.0}
    assert call.scale == pytest.approx(scales.get(family, 8**-0.5))
    assert call.softcap == (50.0 if family == "gemma2" else None)


def test_rounded_products_do_not_pass_for_an_obstacle():
    # wide enough for the library to round operands where the CPU has the instructions for it, and
    # deep enough for the rounding to show
    model = build_model("llama", hidden_size=256, intermediate_size=512, num_hidden_layers=12)
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        assert obstacle_of(model, longest=16) is None
        assert matmul.fp32_precision == "bf16"
    finally:
        matmul.fp32_precision = before


def test_the_probes_rows_share_a_prompt_and_have_short_ends():
    first, second, third = probe_rows(torch.arange(30))
    assert first.prompt_ids == third.prompt_ids
    assert len(second.prompt_ids) == len(third.rejected_ids) == 1
