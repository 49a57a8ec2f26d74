"""The arithmetic of an adapted linear layer, y = x Wᵀ + b + s (x Aᵀ) Bᵀ (arXiv:2106.09685).

peft casts a layer's whole input to the adapter's float32 and saves it so for the backward: 4 bytes
per element where the model has 2, once for each of the layers that read the same input, in several
passes over it. Here the input is saved as it is, shared by these layers; products are added to the
layer's output in place; and both matrices still count with their float32 precision: on a GPU a
float32 number is the sum of two bfloat16 numbers up to a relative 2^-17, so three tensor-core
products, computed as one of three times the rank, are off by no more than that. The matrices are
split once per optimizer step.

Shapes: N inputs, I and O the layer's input and output width, R the rank.
"""

from collections.abc import Iterator
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

Parts = tuple[Tensor, Tensor]
"""A and Bᵀ split into 16-bit parts, (3R, I) and (3R, O), see `_right`."""


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
        parts: Of the current A and B, see `take_apart`; None: computed here.

    Returns:
        (..., O), in the layer's dtype: its own output and then the sum are rounded, as in peft.
    """
    if not has_units(input):
        return _InFloat32.apply(input, weight, bias, A, B, scaling)
    if parts is None:
        parts = take_apart(A, B)
    return _InParts.apply(input, weight, bias, A, B, scaling, *parts)


def take_apart(A: Tensor, B: Tensor) -> Parts:
    """Split both matrices of an adapter, (R, I) and (O, R) float32, into bfloat16 parts."""
    return _right(A.detach()), _right(B.detach().T)


def has_units(tensor: Tensor) -> bool:
    """Whether products with this input are made in 16-bit parts: bfloat16 on a GPU, whose tensor
    cores accumulate in float32."""
    # the meta device stands for a GPU, to estimate its memory
    return tensor.device.type in ("cuda", "meta") and tensor.dtype == torch.bfloat16


class PartsOf:
    """Cache of the parts of a layer's adapters, by adapter name.

    It has to be invalidated explicitly: fused optimizers do not change a tensor's version.
    """

    def __init__(self) -> None:
        self._found: dict[str, Parts] = {}

    def forget(self) -> None:
        """Clear the cache, because the adapters have changed."""
        self._found.clear()

    def get(self, name: str, A: Tensor, B: Tensor) -> Parts:
        """The parts of an adapter."""
        if name not in self._found:
            self._found[name] = take_apart(A, B)
        return self._found[name]


def share_input(layer: Any) -> PartsOf | None:
    """Make one of peft's layers compute by `adapted_linear`, if it is a plain linear layer.

    Args:
        layer: Of `peft.tuners.lora`; changed in place.

    Returns:
        The cache to clear when an adapter changes; None if the layer was not changed.
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
    # a variant may compute with modules of its own
    if drops or name in layer.lora_variant or B.bias is not None:
        return type(layer).forward(layer, input)
    parts = None
    if has_units(input) and not torch.compiler.is_compiling():
        parts = parts_of.get(name, A.weight, B.weight)
    return adapted_linear(
        input, base.weight, base.bias, A.weight, B.weight, layer.scaling[name], parts=parts
    )


class _InFloat32(torch.autograd.Function):
    """Adapted linear layer whose products with the adapter are in float32."""

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
        # not a view: a model may change it in place
        output = F.linear(input, weight, bias)
        _add_product(output.view(-1, output.shape[-1]), h_NR, B.T, scaling)
        # saving the input takes no memory: the operation that made it, or other layers, save it too
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
    return torch.cat([rows.float() @ matrix_KR for (rows,) in _row_blocks(wide_NK)])


def _summed_products(narrow_NR: Tensor, wide_NK: Tensor) -> Tensor:
    """narrowᵀ · wide of a float32 matrix and one of any dtype, (R, K) float32."""
    sum_RK = narrow_NR.new_zeros(narrow_NR.shape[1], wide_NK.shape[1])
    for rows, narrow in _row_blocks(wide_NK, narrow_NR):
        sum_RK.addmm_(narrow.T, rows.float())
    return sum_RK


def _add_product(sum_NK: Tensor, narrow_NR: Tensor, other_RK: Tensor, factor: float) -> None:
    """Add factor · narrow · other, computed in float32, to a tensor of any dtype, in place."""
    for rows, narrow in _row_blocks(sum_NK, narrow_NR):
        if rows.dtype == torch.float32:
            rows.addmm_(narrow, other_RK, alpha=factor)
        else:
            rows.copy_(torch.addmm(rows.float(), narrow, other_RK, alpha=factor))


def _row_blocks(wide_NK: Tensor, *others: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The same rows of all matrices, block by block.

    A float32 copy of all rows of a 16-bit matrix would take twice its memory. float32 needs no
    copy and is one block.
    """
    size = max(1, len(wide_NK)) if wide_NK.dtype == torch.float32 else 256
    return zip(*(matrix.split(size) for matrix in (wide_NK, *others)), strict=True)


class _InParts(torch.autograd.Function):
    """Adapted linear layer whose products with the adapter are in 16-bit parts."""

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
        # gradients in the layouts of A and B
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
    """Product with a float32 matrix given as two 16-bit parts side by side, (M, K) (K, 2R) ->
    (M, R) float32."""
    products = torch.mm(wide, pair, out_dtype=torch.float32)
    R = pair.shape[1] // 2
    return products[:, :R] + products[:, R:]


def _left(matrix_NR: Tensor) -> Tensor:
    """Split a float32 matrix as the left factor of a product: parts high, low and high, (N, 3R)."""
    high, low = split(matrix_NR, torch.bfloat16)
    return torch.cat([high, low, high], 1)


def _right(matrix_RK: Tensor) -> Tensor:
    """Split a float32 matrix as the right factor: parts high, high and low, (3R, K)."""
    high, low = split(matrix_RK, torch.bfloat16)
    return torch.cat([high, high, low])


def _pair(right_3RK: Tensor) -> Tensor:
    """The high and the low part of a right factor, (2R, K)."""
    return right_3RK[right_3RK.shape[0] // 3 :]


def split(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """Split a float32 matrix into a sum of two 16-bit matrices; a gradient flows through the first
    one, which is multiplied by both parts of the other factor."""
    high = matrix.to(dtype)
    # subtracted in float32
    return high, (matrix.detach() - high.detach()).to(dtype)
