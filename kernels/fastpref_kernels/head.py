"""The LM head and its targets; tiles of logits and their gradients in plain torch.

Every matrix product accumulates in float32, whatever the dtype of the inputs.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpref_kernels.gemm import (
    add_matmul,
    cpu_multiplies_bfloat16,
    gpu_multiplies_bfloat16,
    matmul,
    matrix_units,
)
from fastpref_kernels.row_sums import JointStats
from fastpref_kernels.workspace import LEAST_COLUMNS, ROW_MULTIPLE, slices

NeedsGrad = tuple[bool, bool, bool]
"""Which of input, weight and bias require a gradient."""

Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]
"""Gradients of input, weight and bias; None where not required."""


class Head(NamedTuple):
    """Hidden states and LM head of one model: z = cap · tanh(scale · (h·Wᵀ + b) / cap)."""

    input: Tensor
    """(N, D) bfloat16, float16 or float32."""
    weight: Tensor
    """(V, D)."""
    bias: Tensor | None
    """(V,)."""
    scale: float
    softcap: float | None

    @property
    def gemm_dtype(self) -> torch.dtype:
        """Dtype that both GEMM operands are converted to.

        Only GPUs multiply 16-bit operands into float32 results. There a float32 operand beside a
        16-bit one becomes 16-bit too, as float32 master weights do in `F.linear` under autocast.
        """
        halves = {self.input.dtype, self.weight.dtype} - {torch.float32}
        if not self.input.is_cuda or len(halves) != 1:
            return torch.float32
        (half,) = halves
        native = half == torch.float16 or gpu_multiplies_bfloat16(self.input.device)
        return half if native else torch.float32

    @property
    def exp_dtype(self) -> torch.dtype:
        """Dtype in which exponentials of logits are kept for the backward's GEMMs.

        Bfloat16 has the range of float32. Float16 overflows at e^11 and is never used.
        """
        if self.gemm_dtype == torch.bfloat16:
            return torch.bfloat16
        return torch.bfloat16 if self._is_bfloat16 else torch.float32

    @property
    def on_matrix_units(self) -> bool:
        """Whether float32 GEMM operands may be rounded to bfloat16 on this CPU, as on a GPU.

        True for bfloat16 models on a CPU with bfloat16 units: two to three times faster with AMX.
        Operands upcast from bfloat16 are not changed, so logits stay exact; sums are float32.
        """
        on_cpu = self.input.device.type == "cpu"
        return on_cpu and self._is_bfloat16 and cpu_multiplies_bfloat16()

    @property
    def _is_bfloat16(self) -> bool:
        return self.input.dtype == self.weight.dtype == torch.bfloat16

    def input_tile(self, rows: slice, ignored_N: Tensor) -> Tensor:
        """Hidden states of `rows` for a GEMM, (R, D) padded to a multiple of 32 rows.

        Ignored rows are zeroed: they may hold NaN, and 0 · NaN would reach the gradients.
        """
        input_RD = self.input[rows]
        R, D = input_RD.shape
        padded = -(-R // ROW_MULTIPLE) * ROW_MULTIPLE
        tile_RD = torch.zeros(padded, D, dtype=self.gemm_dtype, device=input_RD.device)
        tile_RD[:R].copy_(input_RD).masked_fill_(ignored_N[rows, None], 0)
        return tile_RD

    def weight_tile(self, cols: slice) -> Tensor:
        """Head weights of `cols` for a GEMM, (C, D)."""
        return self.weight[cols].to(self.gemm_dtype)

    def logits(self, input_RD: Tensor, weight_CD: Tensor, cols: slice) -> Tensor:
        """Logits of a tile, (R, C) float32, in memory that the caller may overwrite."""
        C = len(weight_CD)
        if C < LEAST_COLUMNS and weight_CD.device.type == "cpu":
            weight_CD = F.pad(weight_CD, (0, 0, 0, LEAST_COLUMNS - C))
        with matrix_units(self.on_matrix_units):
            logits_RC = matmul(input_RD, weight_CD.t())[:, :C]
        if self.bias is not None:
            logits_RC += self.bias[cols]
        return self._capped(logits_RC)

    def target_logits(self, input_RD: Tensor, target_R: Tensor) -> Tensor:
        """Logits of the targets, (R,) float32: offsets for the sums of KL and TDPO1 values."""
        # target ranges are not checked on a GPU
        ids_R = target_R.clamp(0, len(self.weight) - 1)
        weight_RD = self.weight[ids_R].to(input_RD.dtype).float()
        logits_R = (input_RD.float() * weight_RD).sum(1)
        if self.bias is not None:
            logits_R += self.bias[ids_R]
        return self._capped(logits_R)

    def _capped(self, logits: Tensor) -> Tensor:
        """Apply scale and softcap to h·Wᵀ + b, in place."""
        if self.softcap is not None:
            return logits.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        return logits if self.scale == 1 else logits.mul_(self.scale)

    def softcap_slope(self, logits_RC: Tensor) -> Tensor | None:
        """Derivative of the softcap, 1 - (z / cap)², (R, C); None without a softcap."""
        if self.softcap is None:
            return None
        return (logits_RC / self.softcap).square_().neg_().add_(1)


Heads = tuple[Head, Head]
"""Policy and reference."""


def joint_exp_dtype(heads: Heads) -> torch.dtype:
    """Dtype of stored exponentials of two models: bfloat16 only if both use it, else float32."""
    both = {head.exp_dtype for head in heads}
    return torch.bfloat16 if both == {torch.bfloat16} else torch.float32


class Targets(NamedTuple):
    """Target column of each row, and which rows are ignored."""

    ids: Tensor
    """(N,) int64, 0 for ignored rows."""
    ignored: Tensor
    """(N,) bool."""

    @classmethod
    def of(cls, target: Tensor, ignore_index: int) -> "Targets":
        # before comparing: against an int32 tensor ignore_index is truncated to 32 bits
        ids_N = target.long()
        ignored_N = ids_N == ignore_index
        return cls(ids_N.masked_fill(ignored_N, 0), ignored_N)


def take_target(logits_RC: Tensor, target_R: Tensor, cols: slice) -> Tensor:
    """Extract target logits, (R,), -inf for targets outside `cols`; sets them to -inf in place."""
    index_R1, inside_R1 = _locate(target_R, cols)
    logit_R1 = logits_RC.gather(1, index_R1)
    logits_RC.scatter_(1, index_R1, logit_R1.masked_fill(inside_R1, float("-inf")))
    return logit_R1.masked_fill(~inside_R1, float("-inf")).squeeze(1)


def put_target(values_RC: Tensor, target_R: Tensor, cols: slice, value_R: Tensor) -> None:
    """Write `value_R` into each row's target column, if it lies inside `cols`."""
    index_R1, inside_R1 = _locate(target_R, cols)
    kept_R1 = values_RC.gather(1, index_R1)
    values_RC.scatter_(1, index_R1, torch.where(inside_R1, value_R[:, None], kept_R1))


class Begun(NamedTuple):
    """Initial values of a head's gradients, from other rows; `head_gradients` adds to them."""

    weight: Callable[[slice], Tensor] | None
    """cols -> (C, D) float32, overwritten; None if the weight requires no gradient."""
    bias: Tensor | None
    """(V,) float32, overwritten; None if the bias requires no gradient."""


class _Totals(NamedTuple):
    """Accumulators of a head's gradients; None where no gradient is required."""

    input: Tensor | None
    """(N, D) float32, summed over slices of the vocabulary."""
    weight: Tensor | None
    """(V, D) in the weight's dtype, written one vocabulary slice at a time."""
    bias: Tensor | None
    """(V,) float32."""
    unit: Tensor | None
    """Scale of everything added, divided out at the end, (1,); None for 1."""

    @classmethod
    def empty(
        cls, head: Head, needs_grad: NeedsGrad, unit: Tensor | None, begun: Begun | None
    ) -> "_Totals":
        """Input and bias start from zeros or from `begun`; the weight's is uninitialised."""
        needs_input, needs_weight, needs_bias = needs_grad
        bias_V = None if begun is None else begun.bias
        (N, D), V = head.input.shape, head.weight.shape[0]
        zeros = partial(head.input.new_zeros, dtype=torch.float32)
        return cls(
            zeros(N, D) if needs_input else None,
            head.weight.new_empty(V, D) if needs_weight else None,
            zeros(V) if needs_bias and bias_V is None else bias_V,
            unit,
        )

    def in_units(self, total: Tensor) -> Tensor:
        """Divide a total by `unit`, in place."""
        return total if self.unit is None else total.div_(self.unit)

    def finish(self, head: Head) -> Gradients:
        """The gradients, each in the dtype of its tensor."""
        return (
            None if self.input is None else self.in_units(self.input).to(head.input.dtype),
            self.weight,
            None
            if self.bias is None or head.bias is None
            else self.in_units(self.bias).to(head.bias.dtype),
        )


def head_gradients(
    head: Head,
    needs_grad: NeedsGrad,
    tile: tuple[int, int],
    hidden_tile: Callable[[slice], Tensor],
    dlogits: Callable[[slice, slice, Tensor, Tensor], Tensor],
    *,
    unit: Tensor | None = None,
    begun: Begun | None = None,
) -> Gradients:
    """Gradients of the hidden states, head weight and bias, from tiles of logit gradients.

    The outer loop runs over vocabulary slices: each slice of the weight's gradient is accumulated
    in float32 and written once in the weight's dtype; the input's is accumulated over all slices.

    Args:
        head: Hidden states and head of the model.
        needs_grad: Which of input, weight and bias require a gradient; the others get None.
        tile: Rows and columns of a tile.
        hidden_tile: rows -> their hidden states, (R or more, D) in the GEMMs' dtype, zero for
            ignored rows.
        dlogits: (rows, cols, input tile, weight tile) -> gradient of h·Wᵀ + b, (R, C), float32 or
            the GEMMs' dtype.
        unit: Scale of `dlogits`, divided out of the gradients, (1,); None for 1.
        begun: Initial values of the head's gradients, only with `unit` None; None for zeros.
    """
    N, (tile_rows, tile_cols) = len(head.input), tile
    totals = _Totals.empty(head, needs_grad, unit, begun)
    # with all rows in one tile a slice is a single GEMM that writes the weight's dtype directly
    plain = unit is None and begun is None and head.weight.dtype == head.gemm_dtype
    sums_slices = totals.weight is not None and not (plain and 0 < N <= tile_rows)

    # functions: their locals free a tile before the next one is allocated
    def add_slice(cols: slice) -> None:
        head_CD = head.weight_tile(cols)
        total_CD = _first_sums(head_CD, cols, begun) if sums_slices else None
        for rows in slices(N, tile_rows):
            add_tile(rows, cols, head_CD, total_CD)
        if totals.weight is not None and total_CD is not None:
            totals.weight[cols] = totals.in_units(total_CD)

    def add_tile(rows: slice, cols: slice, head_CD: Tensor, total_CD: Tensor | None) -> None:
        hidden_RD = hidden_tile(rows)
        dlogits_RC = dlogits(rows, cols, hidden_RD, head_CD)
        if totals.bias is not None:
            totals.bias[cols] += dlogits_RC.sum(0, dtype=torch.float32)
        dlogits_RC = dlogits_RC.to(head.gemm_dtype)
        hidden_RD = hidden_RD[: len(dlogits_RC)]
        if total_CD is not None:
            add_matmul(total_CD, dlogits_RC.t(), hidden_RD)
        elif totals.weight is not None:
            torch.mm(dlogits_RC.t(), hidden_RD, out=totals.weight[cols])
        if totals.input is not None:
            add_matmul(totals.input[rows], dlogits_RC, head_CD)

    for cols in slices(len(head.weight), tile_cols):
        with matrix_units(head.on_matrix_units):
            add_slice(cols)
    return totals.finish(head)


def _first_sums(head_CD: Tensor, cols: slice, begun: Begun | None) -> Tensor:
    """Initial value of a slice of the weight's gradient, (C, D) float32."""
    if begun is not None and begun.weight is not None:
        return begun.weight(cols)
    return head_CD.new_zeros(head_CD.shape, dtype=torch.float32)


def logit_gradients(
    head: Head, targets: Targets, *grads: Tensor
) -> tuple[list[Tensor], Tensor | None]:
    """Upstream gradients times the logit scale, (N,) float32, 0 for ignored rows; and their unit.

    For float16 operands the gradients are multiplied by `unit`, a power of two that brings the
    largest to [1, 2): divided by a token count they would underflow float16 (6e-8). Otherwise the
    unit is None.
    """
    scaled = [grad.float().masked_fill(targets.ignored, 0) * head.scale for grad in grads]
    if head.gemm_dtype != torch.float16 or not len(targets.ids):
        return scaled, None
    largest = torch.stack(scaled).abs().amax().clamp_min(torch.finfo(torch.float32).tiny)
    unit = torch.ldexp(largest.new_ones(1), 1 - torch.frexp(largest).exponent)
    return [grad_N * unit for grad_N in scaled], unit


def kl_target_gradients(
    stats: JointStats, grad_logps_N: Tensor, grad_kl_N: Tensor, direction: str
) -> Tensor:
    """dz of the target's column before the softcap's slope, (N,), accurate also as p_y -> 1."""
    if direction == "reference_policy":
        of_kl_N = _probability_gap(stats.logps, stats.reference_logps)
    else:
        p_N = stats.logps.exp()
        # where p is 0, log p - log q may be infinite or NaN
        over_kl_N = (stats.logps - stats.reference_logps - stats.kl).masked_fill_(p_N == 0, 0)
        of_kl_N = p_N * over_kl_N
    return grad_kl_N * of_kl_N - grad_logps_N * stats.logps.expm1()


def _probability_gap(logps: Tensor, other_logps: Tensor) -> Tensor:
    """exp(logps) - exp(other_logps), accurate where the two are close to each other or to 1."""
    # -inf - (-inf) is NaN; equal values differ by 0
    difference = (logps - other_logps).nan_to_num_(nan=0)
    larger = torch.maximum(logps, other_logps)
    return larger.exp() * difference.abs().neg_().expm1_().copysign_(difference)


def _locate(target_R: Tensor, cols: slice) -> tuple[Tensor, Tensor]:
    """Index of the target relative to `cols`, clamped, and whether it lies inside; (R, 1) each."""
    index_R1 = target_R[:, None] - cols.start
    last = cols.stop - cols.start - 1
    return index_R1.clamp(0, last), (index_R1 >= 0) & (index_R1 <= last)
