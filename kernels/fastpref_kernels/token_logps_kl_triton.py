"""`token_logps_and_kl` on a GPU: the launchers of its kernels, and how many GEMMs its modes take.

    store    4 passes, 3 if the head is frozen: what both models say of every column is kept for the
             backward, if the workspace holds it
    lean     6 passes, 5 if the head is frozen: the backward makes both models' logits again
    scores   2 passes: nothing wants a gradient

A pass is 2·N·D·V floating-point operations.
"""

from typing import Any

import torch
import triton
from torch import Tensor

from fastpref_kernels import token_logps_kl_kernels as kernels
from fastpref_kernels.gemm_tiles import JOINT_ROW_TILE, GemmTile
from fastpref_kernels.head import (
    Gradients,
    Head,
    JointStats,
    JointSums,
    NeedsGrad,
    RowSums,
    Targets,
    head_gradients,
    kl_target_gradients,
    logit_gradients,
    matmul,
)
from fastpref_kernels.launch import (
    COMPILE,
    TRITON_DTYPES,
    Operands,
    aligned_columns,
    combine,
    descriptors,
    fused_blocks,
    fused_grid,
    gradient_tile,
    product_tiles,
    result_descriptor,
    row_blocks,
    row_grid,
    whole_tile,
)
from fastpref_kernels.token_logps_kernels import MAX_DRIFT
from fastpref_kernels.workspace import get_workspace_mib, slices

Heads = tuple[Head, Head]
"""Policy, reference."""

_SWEEP_ROWS = 4096
"""Rows of a sweep: bounds the sums of its column blocks, five a row and block."""


def choose_mode(heads: Heads, needs_grad: NeedsGrad) -> str:
    """Mode of a call; see the module's docstring."""
    policy, _ = heads
    if not any(needs_grad):
        return "scores"
    if policy.gemm_dtype == torch.float16:
        return "lean"
    num_kept = 2 * len(policy.input) * aligned_columns(policy.weight.shape[0])
    fits = num_kept * _kept_dtype(heads).itemsize <= get_workspace_mib() * 2**20
    return "store" if fits else "lean"


def empty_stats(heads: Heads, mode: str) -> JointStats:
    """Uninitialised results of the forward, with what the mode keeps for its backward."""
    policy, _ = heads
    N, V = len(policy.input), policy.weight.shape[0]
    stored = mode == "store"
    kept_shape = (2, N, aligned_columns(V)) if stored else (0,)
    return JointStats.empty(
        policy.input,
        kept=policy.input.new_empty(kept_shape, dtype=_kept_dtype(heads)),
        kept_scales=policy.input.new_empty((2, N) if stored else (0,), dtype=torch.float32),
    )


def token_logps_kl_fwd(heads: Heads, targets: Targets, direction: str, mode: str) -> JointStats:
    """Both models' target log-probabilities and their KL, from one sweep over the vocabulary."""
    stats = empty_stats(heads, mode)
    operands = _operands(heads, targets)
    V = heads[0].weight.shape[0]
    if mode == "store":
        # columns that only round a row up: an op's results hold nothing by chance
        stats.kept[:, :, V:] = 0
    for rows in slices(len(targets.ids), _SWEEP_ROWS):
        sweep = _JointSweep(operands, rows, under_reference=direction == "reference_policy")
        kept_RV = [kept_NV[rows, :V] for kept_NV in _kept(stats)] if mode == "store" else None
        sweep.run(kept_RV)
        policy, reference, kl_R = sweep.finish()
        results = (policy.logps, policy.lse, reference.logps, reference.lse, kl_R)
        for total_N, part_R in zip(stats[:5], results, strict=True):
            total_N[rows] = part_R
        if kept_RV is not None:
            stats.kept_scales[:, rows] = sweep.rescue(policy, reference, kept_RV)
    for scores_N in (stats.logps, stats.reference_logps, stats.kl):
        scores_N.masked_fill_(targets.ignored, 0)
    return stats


def token_logps_kl_bwd(
    grads: tuple[Tensor, Tensor],
    heads: Heads,
    targets: Targets,
    stats: JointStats,
    *,
    direction: str,
    mode: str,
    needs_grad: NeedsGrad,
) -> Gradients:
    """Gradients of the policy's input, weight and bias; formulas as in the portable path."""
    policy, _ = heads
    (grad_logps_N, grad_kl_N), unit = logit_gradients(policy, targets, *grads)
    operands = _operands(heads, targets)
    vectors: dict[str, Any] = {
        "grad_logps_ptr": grad_logps_N,
        "grad_kl_ptr": grad_kl_N,
        "kl_ptr": stats.kl,
        "target_grad_ptr": kl_target_gradients(stats, grad_logps_N, grad_kl_N, direction),
        "target_ptr": operands[0].ids,
    }
    if mode == "store":
        fill = _from_stored
        vectors["log_scale_ptr"], vectors["reference_log_scale_ptr"] = stats.kept_scales
        slope_N = policy.softcap_slope(stats.lse + stats.logps)
        if slope_N is not None:
            # the other columns were stored with theirs
            vectors["target_grad_ptr"] = vectors["target_grad_ptr"] * slope_N
    else:
        fill = _from_products if operands[0].tile is None else _from_fused
        vectors |= {"lse_ptr": stats.lse, "reference_lse_ptr": stats.reference_lse}
    # padding may hold anything, and 0 · NaN would reach the head's gradient
    clean_ND = operands[0].head.input
    if needs_grad[1]:
        clean_ND = clean_ND.masked_fill(targets.ignored[:, None], 0)

    def dlogits(rows: slice, cols: slice, hidden_RD: Tensor, weight_CD: Tensor) -> Tensor:
        R, C = len(hidden_RD), len(weight_CD)
        dlogits_RC = hidden_RD.new_empty(R, aligned_columns(C))[:, :C]
        arguments = {name: vector_N[rows] for name, vector_N in vectors.items()}
        arguments["UNDER_REFERENCE"] = direction == "reference_policy"
        fill(operands, stats, rows, cols, dlogits_RC, arguments)
        return dlogits_RC

    tile = gradient_tile(operands[0])
    return head_gradients(policy, needs_grad, tile, lambda rows: clean_ND[rows], dlogits, unit=unit)


class _JointSweep:
    """Sums of a group of rows under both models."""

    def __init__(
        self, operands: tuple[Operands, Operands], rows: slice, *, under_reference: bool
    ) -> None:
        self.operands, self.under_reference = operands, under_reference
        self.ids_R = operands[0].ids[rows]
        self.inputs = [model.head.input[rows] for model in operands]
        self.anchors = [model.target_logits(rows) for model in operands]
        tile = operands[0].tile or JOINT_ROW_TILE
        num_blocks = triton.cdiv(operands[0].head.weight.shape[0], tile.block_v)
        self.sums_BR = {
            name: self.anchors[0].new_empty(num_blocks, len(self.ids_R))
            for name in ("max", "sum", "reference_max", "reference_sum", "gap")
        }

    def run(self, kept_RV: list[Tensor] | None) -> None:
        """Sweep the vocabulary; fill `kept_RV` with the larger exponentials and log-ratios."""
        tile = self.operands[0].tile
        if tile is None:
            self._run_products(kept_RV)
        else:
            self._run_fused(tile, kept_RV)

    def finish(self) -> tuple[RowSums, RowSums, Tensor]:
        """Row sums of policy and reference, and the KL, (R,)."""
        sums = self.sums_BR
        of_policy, of_reference = (
            (sums["max"], sums["sum"]),
            (sums["reference_max"], sums["reference_sum"]),
        )
        gaps = (None, sums["gap"]) if self.under_reference else (sums["gap"], None)
        max_R, sum_R, gap_R = combine(*of_policy, gaps[0], over_max=True)
        reference_max_R, reference_sum_R, reference_gap_R = combine(
            *of_reference, gaps[1], over_max=True
        )
        policy = RowSums(max_R, sum_R, self.anchors[0])
        reference = RowSums(reference_max_R, reference_sum_R, self.anchors[1])
        base_gap_R = self.anchors[0] - self.anchors[1]
        if self.under_reference:
            kl_R = JointSums(reference, policy, reference_gap_R, -base_gap_R).kl
        else:
            kl_R = JointSums(policy, reference, gap_R, base_gap_R).kl
        return policy, reference, kl_R

    def rescue(self, policy: RowSums, reference: RowSums, kept_RV: list[Tensor]) -> Tensor:
        """Do rows again whose target is more than MAX_DRIFT nats below another column.

        Returns:
            log p and log q of what is stored as 1, (2, R).
        """
        models = (policy, reference)
        drifts = torch.stack([sums.max - sums.target_logit for sums in models])
        rescued_R = (self.ids_R >= 0) & (drifts > MAX_DRIFT.value).any(0)
        # the others' log-sum-exp is their anchor then: log p of it is log(1 - p_y)
        others = [sums.max + sums.sum_exp.log() for sums in models]
        (head, reference_head), D = (model.head for model in self.operands), self.inputs[0].shape[1]
        D_reference = self.inputs[1].shape[1]
        block_d = triton.next_power_of_2(max(D, D_reference))
        kernels._joint_rescue_kernel[(len(self.ids_R),)](
            self.inputs[0],
            head.weight,
            reference_input_ptr=self.inputs[1],
            reference_weight_ptr=reference_head.weight,
            target_ptr=self.ids_R,
            rescued_ptr=rescued_R,
            others_lse_ptr=others[0],
            reference_others_lse_ptr=others[1],
            larger_ptr=kept_RV[0],
            log_ratio_ptr=kept_RV[1],
            stride_n=self.inputs[0].stride(0),
            stride_v=head.weight.stride(0),
            stride_reference_n=self.inputs[1].stride(0),
            stride_reference_v=reference_head.weight.stride(0),
            stride_stored=kept_RV[0].stride(0),
            V=head.weight.shape[0],
            D=D,
            D_REFERENCE=D_reference,
            BLOCK_V=max(1, 4096 // block_d),
            BLOCK_D=block_d,
            num_warps=8,
            **_transforms(self.operands),
            **COMPILE,
        )
        return torch.stack(
            [
                torch.where(rescued_R, other_R - sums.lse, sums.logps)
                for other_R, sums in zip(others, models, strict=True)
            ]
        )

    def _run_fused(self, tile: GemmTile, kept_RV: list[Tensor] | None) -> None:
        heads = [model.head for model in self.operands]
        larger_RV, log_ratio_RV = kept_RV or (None, None)
        V = heads[0].weight.shape[0]
        kernels._joint_sweep_kernel[fused_grid(tile, len(self.ids_R), V)](
            *descriptors(tile, self.inputs[0], heads[0].weight),
            *descriptors(tile, self.inputs[1], heads[1].weight),
            result_descriptor(tile, larger_RV, parts=8),
            result_descriptor(tile, log_ratio_RV, parts=8),
            start_v=0,
            stop_v=V,
            D=self.inputs[0].shape[1],
            D_REFERENCE=self.inputs[1].shape[1],
            **self._arguments(kept_RV),
            **_transforms(self.operands),
            **fused_blocks(tile),
        )

    def _run_products(self, kept_RV: list[Tensor] | None) -> None:
        heads = [model.head for model in self.operands]
        V = heads[0].weight.shape[0]
        for rows, cols in product_tiles(len(self.ids_R), V):
            products = [
                matmul(whole_tile(input_RD, rows), head.weight[cols].t())
                for input_RD, head in zip(self.inputs, heads, strict=True)
            ]
            kept = [None, None] if kept_RV is None else [part[rows, cols] for part in kept_RV]
            R, C = rows.stop - rows.start, cols.stop - cols.start
            kernels._joint_sweep_tile_kernel[row_grid(R, C, JOINT_ROW_TILE)](
                *products,
                *kept,
                stride_logits=C,
                stride_stored=0 if kept[0] is None else kept[0].stride(0),
                first_n=rows.start,
                R=R,
                start_v=cols.start,
                stop_v=cols.stop,
                **self._arguments(kept_RV),
                **_transforms(self.operands),
                **row_blocks(JOINT_ROW_TILE),
            )

    def _arguments(self, kept_RV: list[Tensor] | None) -> dict[str, Any]:
        """Kernel arguments of what a sweep reads and leaves for each row."""
        sums = {f"{name}_ptr": sums_BR for name, sums_BR in self.sums_BR.items()}
        exp, ratio = (TRITON_DTYPES[kept.dtype] for kept in kept_RV) if kept_RV else (None, None)
        return sums | {
            "target_ptr": self.ids_R,
            "anchor_ptr": self.anchors[0],
            "reference_anchor_ptr": self.anchors[1],
            "N": len(self.ids_R),
            "EXP": exp,
            "RATIO": ratio,
            "UNDER_REFERENCE": self.under_reference,
        }


def _from_stored(
    operands: tuple[Operands, Operands],
    stats: JointStats,
    rows: slice,
    cols: slice,
    dlogits_RC: Tensor,
    arguments: dict[str, Any],
) -> None:
    R, C = dlogits_RC.shape
    larger_RC, log_ratio_RC = (kept_NV[rows, cols] for kept_NV in _kept(stats))
    kernels._stored_gradient_kernel[row_grid(R, C, JOINT_ROW_TILE)](
        larger_RC,
        log_ratio_RC,
        dlogits_RC,
        stride_stored=larger_RC.stride(0),
        stride_dlogits=dlogits_RC.stride(0),
        first_n=0,
        R=R,
        start_v=cols.start,
        C=C,
        **arguments,
        **row_blocks(JOINT_ROW_TILE),
    )


def _from_fused(
    operands: tuple[Operands, Operands],
    stats: JointStats,
    rows: slice,
    cols: slice,
    dlogits_RC: Tensor,
    arguments: dict[str, Any],
) -> None:
    tile = operands[0].tile
    assert tile is not None
    heads = [model.head for model in operands]
    kernels._joint_dlogits_kernel[fused_grid(tile, *dlogits_RC.shape)](
        *descriptors(tile, heads[0].input[rows], heads[0].weight),
        *descriptors(tile, heads[1].input[rows], heads[1].weight),
        result_descriptor(tile, dlogits_RC, parts=8),
        N=len(dlogits_RC),
        start_v=cols.start,
        stop_v=cols.stop,
        D=heads[0].input.shape[1],
        D_REFERENCE=heads[1].input.shape[1],
        OUT=TRITON_DTYPES[dlogits_RC.dtype],
        **arguments,
        **_transforms(operands),
        **fused_blocks(tile),
    )


def _from_products(
    operands: tuple[Operands, Operands],
    stats: JointStats,
    rows: slice,
    cols: slice,
    dlogits_RC: Tensor,
    arguments: dict[str, Any],
) -> None:
    heads = [model.head for model in operands]
    for part_rows, part_cols in product_tiles(*dlogits_RC.shape):
        products = [
            matmul(head.input[rows][part_rows], head.weight[cols][part_cols].t()) for head in heads
        ]
        part_RC = dlogits_RC[part_rows, part_cols]
        R, C = part_RC.shape
        kernels._joint_dlogits_tile_kernel[row_grid(R, C, JOINT_ROW_TILE)](
            *products,
            part_RC,
            stride_logits=C,
            stride_dlogits=part_RC.stride(0),
            first_n=part_rows.start,
            R=R,
            start_v=cols.start + part_cols.start,
            stop_v=cols.start + part_cols.stop,
            **arguments,
            **_transforms(operands),
            **row_blocks(JOINT_ROW_TILE),
        )


def _operands(heads: Heads, targets: Targets) -> tuple[Operands, Operands]:
    """Both models' tensors, in blocks of the joint kernels or both for the library's GEMM."""
    policy, reference = (Operands.of(head, targets, joint=True) for head in heads)
    dtypes = {operands.head.input.dtype for operands in (policy, reference)}
    tile = policy.tile if len(dtypes) == 1 and reference.tile is not None else None
    return policy._replace(tile=tile), reference._replace(tile=tile)


def _transforms(operands: tuple[Operands, Operands]) -> dict[str, Any]:
    """Kernel arguments of both models' bias, and of the scale and softcap they share."""
    reference_bias = operands[1].head.bias
    return operands[0].transform | {
        "reference_bias_ptr": reference_bias,
        "HAS_REFERENCE_BIAS": reference_bias is not None,
    }


def _kept(stats: JointStats) -> tuple[Tensor, Tensor]:
    """Larger exponentials and log-ratios, (N, V rounded up).

    A log-ratio of 50 nats fits in float16 too, whose rounding is an eighth of bfloat16's.
    """
    larger_NV, log_ratio_NV = stats.kept
    in_half = larger_NV.dtype == torch.bfloat16
    return larger_NV, log_ratio_NV.view(torch.float16) if in_half else log_ratio_NV


def _kept_dtype(heads: Heads) -> torch.dtype:
    """Bfloat16 only if both models' logits are made of it."""
    both = {head.exp_dtype for head in heads}
    return torch.bfloat16 if both == {torch.bfloat16} else torch.float32
