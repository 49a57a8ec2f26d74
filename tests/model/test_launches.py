"""How many kernels a layer launches: small micro-batches on a GPU wait for the host's launches.

Counted on a CPU as operators that compute, by the difference between four layers and two. What is
one kernel on a GPU (attention over packed rows, norms, SwiGLU, rotation) is one call here, forward
and backward.
"""

from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
from launches import Launches
from tiny_models import build_family
from torch import Tensor

from fastpref.batch import EncodedRow
from fastpref.batches.packed import pack_rows
from fastpref.model import liger
from fastpref.model.adapters.low_rank import adapted_linear, take_apart
from fastpref.model.attention.backends import PackedAttention, attend_varlen
from fastpref.model.build import freeze
from fastpref.model.scorer import TokenScorer

SIZES = {
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


def one_kernel(shapes: Callable[..., tuple[Tensor, ...]]) -> Callable[..., Any]:
    """A function that launches one kernel forward, and one backward for all its gradients."""

    class Kernel(torch.autograd.Function):
        @staticmethod
        def forward(ctx, *tensors):
            ctx.save_for_backward(*tensors)
            first, *others = shapes(*tensors)
            results = first.zero_(), *others
            return results if others else results[0]

        @staticmethod
        def backward(ctx, *grads):
            first, *others = (torch.empty_like(x) for x in ctx.saved_tensors)
            return first.zero_(), *others

    return Kernel.apply


ATTENTION = one_kernel(lambda q, k, v: (torch.empty_like(q),))
NORM = one_kernel(lambda hidden, weight: (torch.empty_like(hidden),))
GATED = one_kernel(lambda gate, up: (torch.empty_like(gate),))
ROTATED = one_kernel(lambda q, k, cos, sin: (torch.empty_like(q), torch.empty_like(k)))


@pytest.fixture
def fused(monkeypatch):
    """Kernels that a GPU has, counted as one each."""
    monkeypatch.setattr(liger, "_rms_norm", lambda module, x: NORM(x, module.weight))
    monkeypatch.setattr(
        liger,
        "_swiglu",
        lambda module, x: module.down_proj(GATED(module.gate_proj(x), module.up_proj(x))),
    )
    monkeypatch.setattr(
        "transformers.models.llama.modeling_llama.apply_rotary_pos_emb",
        lambda q, k, cos, sin: ROTATED(q, k, cos.unsqueeze(1), sin.unsqueeze(1)),
    )


def rows() -> list[EncodedRow]:
    generator = torch.Generator().manual_seed(0)

    def ids() -> list[int]:
        length = int(torch.randint(3, 30, (), generator=generator))
        return torch.randint(3, 90, (length,), generator=generator).tolist()

    return [EncodedRow(ids(), ids(), ids()) for _ in range(6)]


def launches(num_layers: int) -> Counter[str]:
    """Of the second micro-batch of a step: policy forward and backward, reference forward."""
    model, other = (
        build_family("llama", **SIZES, num_hidden_layers=num_layers).eval() for _ in range(2)
    )
    attention = PackedAttention(
        name="varlen", attend=attend_varlen(lambda q, k, v, *_: ATTENTION(q, k, v))
    )
    for one in (model, other):
        liger.replace_layers(one)
    policy = TokenScorer(model, attention)
    policy.keep_masters(torch.bfloat16)
    reference = TokenScorer(other, attention)
    freeze(reference, torch.bfloat16, None)
    batch = pack_rows(rows(), pad_token_id=0, share_prompt=True)
    for _ in range(2):
        with Launches() as counted:
            with torch.no_grad():
                reference(batch)
            policy(batch).sum().backward()
        policy.release()
    return counted.calls


def test_a_layer_launches_no_more_kernels_than_it_has_to(fused):
    two, four = launches(2), launches(4)
    a_layer = {name: (four[name] - two[name]) / 2 for name in four if four[name] != two[name]}
    # 7 products forward, twice, and 14 backward; 5 kernels, twice, and 5; prompts' keys gathered
    # for both responses; 4 + 5 sums of what branches meet; 9 gradients handed to their masters
    assert a_layer == {
        "mm": 28,
        "zero_": 15,
        "index_select": 8,
        "index_add_": 2,
        "add": 9,
        "add_": 9,
    }


def test_an_adapted_layer_launches_little_beside_its_products():
    """On the meta device, which takes a GPU's way."""
    with torch.device("meta"):
        input = torch.empty(1, 64, 128, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(256, 128, dtype=torch.bfloat16)
        A, B = torch.empty(16, 128, requires_grad=True), torch.empty(256, 16, requires_grad=True)
    parts = take_apart(A, B)
    with Launches() as forward:
        output = adapted_linear(input, weight, None, A, B, 2.0, parts=parts)
    with Launches() as backward:
        output.backward(torch.empty_like(output))
    assert forward.calls == {"mm": 2, "addmm_": 1, "add": 1, "sub": 1, "_to_copy": 2, "cat": 1}
    assert sum(backward.calls.values()) <= 14
