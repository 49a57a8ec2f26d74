"""Backward passes of `token_logps` on a GPU, for each mode.

With E = exp(z - z_y) and v = -g · (1 - p_y) / Σ_{j≠y} E_j, dz = v · E at the other columns and
g · (1 - p_y) at the target. Both gradients are GEMMs with E, with v applied to the rows of the
result or of the other operand. Rows without stored E recompute their logits slice by slice.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from fastpref_kernels import token_logps_gradient_kernels as kernels
from fastpref_kernels.gemm import matmul, matmul_into
from fastpref_kernels.gemm_tiles import GemmTile
from fastpref_kernels.head import (
    Begun,
    Gradients,
    Head,
    NeedsGrad,
    Targets,
    head_gradients,
    logit_gradients,
)
from fastpref_kernels.launch import (
    TRITON_DTYPES,
    Operands,
    aligned_columns,
    descriptors,
    fused_grid,
    gradient_tile,
    looping_blocks,
    product_tiles,
    result_descriptor,
    row_blocks,
    row_grid,
)
from fastpref_kernels.row_sums import TokenStats
from fastpref_kernels.token_logps_sweep import shared
from fastpref_kernels.workspace import slices

_PRODUCT_ROWS = 4096
"""Rows per GEMM of exponentials and head: bounds its float32 result."""


class Call(NamedTuple):
    """Inputs of a backward pass, for all rows of a call or for some."""

    grad: Tensor
    """(N,) upstream gradient of the log-probabilities."""
    head: Head
    operands: Operands
    targets: Targets
    stats: TokenStats
    """Of the forward; kept exponentials belong to the first `len(kept)` rows."""

    def of_rows(self, rows: slice) -> "Call":
        """The inputs of a slice of rows; the kept tensors are not sliced."""
        stats = self.stats
        return Call(
            self.grad[rows],
            self.head._replace(input=self.head.input[rows]),
            self.operands.of_rows(rows),
            Targets(self.targets.ids[rows], self.targets.ignored[rows]),
            stats._replace(logps=stats.logps[rows], lse=stats.lse[rows]),
        )


class _Shares(NamedTuple):
    """Logit gradients of rows whose exponentials were kept: dz = v · E."""

    others: Tensor
    """(N,) g · (1 - p_y): dz of the target, and minus the sum of dz over the other columns."""
    share: Tensor
    """(N,) v."""
    exp: Tensor
    """(N, V) E."""

    @classmethod
    def of(cls, call: Call) -> "_Shares":
        stats = call.stats
        (scaled_N,), _ = logit_gradients(call.head, call.targets, call.grad)
        others_N = -stats.logps.expm1() * scaled_N
        v_N = -shared(others_N, stats.kept_sums)
        return cls(others_N, v_N, stats.kept[:, : call.head.weight.shape[0]])

    def input_gradient(self, call: Call) -> Tensor:
        """(N, D) in the hidden states' dtype."""
        others_N, v_N, exp_NV = self
        ids_N, head, weight_VD = call.targets.ids, call.head, call.operands.head.weight
        # rest_N: rounding error of the target's column, which is stored in 16 bits
        target_N = others_N
        if head.softcap is not None:
            # recomputed rather than lse + log p: near the cap the slope depends on the last digits
            logits_N = call.operands.target_logits(slice(0, len(ids_N)))
            target_N = times_slope(others_N, head, logits_N)
        rest_N = target_N - v_N * exp_NV.gather(1, ids_N[:, None])[:, 0]
        input_ND = torch.empty_like(head.input, memory_format=torch.contiguous_format)
        for rows in slices(len(ids_N), _PRODUCT_ROWS):
            product_RD = matmul(exp_NV[rows], weight_VD).mul_(v_N[rows, None])
            product_RD += rest_N[rows, None] * weight_VD[ids_N[rows]]
            input_ND[rows] = product_RD
        return input_ND

    def scaled_input(self, call: Call) -> Tensor:
        """v · h, (N, D) in the exponentials' dtype, for the GEMM of the head's gradient."""
        input_ND = call.operands.head.input
        scaled_ND = torch.empty_like(input_ND, dtype=self.exp.dtype)
        torch.mul(input_ND, self.share[:, None], out=scaled_ND)
        # ignored rows may hold NaN, and 0 · NaN would reach the head's gradient
        return scaled_ND.masked_fill_(call.targets.ignored[:, None], 0)

    def bias_gradient(self) -> Tensor:
        """(V,) float32."""
        high_N = self.share.to(self.exp.dtype)
        low_N = (self.share - high_N).to(self.exp.dtype)
        return matmul(torch.stack([high_N, low_N]), self.exp).sum(0)


def store_bwd(call: Call, needs_grad: NeedsGrad) -> Gradients:
    """Gradients from the kept exponentials of all rows."""
    head, shares = call.head, _Shares.of(call)
    needs_input, needs_weight, needs_bias = needs_grad
    weight_VD = bias_V = None
    input_ND = shares.input_gradient(call) if needs_input else None
    if needs_weight:
        weight_VD = head.weight.new_empty(head.weight.shape)
        matmul_into(weight_VD, shares.exp.t(), shares.scaled_input(call))
    if needs_bias and head.bias is not None:
        bias_V = shares.bias_gradient().to(head.bias.dtype)
    return input_ND, weight_VD, bias_V


def partial_bwd(call: Call, needs_grad: NeedsGrad, *, scored: Operands | None = None) -> Gradients:
    """Gradients from the kept exponentials of the first rows and recomputed logits of the others.

    The head's gradients are accumulated in float32 over both and rounded once.
    """
    K, N = len(call.stats.kept), len(call.grad)
    kept, others = call.of_rows(slice(0, K)), call.of_rows(slice(K, N))
    shares = _Shares.of(kept)
    needs_input, needs_weight, needs_bias = needs_grad
    scaled_KD = shares.scaled_input(kept) if needs_weight else None
    begun = Begun(
        None if scaled_KD is None else lambda cols: matmul(shares.exp[:, cols].t(), scaled_KD),
        shares.bias_gradient() if needs_bias else None,
    )
    scored = None if scored is None else scored.of_rows(slice(K, N))
    input_RD, weight_VD, bias_V = lean_bwd(others, needs_grad, scored=scored, begun=begun)
    input_ND = None
    if needs_input and input_RD is not None:
        input_ND = torch.cat([shares.input_gradient(kept), input_RD])
    return input_ND, weight_VD, bias_V


def lean_bwd(
    call: Call,
    needs_grad: NeedsGrad,
    *,
    scored: Operands | None = None,
    begun: Begun | None = None,
) -> Gradients:
    """Gradients from recomputed logits, one slice of the vocabulary at a time.

    Args:
        scored: Operands whose logits are recomputed; None for the call's own.
        begun: Initial values of the head's gradients; None for zeros.
    """
    _, head, operands, targets, stats = call
    scored = scored or operands
    (scaled_N,), unit = logit_gradients(head, targets, call.grad)
    row_arguments = {
        "lse_ptr": stats.lse,
        "grad_ptr": scaled_N,
        # 1 - p_y as -expm1(log p_y): accurate for a confident token
        "target_grad_ptr": -scaled_N * stats.logps.expm1(),
    }
    # ignored rows may hold NaN, and 0 · NaN would reach the head's gradient
    clean_ND = operands.head.input
    if needs_grad[1]:
        clean_ND = clean_ND.masked_fill(targets.ignored[:, None], 0)

    def dlogits(rows: slice, cols: slice, hidden_RD: Tensor, weight_CD: Tensor) -> Tensor:
        R, C = len(hidden_RD), len(weight_CD)
        dlogits_RC = hidden_RD.new_empty(R, aligned_columns(C))[:, :C]
        arguments = {name: vector[rows] for name, vector in row_arguments.items()}
        arguments["target_ptr"] = scored.ids[rows]
        if scored.tile is None:
            _dlogits_of_products(scored, rows, cols, dlogits_RC, arguments)
        else:
            _dlogits_fused(scored, scored.tile, rows, cols, dlogits_RC, arguments)
        return dlogits_RC

    return head_gradients(
        head,
        needs_grad,
        gradient_tile(scored, clean_ND.dtype),
        lambda rows: clean_ND[rows],
        dlogits,
        unit=unit,
        begun=begun,
    )


def _dlogits_fused(
    operands: Operands,
    tile: GemmTile,
    rows: slice,
    cols: slice,
    dlogits_RC: Tensor,
    arguments: dict[str, Tensor],
) -> None:
    head = operands.head
    R, C = dlogits_RC.shape
    kernels._dlogits_kernel[fused_grid(tile, R, C, dlogits_RC.device)](
        *descriptors(tile, head.input[rows], head.weight),
        result_descriptor(tile, dlogits_RC),
        N=len(dlogits_RC),
        start_v=cols.start,
        stop_v=cols.stop,
        D=head.input.shape[1],
        OUT=TRITON_DTYPES[dlogits_RC.dtype],
        **arguments,
        **operands.transform,
        **looping_blocks(tile, dlogits_RC.device),
    )


def _dlogits_of_products(
    operands: Operands,
    rows: slice,
    cols: slice,
    dlogits_RC: Tensor,
    arguments: dict[str, Tensor],
) -> None:
    hidden_RD, weight_CD = operands.head.input[rows], operands.head.weight[cols]
    for part_rows, part_cols in product_tiles(*dlogits_RC.shape):
        products_RC = matmul(hidden_RD[part_rows], weight_CD[part_cols].t())
        part_RC = dlogits_RC[part_rows, part_cols]
        kernels._dlogits_tile_kernel[row_grid(*products_RC.shape)](
            products_RC,
            part_RC,
            stride_logits=products_RC.stride(0),
            stride_dlogits=part_RC.stride(0),
            first_n=part_rows.start,
            R=len(products_RC),
            start_v=cols.start + part_cols.start,
            stop_v=cols.start + part_cols.stop,
            **arguments,
            **operands.transform,
            **row_blocks(),
        )


BACKWARD = {"store": store_bwd, "partial": partial_bwd, "lean": lean_bwd}


def times_slope(values: Tensor, head: Head, logits: Tensor) -> Tensor:
    """`values` times the softcap's derivative at `logits`, (N,)."""
    slope = head.softcap_slope(logits)
    return values if slope is None else values * slope
