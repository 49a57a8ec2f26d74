"""Attention over packed segments against attention over each sequence alone, in float64."""

import random
import sys
from types import SimpleNamespace

import pytest
import torch
from naive_attention import VARLEN
from tiny_models import build_model
from torch import Tensor

from fastpref.batch import Batch, EncodedRow
from fastpref.batches.packed import pack_rows
from fastpref.model.attention import segments
from fastpref.model.attention.backends import PackedAttention
from fastpref.model.attention.groups import GroupedAttention
from fastpref.model.attention.interface import build_attention
from fastpref.model.attention.rules import ScoreRules
from fastpref.model.attention.segments import (
    LONG_KEYS,
    MAX_PADDING,
    group_segments,
    runs_of_like_length,
)
from fastpref.model.mixers import Sequences
from fastpref.model.scorer import TokenScorer

ROWS = [
    EncodedRow(range(40), range(30), range(21)),
    EncodedRow([1], [1, 2, 3], [5]),
    EncodedRow(range(40), [1], range(17)),
]


def random_inputs(batch: Batch, dtype=torch.float64, value_width=16) -> list[Tensor]:
    """Query, key, value of 6 heads over 2, and an upstream gradient."""
    T = batch.input_ids.shape[1]
    generator = torch.Generator().manual_seed(0)
    shapes = [(1, 6, T, 16), (1, 2, T, 16), (1, 2, T, value_width), (1, T, 6, value_width)]
    return [torch.randn(s, generator=generator, dtype=torch.float64).to(dtype) for s in shapes]


def dense_attention(query, key, value, batch: Batch, rules: ScoreRules) -> Tensor:
    """The definition, from positions alone: a mask over all pairs of tokens."""
    layout = batch.layout
    T = query.shape[2]
    mask = torch.zeros(T, T, dtype=torch.bool)
    for segment in layout.segments:
        for q in range(segment.start, segment.stop):
            mask[q, segment.start : q + 1] = True
            mask[q, segment.prefix_start : segment.prefix_stop] = True
    if rules.window is not None:
        positions = batch.position_ids[0]
        mask &= positions[:, None] - positions < rules.window
    key, value = (x.repeat_interleave(3, dim=1) for x in (key, value))
    scores, softcap = query @ key.mT * rules.scale, rules.softcap
    scores = scores if softcap is None else softcap * torch.tanh(scores / softcap)
    weights = scores.masked_fill(~mask, float("-inf")).exp()
    total = weights.sum(-1, keepdim=True)
    if rules.sinks is not None:
        total = total + rules.sinks[:, None, None].exp()
    return (weights / total @ value).transpose(1, 2)


def values_and_gradients(attend, inputs: list[Tensor], *more: Tensor) -> list[Tensor]:
    leaves = [x.clone().requires_grad_() for x in (*inputs[:3], *more)]
    output = attend(*leaves)
    return [output.detach(), *torch.autograd.grad(output, leaves, inputs[3])]


@pytest.mark.parametrize("softcap", [None, 1.5])
# a prompt of 40 tokens is longer than all but the last
@pytest.mark.parametrize("window", [None, 1, 7, 33, 70])
@pytest.mark.parametrize("attention", [*map(build_attention, ("eager", "sdpa")), VARLEN])
def test_every_packed_attention_is_the_masked_one(attention, window, softcap):
    rules = ScoreRules(0.2, softcap, window)
    for share_prompt in (True, False):
        batch = pack_rows(ROWS, pad_token_id=0, share_prompt=share_prompt)
        assert_as_dense(attention, batch, rules)


def assert_as_dense(
    attention: PackedAttention, batch: Batch, rules: ScoreRules, value_width: int = 16
) -> None:
    inputs = random_inputs(batch, value_width=value_width)

    def packed(query, key, value, *sinks):
        asked = rules._replace(sinks=sinks[0] if sinks else None)
        return attention.attend(query, key, value, attention.prepare(batch.layout), asked)

    def dense(query, key, value, *sinks):
        asked = rules._replace(sinks=sinks[0] if sinks else None)
        return dense_attention(query, key, value, batch, asked)

    more = [] if rules.sinks is None else [rules.sinks]
    expected = values_and_gradients(dense, inputs, *more)
    for ours, theirs in zip(values_and_gradients(packed, inputs, *more), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


@pytest.mark.parametrize("window", [None, 7])
@pytest.mark.parametrize("attention", ["eager", "sdpa"])
# of another width than keys the kernel for CPUs is not taken
@pytest.mark.parametrize("value_width", [16, 8])
def test_sinks_take_their_share_of_the_weights(attention, window, value_width):
    sinks = torch.linspace(-2, 3, 6, dtype=torch.float64)
    for share_prompt in (True, False):
        batch = pack_rows(ROWS, pad_token_id=0, share_prompt=share_prompt)
        rules = ScoreRules(0.2, window=window, sinks=sinks)
        assert_as_dense(build_attention(attention), batch, rules, value_width)


def test_random_rows_beyond_every_window_are_computed_as_the_mask_says():
    rng = random.Random(0)
    for window in (1, 3, 16, 64, 100):
        rows = [
            EncodedRow(*(range(rng.randint(1, longest)) for longest in (200, 120, 90)))
            for _ in range(4)
        ]
        batch = pack_rows([*rows, rows[0]._replace(chosen_ids=[5])], pad_token_id=0)
        assert_as_dense(build_attention("sdpa"), batch, ScoreRules(0.2, window=window))


def test_a_window_keeps_the_keys_that_are_multiplied_few():
    batch = pack_rows([EncodedRow(range(2000), range(1500), range(900))], pad_token_id=0)

    def products(window):
        groups = group_segments(batch.layout, window)
        return sum(_number(g.queries) * _number(g.keys) / _segments(g.queries) for g in groups)

    assert products(64) < products(None) / 10


def _number(places: Tensor | slice) -> int:
    return places.stop - places.start if isinstance(places, slice) else places.numel()


def _segments(places: Tensor | slice) -> int:
    return 1 if isinstance(places, slice) else len(places)


def test_short_segments_share_a_call_and_long_ones_do_not():
    rng = random.Random(0)
    rows = [
        EncodedRow(
            *(range(k, k + rng.randint(1, longest)) for k, longest in enumerate((90, 60, 60)))
        )
        for _ in range(28)
    ]
    batch = pack_rows(rows, pad_token_id=0)
    groups = group_segments(batch.layout)
    places = torch.cat([group.places for group in groups])
    assert sorted(places.tolist()) == list(range(batch.input_ids.shape[1]))
    assert len(groups) < len(batch.layout.segments) / 3
    everywhere = torch.arange(batch.input_ids.shape[1])[None]
    queries, keys = (
        [places if isinstance(places, Tensor) else everywhere[:, places] for places in of_groups]
        for of_groups in zip(*((group.queries, group.keys) for group in groups), strict=True)
    )
    alone = [places for places in keys if places.shape[1] >= LONG_KEYS]
    assert alone and all(len(places) == 1 for places in alone)
    computed = sum(q.shape[1] * k.numel() for q, k in zip(queries, keys, strict=True))
    needed = sum(
        (stop - start) * (stop - start + prefix_stop - prefix_start)
        for start, stop, prefix_start, prefix_stop in batch.layout.segments
    )
    assert computed <= MAX_PADDING * needed

    def grouped(query, key, value):
        return GroupedAttention.apply(query, key, value, None, groups, 0.2, True)

    def grouped_anywhere(query, key, value):
        return GroupedAttention.apply(query, key, value, None, groups, 0.2, False)

    def dense(query, key, value):
        return dense_attention(query, key, value, batch, ScoreRules(0.2))

    inputs = random_inputs(batch)
    expected = values_and_gradients(dense, inputs)
    for attend in (grouped, grouped_anywhere):
        for ours, theirs in zip(values_and_gradients(attend, inputs), expected, strict=True):
            torch.testing.assert_close(ours, theirs, rtol=1e-9, atol=1e-9)


def test_what_a_layout_is_made_into_goes_to_a_gpu_from_page_locked_memory(monkeypatch):
    """From any other memory the host would wait for what the GPU computes, once a micro-batch."""
    locked, sent = set[int](), list[Tensor]()

    def pin(tensor):
        copy = tensor.clone()
        locked.add(copy.data_ptr())
        sent.append(copy)
        return copy

    def to(tensor, device, *, non_blocking):
        assert tensor.data_ptr() in locked and non_blocking
        return tensor

    layout = pack_rows(ROWS, pad_token_id=0).layout
    monkeypatch.setattr(Tensor, "pin_memory", pin)
    monkeypatch.setattr(Tensor, "to", to)
    on_gpu = SimpleNamespace(
        segments=layout.segments, query_offsets=SimpleNamespace(device=torch.device("cuda"))
    )
    groups = group_segments(on_gpu, 7)
    assert len(sent) == sum(isinstance(x, Tensor) for group in groups for x in group) > 0
    sent.clear()
    groups = Sequences(on_gpu).groups
    assert len(sent) == 3 * len(groups) + 1


def test_parts_for_a_gpu_have_no_more_scores_than_fit(monkeypatch):
    monkeypatch.setattr(segments, "MAX_SCORES", 500)
    monkeypatch.setattr(segments, "scores_are_in_memory", lambda _: True)
    for window in (None, 7):
        for share_prompt in (True, False):
            batch = pack_rows(ROWS, pad_token_id=0, share_prompt=share_prompt)
            groups = group_segments(batch.layout, window)
            assert all(_number(g.queries) * _number(g.keys) <= 500 * 16 for g in groups)
            widest = [_number(g.keys) / _segments(g.keys) for g in groups]
            tallest = [_number(g.queries) / _segments(g.queries) for g in groups]
            assert all(a * b <= 500 for a, b in zip(widest, tallest, strict=True))
            assert_as_dense(build_attention("sdpa"), batch, ScoreRules(0.2, window=window))


def test_groups_for_a_gpu_hold_long_segments_too_but_no_endless_masks():
    lengths = [300, 290, 20, 19]
    on_gpu = runs_of_like_length(lengths, lengths, long_keys=None, max_scores=2**24)
    assert list(on_gpu) == [slice(0, 2), slice(2, 4)]
    bounded = runs_of_like_length(lengths, lengths, long_keys=None, max_scores=300**2)
    assert list(bounded) == [slice(0, 1), slice(1, 2), slice(2, 4)]


@pytest.mark.parametrize("on_cpu", [True, False])
@pytest.mark.parametrize("has_sinks", [False, True])
def test_sdpa_in_bfloat16_is_as_close_as_one_call_over_all_tokens(on_cpu, has_sinks):
    batch = pack_rows(ROWS, pad_token_id=0)
    inputs = [x.bfloat16() for x in random_inputs(batch)]
    # scores of some size, whose rounding would show
    inputs[:2] = [3 * x for x in inputs[:2]]
    more = [torch.linspace(-1, 2, 6)] if has_sinks else []
    groups = group_segments(batch.layout)

    def packed(query, key, value, *sinks):
        sinks = sinks[0] if sinks else None
        return GroupedAttention.apply(query, key, value, sinks, groups, 0.2, on_cpu)

    def dense(query, key, value, *sinks):
        rules = ScoreRules(0.2, sinks=sinks[0] if sinks else None)
        return dense_attention(query, key, value, batch, rules)

    float64 = values_and_gradients(dense, [x.double() for x in inputs], *(x.double() for x in more))
    in_torch = values_and_gradients(dense, inputs, *(x.bfloat16() for x in more))
    ours = values_and_gradients(packed, inputs, *more)
    for found, same_dtype, truth in zip(ours, in_torch, float64, strict=True):
        error = (found.double() - truth).abs().max()
        assert error <= 2 * (same_dtype.double() - truth).abs().max() + 1e-5


@pytest.mark.parametrize("window", [None, 7, 33])
@pytest.mark.parametrize("softcap", [None, 1.5])
def test_flex_attention_gets_the_same_mask(softcap, window):
    rules = ScoreRules(0.2, softcap, window)
    batch = pack_rows(ROWS, pad_token_id=0)
    query, key, value, _ = random_inputs(batch, torch.float32)
    attention = build_attention("flex")
    # without a graph: on a CPU it computes forward only
    with torch.no_grad():
        ours = attention.attend(query, key, value, attention.prepare(batch.layout), rules)
        expected = dense_attention(query, key, value, batch, rules)
    torch.testing.assert_close(ours, expected, rtol=1e-5, atol=1e-5)


def test_flash_attention_adds_its_gradients_up_in_one_order_where_it_can(monkeypatch):
    asked = []

    def old(q, k, v, **options):
        asked.append(options)
        return q

    def new(q, k, v, *, deterministic=False, **options):
        return old(q, k, v, deterministic=deterministic, **options)

    batch = pack_rows(ROWS, pad_token_id=0)
    query, key, value, _ = random_inputs(batch)
    for function in (old, new):
        module = SimpleNamespace(flash_attn_varlen_func=function)
        monkeypatch.setitem(sys.modules, "flash_attn", module)
        attention = build_attention("flash_attention_2")
        output = attention.attend(query, key, value, batch.layout, ScoreRules(0.2, window=7))
        assert torch.equal(output, query.transpose(1, 2))
    assert "deterministic" not in asked[0] and asked[1]["deterministic"]
    assert all(options["window_size"] == (6, 0) for options in asked)


def test_torchs_attention_gets_keys_of_their_own_heads_in_every_version(monkeypatch):
    """Once for each head of queries they would be kept so until the backward, and are not planned
    so."""
    heads = []

    def of_2_11(q, k, v, *offsets, window_size, scale):
        heads.append((q.shape[1], k.shape[1], v.shape[1]))
        return q

    def later(q, k, v, *offsets, enable_gqa=False, **options):
        assert enable_gqa
        return of_2_11(q, k, v, *offsets, **options)

    batch = pack_rows(ROWS, pad_token_id=0)
    query, key, value, _ = random_inputs(batch)
    for function in (of_2_11, later):
        module = SimpleNamespace(varlen_attn=function)
        monkeypatch.setitem(sys.modules, "torch.nn.attention.varlen", module)
        build_attention("varlen").attend(query, key, value, batch.layout, ScoreRules(0.2))
    assert query.shape[1] > key.shape[1]
    assert heads == [(query.shape[1], key.shape[1], key.shape[1])] * 2


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
def test_sampling_is_what_it_was_before_the_model_learnt_to_pack(family):
    model = build_model(family).eval()
    input_ids = torch.tensor([[0, 0, 3, 4], [5, 6, 7, 8]])
    attention_mask = torch.tensor([[0, 0, 1, 1], [1, 1, 1, 1]])
    options = {"do_sample": False, "max_length": 24}
    expected = TokenScorer(model).generate(input_ids, attention_mask, **options)
    ours = TokenScorer(model, build_attention("sdpa"))
    assert model.config._attn_implementation == "fastpref"
    assert torch.equal(ours.generate(input_ids, attention_mask, **options), expected)
