"""Tiles of logits in plain torch: what both ops' portable paths are made of.

Every product sums in float32 whatever the inputs' dtype, and a tile of logits is the only thing
of vocabulary width that ever exists.
"""

from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpref_kernels.workspace import ROW_MULTIPLE, slices


class Head(NamedTuple):
    """Hidden states and the head on them: z = cap · tanh(scale · (h·Wᵀ + b) / cap)."""

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
        """What GEMM operands are brought to.

        Only CUDA multiplies bfloat16 into float32 results. Float16 is left out: gradients of
        logits, divided by the batch's token count, fall below its smallest number.
        """
        both_bfloat16 = self.input.dtype == self.weight.dtype == torch.bfloat16
        return torch.bfloat16 if both_bfloat16 and self.input.is_cuda else torch.float32

    def input_tile(self, rows: slice, ignored_N: Tensor) -> Tensor:
        """Hidden states of `rows` for a GEMM, (R, D) padded to a multiple of 32 rows.

        Ignored rows are zeros: padding may hold anything, and 0 · NaN would reach the gradients.
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
        """Logits of a tile, (R, C) float32; the caller may overwrite them."""
        logits_RC = _matmul(input_RD, weight_CD.t())
        if self.bias is not None:
            logits_RC += self.bias[cols]
        if self.softcap is not None:
            return logits_RC.mul_(self.scale / self.softcap).tanh_().mul_(self.softcap)
        return logits_RC if self.scale == 1 else logits_RC.mul_(self.scale)

    def softcap_slope(self, logits_RC: Tensor) -> Tensor | None:
        """Derivative of the softcap, 1 - (z / cap)², (R, C); None without one."""
        if self.softcap is None:
            return None
        return (logits_RC / self.softcap).square_().neg_().add_(1)


class Targets(NamedTuple):
    """Which column of each row is scored, and which rows are not."""

    ids: Tensor
    """(N,) int64, 0 where ignored."""
    ignored: Tensor
    """(N,) bool."""

    @classmethod
    def of(cls, target: Tensor, ignore_index: int) -> "Targets":
        ignored_N = target == ignore_index
        return cls(target.masked_fill(ignored_N, 0).long(), ignored_N)


class RowSums(NamedTuple):
    """Online log-sum-exp of R rows over the columns seen so far, the target's column left out."""

    max: Tensor
    """(R,) largest logit, the lowest float32 before the first."""
    sum_exp: Tensor
    """(R,) Σ exp(z - max)."""
    target_logit: Tensor
    """(R,) the target's own logit, -inf until its column was seen."""

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> "RowSums":
        zeros_R = torch.zeros(rows, dtype=torch.float32, device=device)
        # finite, so that a row of nothing but -inf adds exp(-inf) and never exp(-inf + inf)
        lowest_R = torch.full_like(zeros_R, torch.finfo(torch.float32).min)
        return cls(lowest_R, zeros_R, torch.full_like(zeros_R, float("-inf")))

    def add(self, logits_RC: Tensor, target_logit_R: Tensor) -> "RowSums":
        """Add columns whose target was taken out; `logits_RC` becomes exp(z - max)."""
        max_R = torch.maximum(self.max, logits_RC.amax(1))
        logits_RC.sub_(max_R[:, None]).exp_()
        sum_exp_R = self.sum_exp * (self.max - max_R).exp() + logits_RC.sum(1)
        return RowSums(max_R, sum_exp_R, torch.maximum(self.target_logit, target_logit_R))

    @property
    def logps(self) -> Tensor:
        """(R,) log p(target) = -softplus(lse_others - z_y).

        Exact for a confident token too: lse - z_y in float32 is 0 from a margin of 16 nats on.
        """
        return -F.softplus(self._lse_others - self.target_logit)

    @property
    def lse(self) -> Tensor:
        """(R,) log Σ exp(z) over the whole row."""
        return torch.logaddexp(self._lse_others, self.target_logit)

    @property
    def lse_over_max(self) -> Tensor:
        """(R,) lse - max, with the digits that lse loses when max is large."""
        return torch.logaddexp(self.sum_exp.log(), self.target_logit - self.max)

    @property
    def _lse_others(self) -> Tensor:
        return self.max + self.sum_exp.log()


def take_target(logits_RC: Tensor, target_R: Tensor, cols: slice) -> Tensor:
    """Target logits, (R,), -inf where `cols` has no target; -inf takes their place in the tile."""
    index_R1, inside_R1 = _locate(target_R, cols)
    logit_R1 = logits_RC.gather(1, index_R1)
    logits_RC.scatter_(1, index_R1, logit_R1.masked_fill(inside_R1, float("-inf")))
    return logit_R1.masked_fill(~inside_R1, float("-inf")).squeeze(1)


def put_target(values_RC: Tensor, target_R: Tensor, cols: slice, value_R: Tensor) -> None:
    """Overwrite each row's target column, where it lies inside `cols`."""
    index_R1, inside_R1 = _locate(target_R, cols)
    kept_R1 = values_RC.gather(1, index_R1)
    values_RC.scatter_(1, index_R1, torch.where(inside_R1, value_R[:, None], kept_R1))


def head_gradients(
    head: Head,
    ignored_N: Tensor,
    needs_grad: tuple[bool, bool, bool],
    tile: tuple[int, int],
    dlogits: Callable[[slice, slice, Tensor, Tensor], Tensor],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of the hidden states, head weight and bias, from gradients of logits tiles.

    Vocabulary slices are the outer loop: each slice of the weight's gradient is summed in float32
    and written once in the weight's dtype; the hidden states' is summed in float32 over slices.

    Args:
        head: Where the logits come from.
        ignored_N: (N,) bool, rows without gradient.
        needs_grad: Which of input, weight and bias want a gradient; the others get None.
        tile: Rows and columns of a tile.
        dlogits: (rows, cols, input tile, weight tile) -> gradient of h·Wᵀ + b, (R, C) float32.
    """
    needs_input, needs_weight, needs_bias = needs_grad
    (N, D), V = head.input.shape, head.weight.shape[0]
    tile_rows, tile_cols = tile
    zeros = partial(head.input.new_zeros, dtype=torch.float32)
    input_ND = zeros(N, D) if needs_input else None
    weight_VD = head.weight.new_empty(V, D) if needs_weight else None
    bias_V = zeros(V) if needs_bias else None

    # functions, so that a tile is gone before the next one is made
    def add_slice(cols: slice) -> None:
        head_CD = head.weight_tile(cols)
        weight_CD = zeros(head_CD.shape) if needs_weight else None
        for rows in slices(N, tile_rows):
            add_tile(rows, cols, head_CD, weight_CD)
        if weight_VD is not None and weight_CD is not None:
            weight_VD[cols] = weight_CD

    def add_tile(rows: slice, cols: slice, head_CD: Tensor, weight_CD: Tensor | None) -> None:
        hidden_RD = head.input_tile(rows, ignored_N)
        dlogits_RC = dlogits(rows, cols, hidden_RD, head_CD)
        if bias_V is not None:
            bias_V[cols] += dlogits_RC.sum(0)
        dlogits_RC = dlogits_RC.to(head.gemm_dtype)
        if weight_CD is not None:
            _add_matmul(weight_CD, dlogits_RC.t(), hidden_RD[: len(dlogits_RC)])
        if input_ND is not None:
            _add_matmul(input_ND[rows], dlogits_RC, head_CD)

    for cols in slices(V, tile_cols):
        add_slice(cols)
    return (
        None if input_ND is None else input_ND.to(head.input.dtype),
        weight_VD,
        None if bias_V is None or head.bias is None else bias_V.to(head.bias.dtype),
    )


def _locate(target_R: Tensor, cols: slice) -> tuple[Tensor, Tensor]:
    """Column of the target within `cols`, clamped into it, and whether it lies inside; (R, 1)."""
    index_R1 = target_R[:, None] - cols.start
    last = cols.stop - cols.start - 1
    return index_R1.clamp(0, last), (index_R1 >= 0) & (index_R1 <= last)


def _matmul(a: Tensor, b: Tensor) -> Tensor:
    """a @ b, float32, for operands of one dtype."""
    return a @ b if a.dtype == torch.float32 else torch.mm(a, b, out_dtype=torch.float32)


def _add_matmul(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a @ b in float32, for operands of one dtype."""
    if a.dtype == torch.float32:
        total.addmm_(a, b)
    else:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
