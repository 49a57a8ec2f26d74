"""Backward passes of `token_logps` on a GPU, from what its modes keep.

With E = exp(z - z_y) of a row's other columns and v = -g · (1 - p_y) / Σ E, dz = v · E there and
g · (1 - p_y) at the target: both gradients are products with E, whose rows or partners v scales.
Where E was not kept, logits are made again, a slice of the vocabulary at a time.
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
"""Rows of a float32 product with the head."""


class Call(NamedTuple):
    """What a backward pass starts from, of all rows of a call or of some."""

    grad: Tensor
    """(N,) upstream."""
    head: Head
    operands: Operands
    targets: Targets
    stats: TokenStats
    """Kept exponentials are those of the first rows, of as many as there are."""

    def of_rows(self, rows: slice) -> "Call":
        """The same of some rows; what is kept stays what it is."""
        stats = self.stats
        return Call(
            self.grad[rows],
            self.head._replace(input=self.head.input[rows]),
            self.operands.of_rows(rows),
            Targets(self.targets.ids[rows], self.targets.ignored[rows]),
            stats._replace(logps=stats.logps[rows], lse=stats.lse[rows]),
        )


class _Shares(NamedTuple):
    """Gradients of logits whose exponentials were kept: dz = v · E."""

    others: Tensor
    """(N,) g · (1 - p_y), what the target gets and the other columns give."""
    share: Tensor
    """(N,) v."""
    exp: Tensor
    """(N, V)."""

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
        # what rounding the target's column to 16 bits took away
        target_N = others_N
        if head.softcap is not None:
            # made again, not lse + log p: near the cap the slope has but their last digits
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
        """v · h, (N, D) in the exponentials' dtype: what these are multiplied with for the head."""
        input_ND = call.operands.head.input
        scaled_ND = torch.empty_like(input_ND, dtype=self.exp.dtype)
        torch.mul(input_ND, self.share[:, None], out=scaled_ND)
        # padding may hold anything, and 0 · NaN would reach the head's gradient
        return scaled_ND.masked_fill_(call.targets.ignored[:, None], 0)

    def bias_gradient(self) -> Tensor:
        """(V,) float32."""
        high_N = self.share.to(self.exp.dtype)
        low_N = (self.share - high_N).to(self.exp.dtype)
        return matmul(torch.stack([high_N, low_N]), self.exp).sum(0)


def store_bwd(call: Call, needs_grad: NeedsGrad) -> Gradients:
    """Gradients from the exponentials of all rows."""
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
    """Gradients from the exponentials of the first rows and logits of the others made again.

    The head's are added up in float32 over both, and rounded once.
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
    """Gradients from logits made again, a slice of the vocabulary at a time.

    Args:
        scored: Whose logits they are; None for those of the call's own operands.
        begun: Gradients of the head that are added to.
    """
    _, head, operands, targets, stats = call
    scored = scored or operands
    (scaled_N,), unit = logit_gradients(head, targets, call.grad)
    row_arguments = {
        "lse_ptr": stats.lse,
        "grad_ptr": scaled_N,
        # 1 - p_y without subtracting from 1: exact for a confident token
        "target_grad_ptr": -scaled_N * stats.logps.expm1(),
    }
    # padding may hold anything, and 0 · NaN would reach the head's gradient
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
        gradient_tile(scored),
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
    """`values` times the softcap's derivative at `logits`; (N,)."""
    slope = head.softcap_slope(logits)
    return values if slope is None else values * slope
