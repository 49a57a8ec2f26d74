"""An adapted layer computes peft's formula, to float32's rounding, whatever it computes by."""

import peft
import pytest
import torch
from torch import Tensor

from fastpref.model import low_rank
from fastpref.model.low_rank import adapted_linear

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
    low_rank.share_input(layer)
    made: list[None] = []
    take_apart = low_rank.take_apart
    monkeypatch.setattr(low_rank, "take_apart", lambda *x: made.append(None) or take_apart(*x))
    matrices = layer.lora_A["default"].weight, layer.lora_B["default"].weight
    optimizer = torch.optim.AdamW(matrices, lr=0.1)
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
