"""An adapted layer computes peft's formula, to float32's rounding, whatever it computes by."""

import peft
import pytest
import torch
from tiny_models import build_model
from torch import Tensor

from fastpref.batch import EncodedRow
from fastpref.batches.padded import pad_rows
from fastpref.config import AdapterConfig
from fastpref.model.adapters import low_rank
from fastpref.model.adapters.lora import insert_adapters
from fastpref.model.adapters.low_rank import adapted_linear
from fastpref.model.logit_path import measure_logit_path
from fastpref.model.scorer import TokenScorer
from fastpref.train.optim import build_optimizer

N, INPUTS, OUTPUTS, RANK = 50, 96, 64, 8
SCALING = 2.0


def make_tensors(dtype: torch.dtype) -> list[Tensor]:
    torch.manual_seed(0)
    x, weight, bias = torch.randn(2, N // 2, INPUTS), torch.randn(OUTPUTS, INPUTS) / 10, None
    bias = torch.randn(OUTPUTS)
    A, B = torch.randn(RANK, INPUTS) / 10, torch.randn(OUTPUTS, RANK) / 10
    return [*(tensor.to(dtype) for tensor in (x, weight, bias)), A, B]


def exact(x: Tensor, weight: Tensor, bias: Tensor, A: Tensor, B: Tensor) -> Tensor:
    return x @ weight.T + bias + SCALING * ((x @ A.T) @ B.T)


def gradients(function, tensors: list[Tensor], upstream: Tensor) -> list[Tensor]:
    leaves = [tensors[0], *tensors[3:]]
    for leaf in leaves:
        leaf.requires_grad_()
    output = function(*tensors)
    return [output, *torch.autograd.grad(output, leaves, upstream.to(output.dtype))]


def with_units(monkeypatch: pytest.MonkeyPatch) -> None:
    """A CPU that multiplies bfloat16 and sums in float32, as a GPU does."""
    mm = torch.mm

    def wide_mm(a: Tensor, b: Tensor, *, out_dtype: torch.dtype | None = None) -> Tensor:
        return mm(a, b) if out_dtype is None else mm(a.double(), b.double()).to(out_dtype)

    monkeypatch.setattr(torch, "mm", wide_mm)
    monkeypatch.setattr(low_rank, "has_units", lambda tensor: tensor.dtype == torch.bfloat16)


@pytest.mark.parametrize("units", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_formula(dtype, units, monkeypatch):
    tensors = make_tensors(dtype)
    upstream = torch.randn(2, N // 2, OUTPUTS).to(dtype)
    expected = gradients(exact, [t.double() for t in tensors], upstream)
    if units:
        with_units(monkeypatch)
    found = gradients(lambda *t: adapted_linear(*t, SCALING), tensors, upstream)
    assert [t.dtype for t in found] == [dtype, dtype, torch.float32, torch.float32]
    for i, (ours, truth) in enumerate(zip(found, expected, strict=True)):
        error = (ours.double() - truth).norm() / truth.norm()
        # what leaves in the model's dtype is rounded to it, twice; what is trained is not
        bound = 2.0**-8 if dtype == torch.bfloat16 and i < 2 else 2.0**-16
        assert error <= bound, i


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_on_a_gpu_values_and_gradients_are_those_of_the_formula():
    tensors = [t.cuda() for t in make_tensors(torch.bfloat16)]
    upstream = torch.randn(2, N // 2, OUTPUTS).to(tensors[0])
    expected = gradients(exact, [t.double() for t in tensors], upstream)
    found = gradients(lambda *t: adapted_linear(*t, SCALING), tensors, upstream)
    for i, (ours, truth) in enumerate(zip(found, expected, strict=True)):
        bound = 2.0**-8 if i < 2 else 2.0**-16
        assert (ours.double() - truth).norm() <= bound * truth.norm(), i
    x, weight, bias, A, B = (t.detach() for t in tensors)
    unchanged = adapted_linear(x, weight, bias, A, torch.zeros_like(B), SCALING)
    assert torch.equal(unchanged, torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("units", [False, True])
def test_a_second_matrix_of_zeros_changes_no_bit(units, monkeypatch):
    x, weight, bias, A, B = make_tensors(torch.bfloat16)
    if units:
        with_units(monkeypatch)
    found = adapted_linear(x, weight, bias, A, torch.zeros_like(B), SCALING)
    assert torch.equal(found, torch.nn.functional.linear(x, weight, bias))


def test_parts_follow_every_update_of_their_matrices(monkeypatch):
    with_units(monkeypatch)
    x, weight, _, A, B = make_tensors(torch.bfloat16)
    base = torch.nn.Linear(INPUTS, OUTPUTS, bias=False, dtype=torch.bfloat16)
    adapted = torch.nn.Sequential(base)
    config = peft.LoraConfig(r=RANK, lora_alpha=SCALING * RANK, target_modules=["0"])
    [layer] = peft.inject_adapter_in_model(config, adapted)
    parts = low_rank.share_input(layer)
    made: list[None] = []
    take_apart = low_rank.take_apart
    monkeypatch.setattr(low_rank, "take_apart", lambda *x: made.append(None) or take_apart(*x))
    matrices = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    # as a run builds it: a fused one leaves no trace in a tensor's version
    optimizer = build_optimizer("AdamW", list(matrices), lr=0.1, options={})
    optimizer.register_step_post_hook(lambda *_: parts.forget())
    with torch.no_grad():
        base.weight.copy_(weight)
        for matrix, value in zip(matrices, (A, B), strict=True):
            matrix.data = value
    for step in range(3):
        for _ in range(2):
            output = layer(x)
            expected = exact(*(t.double() for t in (x, weight, torch.zeros(OUTPUTS), *matrices)))
            assert (output - expected).norm() <= 2.0**-7 * expected.norm()
        assert len(made) == step + 1
        output.square().sum().backward()
        optimizer.step()


@pytest.mark.parametrize("optimizer", ["AdamW", "RMSprop"])
def test_a_scorer_computes_with_every_update_of_its_adapters(monkeypatch, optimizer):
    """As on a GPU, where parts are kept between the steps of an optimizer."""
    with_units(monkeypatch)
    losses = []
    for keeps in (True, False):
        model = build_model("llama").bfloat16().eval()
        adapters = insert_adapters(model, AdapterConfig(kind="lora"), None, None)
        torch.manual_seed(0)
        for parameter in adapters.trained():
            torch.nn.init.normal_(parameter, std=0.1)
        scorer = TokenScorer(
            model, path=measure_logit_path(build_model("llama")), adapters=adapters
        )
        built = build_optimizer(optimizer, scorer.trained(), lr=0.05, options={})
        scorer.follow(built)
        if not keeps:
            monkeypatch.setattr(low_rank.PartsOf, "get", lambda _, __, *x: low_rank.take_apart(*x))
        batch = pad_rows([EncodedRow([3, 4, 5], [6, 7, 8], [9, 10])], pad_token_id=0)
        for _ in range(3):
            loss = -scorer(batch).sum()
            losses.append(loss.item())
            built.zero_grad()
            loss.backward()
            built.step()
    assert losses[:3] == losses[3:] and losses[2] < losses[1] < losses[0]


def test_the_input_is_kept_once_for_all_layers_that_read_it():
    x, weight, bias, A, B = make_tensors(torch.bfloat16)
    x.requires_grad_()
    A.requires_grad_()
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        for _ in range(3):
            adapted_linear(x, weight, bias, A, B, SCALING)
    of_inputs = {
        t.untyped_storage().data_ptr() for t in kept if t.shape[-1] == INPUTS and t.dim() == 3
    }
    assert of_inputs == {x.untyped_storage().data_ptr()}
    assert not any(t.dtype == torch.float32 and t.numel() >= x.numel() for t in kept)
