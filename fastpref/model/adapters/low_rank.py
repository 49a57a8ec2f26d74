"""The arithmetic of an adapted linear layer, y = x Wᵀ + b + s (x Aᵀ) Bᵀ (arXiv:2106.09685).

peft converts a layer's whole input to the adapter's float32 and keeps it so for the backward: 4
bytes a number where the model has 2, once for each of the layers that read the same input, and
several passes over it. Here the input is kept as it is, which layers share, products are added to
the layer's output where it lies, and both matrices still count with all that float32 says of them:
on a GPU a float32 number is the sum of two of bfloat16 up to 2^-17 of it, so three products on the
tensor cores, as one of three times the rank, are off by no more than that. The matrices are taken
apart once an optimizer step.

Shapes: N inputs, I and O the layer's input and output, R the rank.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Parts = tuple[Tensor, Tensor]
"""A and Bᵀ in parts of 16 bits, (3R, I) and (3R, O), see `_right`."""


def adapted_linear(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    A: Tensor,
    B: Tensor,
    scaling: float,
    *,
    parts: Parts | None = None,
) -> Tensor:
    """A frozen linear layer and its adapter.

    Args:
        input: (..., I), in the layer's dtype.
        weight: (O, I), frozen.
        bias: (O,), frozen, or None.
        A: (R, I) float32.
        B: (O, R) float32.
        scaling: s.
        parts: Of both as they are now; None: to be made.

    Returns:
        (..., O), in the layer's dtype: its own output, then the sum is rounded to it, as in peft.
    """
    if not has_units(input):
        return _InFloat32.apply(input, weight, bias, A, B, scaling)
    if parts is None:
        parts = take_apart(A, B, input.dtype)
    return _InParts.apply(input, weight, bias, A, B, scaling, *parts)


def take_apart(A: Tensor, B: Tensor, dtype: torch.dtype) -> Parts:
    """Both matrices of an adapter in parts of 16 bits.

    Args:
        A, B: (R, I) and (O, R) float32.
        dtype: Of the parts.
    """
    return _right(A.detach(), dtype), _right(B.detach().T, dtype)


def has_units(tensor: Tensor) -> bool:
    """Whether products of its dtype are summed in float32 by units of their own."""
    # on the meta device memory is counted, for a GPU
    return tensor.device.type in ("cuda", "meta") and tensor.dtype == torch.bfloat16


class PartsOf:
    """The parts of a layer's adapters, by their names, until they are forgotten.

    No tensor tells that it has changed: fused optimizers leave its version as it is.
    """

    def __init__(self) -> None:
        self._found: dict[str, Parts] = {}

    def forget(self) -> None:
        """The adapters have changed."""
        self._found.clear()

    def get(self, name: str, A: Tensor, B: Tensor, dtype: torch.dtype) -> Parts:
        """Of the adapter of a name, in the dtype that its layer always computes in."""
        if name not in self._found:
            self._found[name] = take_apart(A, B, dtype)
        return self._found[name]


def share_input(layer: Any) -> PartsOf | None:
    """Let one of peft's layers compute by `adapted_linear`, where it is no more than that.

    Args:
        layer: Of `peft.tuners.lora`; changed in place.

    Returns:
        What is to be forgotten when an adapter changes; None where nothing is kept.
    """
    from peft.tuners.lora import Linear

    if (type(layer), type(layer.base_layer)) != (Linear, nn.Linear):
        return None
    parts_of = PartsOf()
    layer.forward = partial(_forward, layer, parts_of)
    return parts_of


def _forward(layer: Any, parts_of: PartsOf, input: Tensor) -> Tensor:
    base = layer.base_layer
    [name] = layer.active_adapters
    if layer.disable_adapters or name not in layer.lora_A:
        return base(input)
    A, B = layer.lora_A[name], layer.lora_B[name]
    drops = not isinstance(layer.lora_dropout[name], nn.Identity)
    # matrices of a variant may be modules of its own
    if drops or name in layer.lora_variant or B.bias is not None:
        return type(layer).forward(layer, input)
    parts = None
    if has_units(input) and not torch.compiler.is_compiling():
        parts = parts_of.get(name, A.weight, B.weight, input.dtype)
    return adapted_linear(
        input, base.weight, base.bias, A.weight, B.weight, layer.scaling[name], parts=parts
    )


class _InFloat32(torch.autograd.Function):
    """Products with the adapter in float32."""

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
        h_NR = _times(input.flatten(0, -2), A.T)
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
        dA, dB = _summed_products(dh_NR, x_NI), _summed_products(h_NR, dy_NO)
        dx_NI = None
        if ctx.needs_input_grad[0]:
            dx_NI = dy_NO @ weight
            _add_product(dx_NI, dh_NR, A, 1.0)
            dx_NI = dx_NI.view_as(input)
        return dx_NI, None, None, dA, dB.T.mul_(ctx.scaling), None


def _times(wide_NK: Tensor, matrix_KR: Tensor) -> Tensor:
    """The product of a matrix of any dtype with one of float32, (N, R) float32."""
    return torch.cat([rows.float() @ matrix_KR for rows in _float32_rows(wide_NK)])


def _summed_products(narrow_NR: Tensor, wide_NK: Tensor) -> Tensor:
    """narrowᵀ @ wide of a float32 matrix and one of any dtype, (R, K) float32."""
    sum_RK = narrow_NR.new_zeros(narrow_NR.shape[1], wide_NK.shape[1])
    for narrow, rows in zip(*map(_float32_rows, (narrow_NR, wide_NK)), strict=True):
        sum_RK.addmm_(narrow.T, rows.float())
    return sum_RK


def _add_product(sum_NK: Tensor, narrow_NR: Tensor, other_RK: Tensor, factor: float) -> None:
    """Add a product of float32 matrices times a factor to a tensor of any dtype, in place."""
    for rows, narrow in zip(*map(_float32_rows, (sum_NK, narrow_NR)), strict=True):
        if rows.dtype == torch.float32:
            rows.addmm_(narrow, other_RK, alpha=factor)
        else:
            rows.copy_(torch.addmm(rows.float(), narrow, other_RK, alpha=factor))


def _float32_rows(matrix_NK: Tensor) -> tuple[Tensor, ...]:
    """Its rows in pieces that may be copied in float32: all rows would take twice the matrix."""
    return matrix_NK.split(256)


class _InParts(torch.autograd.Function):
    """Products with the adapter in parts of 16 bits, which are summed in float32."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        A: Tensor,
        B: Tensor,
        scaling: float,
        parts_A: Tensor,
        parts_B: Tensor,
    ) -> Tensor:
        h_N3R = _left(_times_pair(input.flatten(0, -2), _pair(parts_A).T))
        output = F.linear(input, weight, bias)
        output.view(-1, output.shape[-1]).addmm_(h_N3R, parts_B, alpha=scaling)
        ctx.save_for_backward(input, weight, h_N3R, parts_A, parts_B)
        ctx.scaling = scaling
        return output

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        input, weight, h_N3R, parts_A, parts_B = ctx.saved_tensors
        x_NI, dy_NO = input.flatten(0, -2), gradients[0].flatten(0, -2)
        R = parts_A.shape[0] // 3
        dh_N3R = _left(_times_pair(dy_NO, _pair(parts_B).T))
        # in the layouts of A and B
        products = torch.mm(dh_N3R[:, : 2 * R].T, x_NI, out_dtype=torch.float32)
        dA = (products[:R] + products[R:]).mul_(ctx.scaling)
        dB = _times_pair(dy_NO.T, h_N3R[:, : 2 * R]).mul_(ctx.scaling)
        dx_NI = None
        if ctx.needs_input_grad[0]:
            dx_NI = dy_NO @ weight
            dx_NI.addmm_(dh_N3R, parts_A, alpha=ctx.scaling)
            dx_NI = dx_NI.view_as(input)
        return dx_NI, None, None, dA, dB, None, None, None


def _times_pair(wide: Tensor, pair: Tensor) -> Tensor:
    """The product with a float32 matrix in two parts side by side, (M, K) (K, 2R) -> (M, R)
    float32."""
    products = torch.mm(wide, pair, out_dtype=torch.float32)
    R = pair.shape[1] // 2
    return products[:, :R] + products[:, R:]


def _left(matrix_NR: Tensor) -> Tensor:
    """A float32 matrix as the left factor of a product in parts: high, low and high, (N, 3R)."""
    high, low = _split(matrix_NR, torch.bfloat16)
    return torch.cat([high, low, high], 1)


def _right(matrix_RK: Tensor, dtype: torch.dtype) -> Tensor:
    """A float32 matrix as the right factor: high, high and low, (3R, K)."""
    high, low = _split(matrix_RK, dtype)
    return torch.cat([high, high, low])


def _pair(right_3RK: Tensor) -> Tensor:
    """The high and the low part of a right factor, (2R, K)."""
    return right_3RK[right_3RK.shape[0] // 3 :]


def _split(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A float32 matrix as the sum of two of 16 bits."""
    high = matrix.to(dtype)
    # in float32
    return high, (matrix - high).to(dtype)
