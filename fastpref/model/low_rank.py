"""The arithmetic of an adapted linear layer, y = x Wᵀ + b + s (x Aᵀ) Bᵀ (arXiv:2106.09685).

peft converts a layer's whole input to the adapter's float32 and keeps it so for the backward: 4
bytes a number where the model has 2, once for each of the layers that read the same input, and
several passes over it. Here the input is kept as it is, which layers share, products are added to
the layer's output where it lies, and both matrices still count with all that float32 says of them:
on a GPU a float32 number is the sum of two of bfloat16 up to 2^-17 of it, so three products on the
tensor cores, as one of three times the rank, are off by no more than that.

Shapes: N inputs, I and O the layer's input and output, R the rank.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def adapted_linear(
    input: Tensor, weight: Tensor, bias: Tensor | None, A: Tensor, B: Tensor, scaling: float
) -> Tensor:
    """A frozen linear layer and its adapter.

    Args:
        input: (..., I), in the layer's dtype.
        weight: (O, I), frozen.
        bias: (O,), frozen, or None.
        A: (R, I) float32.
        B: (O, R) float32.
        scaling: s.

    Returns:
        (..., O), in the layer's dtype: its own output, then the sum is rounded to it, as in peft.
    """
    return _AdaptedLinear.apply(input, weight, bias, A, B, scaling)


def share_input(layer: Any) -> None:
    """Let one of peft's layers compute by `adapted_linear`, where it is no more than that.

    Args:
        layer: Of `peft.tuners.lora`; changed in place.
    """
    from peft.tuners.lora import Linear

    if (type(layer), type(layer.base_layer)) == (Linear, nn.Linear):
        layer.forward = partial(_forward, layer)


def _forward(layer: Any, input: Tensor) -> Tensor:
    base = layer.base_layer
    [name] = layer.active_adapters
    if layer.disable_adapters or name not in layer.lora_A:
        return base(input)
    A, B = layer.lora_A[name], layer.lora_B[name]
    drops = not isinstance(layer.lora_dropout[name], nn.Identity)
    if drops or B.bias is not None or name in layer.lora_variant:
        return type(layer).forward(layer, input)
    return adapted_linear(input, base.weight, base.bias, A.weight, B.weight, layer.scaling[name])


class _AdaptedLinear(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
    ) -> Tensor:
        x_NI = input.flatten(0, -2)
        h_NR = _times(x_NI, A.T)
        # no view: a model may change it in place
        output = F.linear(input, weight, bias)
        _add_product(output.view(-1, output.shape[-1]), h_NR, B.T, scaling)
        # the input is another operation's output, and that of other layers
        ctx.save_for_backward(input, weight, A, B, h_NR)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, A, B, h_NR = ctx.saved_tensors
        x_NI, dy_NO = input.flatten(0, -2), gradients[0].flatten(0, -2)
        dh_NR = _times(dy_NO, B).mul_(ctx.scaling)
        dA, dB = _transposed_times(dh_NR, x_NI), _transposed_times(h_NR, dy_NO)
        dx_NI = None
        if ctx.needs_input_grad[0]:
            dx_NI = dy_NO @ weight
            _add_product(dx_NI, dh_NR, A, 1.0)
            dx_NI = dx_NI.view_as(input)
        return dx_NI, None, None, dA, dB.T.mul_(ctx.scaling), None


def _times(wide: Tensor, narrow: Tensor) -> Tensor:
    """A product with a narrow matrix, in float32.

    Args:
        wide: (N, K), in any dtype.
        narrow: (K, R) float32.
    """
    if not _has_units(wide):
        return wide.float() @ narrow
    high, low = _split(narrow, wide.dtype)
    products = torch.mm(wide, torch.cat([high, low], 1), out_dtype=torch.float32)
    return products[:, : narrow.shape[1]] + products[:, narrow.shape[1] :]


def _transposed_times(narrow: Tensor, wide: Tensor) -> Tensor:
    """The product of a narrow matrix's transpose, in float32.

    Args:
        narrow: (N, R) float32.
        wide: (N, K), in any dtype.

    Returns:
        (R, K).
    """
    if not _has_units(wide):
        return narrow.T @ wide.float()
    high, low = _split(narrow, wide.dtype)
    products = torch.mm(torch.cat([high, low], 1).T, wide, out_dtype=torch.float32)
    return products[: narrow.shape[1]] + products[narrow.shape[1] :]


def _add_product(sum_NK: Tensor, narrow_NR: Tensor, other_RK: Tensor, factor: float) -> None:
    """Add a product of float32 matrices times a factor to a tensor of any dtype, in place."""
    if sum_NK.dtype == torch.float32:
        sum_NK.addmm_(narrow_NR, other_RK, alpha=factor)
        return
    if not _has_units(sum_NK):
        sum_NK.copy_(torch.addmm(sum_NK.float(), narrow_NR, other_RK, alpha=factor))
        return
    high_NR, low_NR = _split(narrow_NR, sum_NK.dtype)
    high_RK, low_RK = _split(other_RK, sum_NK.dtype)
    left = torch.cat([high_NR, low_NR, high_NR], 1)
    right = torch.cat([high_RK, high_RK, low_RK], 0)
    sum_NK.addmm_(left, right, alpha=factor)


def _split(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A float32 matrix as the sum of two of 16 bits."""
    high = matrix.to(dtype)
    return high, (matrix - high.float()).to(dtype)


def _has_units(tensor: Tensor) -> bool:
    """Whether products of its dtype are summed in float32 by units of their own."""
    # on the meta device memory is counted, for a GPU
    return tensor.device.type in ("cuda", "meta") and tensor.dtype == torch.bfloat16
