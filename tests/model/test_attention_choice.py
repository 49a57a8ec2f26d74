"""Which attention computes packed rows: of the shapes that a model's layers really have."""

import contextlib
import logging
from functools import partial

import pytest
import torch
from naive_attention import VARLEN, naive_varlen
from tiny_models import build_family, build_model, random_rows

from fastpref.batches.layouts import PaddedRows
from fastpref.batches.packed import pack_rows
from fastpref.batches.padded import pad_rows
from fastpref.config import ModelConfig, PackingConfig
from fastpref.config.groups import ATTENTIONS
from fastpref.distributed import World
from fastpref.errors import ConfigError
from fastpref.model.attention.backends import PackedAttention, attend_varlen
from fastpref.model.attention.choice import (
    ON_GPU,
    attention_problem,
    choose_attention,
    choose_rows,
)
from fastpref.model.attention.interface import build_attention
from fastpref.model.attention.packing_probe import AttentionCall
from fastpref.model.logit_path import measure_logit_path
from fastpref.model.scorer import TokenScorer

CPU = torch.device("cpu")
WORLD = World(rank=0, size=1, device=CPU, mesh=None, store=None)
PLAIN = AttentionCall(4, 2, 8, 8, 8**-0.5, None)


def choose(model, path, *, attention="auto", share_prompt="auto"):
    options = ModelConfig(name_or_path="tiny", fsdp_policy_mp=None, attention=attention)
    packing = PackingConfig(share_prompt=share_prompt)
    return choose_rows(model, options, packing, WORLD, path=path, longest=32)


def test_an_attention_that_aligns_causality_at_the_start_is_found_out():
    assert attention_problem(VARLEN, CPU, torch.float32, {PLAIN}) == ""
    kernel = partial(naive_varlen, aligned_at_end=False)
    wrong = PackedAttention(name="wrong", attend=attend_varlen(kernel))
    assert "off by" in attention_problem(wrong, CPU, torch.float32, {PLAIN})


def test_an_attention_wrong_for_one_layers_shape_is_found_out():
    def attend(query, key, value, layout, rules):
        # as libraries that are built for some widths and softcaps alone
        given = rules._replace(softcap=None) if query.shape[-1] == 16 else rules
        return VARLEN.attend(query, key, value, layout, given)

    wrong = PackedAttention(name="wrong", attend=attend)
    capped = {PLAIN._replace(softcap=1.5), PLAIN._replace(width=16, value_width=16)}
    assert attention_problem(wrong, CPU, torch.float32, capped) == ""
    capped.add(PLAIN._replace(width=16, softcap=1.5))
    assert "off by" in attention_problem(wrong, CPU, torch.float32, capped)


@pytest.mark.parametrize("name", ATTENTIONS[1:])
def test_every_attention_that_may_be_asked_for_has_a_case(name):
    # of packages that are not installed the import fails
    with contextlib.suppress(ImportError):
        assert build_attention(name).name == name


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("has_window", [False, True])
@pytest.mark.parametrize("name", [*ON_GPU, "flex", "sdpa", "eager"])
def test_what_is_installed_on_a_gpu_computes_windows(name, has_window):
    try:
        attention = build_attention(name)
    except ImportError as error:
        pytest.skip(str(error))
    call = AttentionCall(4, 2, 64, 64, 0.125, None, has_window)
    assert attention_problem(attention, torch.device("cuda"), torch.bfloat16, {call}) == ""


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_on_a_gpu_sinks_are_computed_beside_windows(dtype):
    calls = {AttentionCall(4, 2, 64, 64, 0.125, None, window, True) for window in (False, True)}
    device = torch.device("cuda")
    assert choose_attention("auto", device, dtype, calls).name == "sdpa"


def test_auto_takes_sdpa_on_a_cpu_and_what_cannot_run_is_refused():
    for dtype in (torch.float32, torch.bfloat16):
        assert choose_attention("auto", CPU, dtype, {PLAIN}).name == "sdpa"
    # keys wider than values, as multi-head latent attention has them
    latent = PLAIN._replace(value_width=6)
    assert choose_attention("auto", CPU, torch.float32, {PLAIN, latent}).name == "sdpa"
    with pytest.raises(ConfigError, match=r"model\.attention=varlen does not compute.*set model\."):
        choose_attention("varlen", CPU, torch.bfloat16, {PLAIN})


def widths_that_differ():
    """A model whose second layer has heads twice as wide, and a config that does not say so."""
    model = build_model("opt")
    second = model.model.decoder.layers[1].self_attn
    second.num_heads, second.head_dim, second.scaling = 2, 16, 16**-0.5
    return model


def test_heads_of_another_width_in_every_layer_are_packed(caplog):
    # Gemma 4: neither its config nor one shape tells what all layers ask for
    model = widths_that_differ()
    path = measure_logit_path(model)
    with caplog.at_level(logging.INFO, "fastpref"):
        rows = choose(model, path)
    assert rows.attention.name == "sdpa" and rows.layout.share_prompt, caplog.text
    encoded = random_rows()
    with torch.no_grad():
        packed_N = TokenScorer(model, rows.attention, path)(pack_rows(encoded, pad_token_id=0))
        padded_N = TokenScorer(widths_that_differ())(pad_rows(encoded, pad_token_id=0))
    torch.testing.assert_close(packed_N.sum(), padded_N.sum(), rtol=1e-5, atol=1e-5)


def test_gemma_4_is_packed():
    pytest.importorskip("transformers.models.gemma4")
    sizes = {
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 8,
        "global_head_dim": 16,
        "num_global_key_value_heads": 1,
        "hidden_size_per_layer_input": 8,
        "vocab_size_per_layer_input": 97,
        "layer_types": ["sliding_attention", "full_attention"],
        "sliding_window": 64,
        "num_kv_shared_layers": 0,
    }
    model = build_family("gemma4_text", **sizes)
    path = measure_logit_path(model)
    assert choose(model, path).layout.share_prompt


def test_auto_without_an_attention_falls_back_to_padded_rows_and_says_why(caplog, monkeypatch):
    def fail(attention, device, dtype, calls):
        raise RuntimeError(f"no kernel for {len(calls)} shapes")

    monkeypatch.setattr("fastpref.model.attention.choice.attention_problem", fail)
    model = widths_that_differ()
    path = measure_logit_path(model)
    assert choose(model, path) == (PaddedRows(), None)
    (message,) = caplog.messages
    assert "no kernel for 2 shapes; taking padded ones" in message
    assert model.config._attn_implementation != "fastpref"
    # what was asked for by name is refused, with advice that is not what is set
    for name, advice in (("eager", "set model.attention=auto or packing.enabled=false"),):
        with pytest.raises(ConfigError, match=rf"model\.attention={name}.*{advice}"):
            choose(model, path, attention=name)


def test_an_attention_that_fails_for_want_of_memory_is_not_exchanged_for_a_slower_one(monkeypatch):
    def fail(attention, device, dtype, calls):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 MiB")

    monkeypatch.setattr("fastpref.model.attention.choice.attention_problem", fail)
    with pytest.raises(torch.OutOfMemoryError, match="Tried to allocate"):
        choose_attention("auto", CPU, torch.float32, {PLAIN})


def test_a_shared_prompt_that_was_asked_for_is_refused_where_it_cannot_be():
    model = build_family("bloom", hidden_size=32, n_layer=2, n_head=4)
    path = measure_logit_path(model)
    with pytest.raises(ConfigError, match=r"packing\.share_prompt=true: Bloom.*share_prompt=auto"):
        choose(model, path, share_prompt="true")
