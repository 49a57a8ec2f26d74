"""One joint pass ("sweep") of policy and reference over the vocabulary on a GPU."""

from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor

from fastpref_kernels import token_logps_kl_kernels as kernels
from fastpref_kernels.gemm_tiles import JOINT_ROW_TILE, GemmTile
from fastpref_kernels.launch import (
    COMPILE,
    TRITON_DTYPES,
    Operands,
    aligned_columns,
    combine,
    descriptors,
    fused_blocks,
    fused_grid,
    product_tiles,
    products_of,
    result_descriptor,
    row_blocks,
    row_grid,
)
from fastpref_kernels.rescue_kernels import RESCUE_ROWS, _joint_rescue_kernel
from fastpref_kernels.row_sums import JointSums, RowSums, base_gap
from fastpref_kernels.token_logps_kernels import MAX_DRIFT


class JointSweep:
    """Sums of a group of rows under both models."""

    def __init__(
        self, operands: tuple[Operands, Operands], rows: slice, *, under_reference: bool
    ) -> None:
        self.operands, self.under_reference = operands, under_reference
        self.ids_R = operands[0].ids[rows]
        self.inputs = [model.head.input[rows] for model in operands]
        tile = operands[0].tile or JOINT_ROW_TILE
        B, R = triton.cdiv(operands[0].head.weight.shape[0], tile.block_v), len(self.ids_R)
        empty = partial(self.inputs[0].new_empty, dtype=torch.float32)
        # target logits, max and sum of the other columns, gap. Both models' rows are aligned to 256
        # bytes: a kernel compiled for another alignment may sum a row in another order
        self.row_sums_42R = empty(4, 2, aligned_columns(R))[..., :R]
        self.anchor_2R = self.row_sums_42R[0]
        for model, anchor_R in zip(operands, self.anchor_2R, strict=True):
            model.target_logits(rows, out=anchor_R)
        self.max_BR, self.reference_max_BR = empty(B, R), empty(B, R)
        self.sum_BR, self.reference_sum_BR = empty(B, R), empty(B, R)
        self.gap_BR = empty(B, R)

    def run(self, kept_RV: list[Tensor] | None) -> None:
        """Run over the vocabulary; store larger exponentials and log-ratios in `kept_RV`."""
        tile = self.operands[0].tile
        if tile is None:
            self._run_products(kept_RV)
        else:
            self._run_fused(tile, kept_RV)

    def finish(self) -> JointSums:
        """Reduce the blocks to sums over all columns."""
        sums = (self.max_BR, self.sum_BR), (self.reference_max_BR, self.reference_sum_BR)
        first = int(self.under_reference)
        for model, (max_BR, sum_BR) in enumerate(sums):
            gap_BR = self.gap_BR if model == first else None
            combine(max_BR, sum_BR, gap_BR, over_max=True, out=self.row_sums_42R[1:, model])
        anchor_2R, max_2R, sum_2R, gap_2R = self.row_sums_42R
        base_gap_R = base_gap(anchor_2R[first], anchor_2R[1 - first])
        models = RowSums(max_2R, sum_2R, anchor_2R)
        return JointSums(models, gap_2R[first], base_gap_R, self.under_reference)

    def rescue(self, sums: JointSums, kept_RV: list[Tensor]) -> Tensor:
        """Recompute rows whose target is more than MAX_DRIFT nats below another column.

        Returns:
            log p and log q that a stored exponential of 1 stands for, (2, R).
        """
        models = sums.models
        drift_2R = models.max - models.target_logit
        rescued_R = (self.ids_R >= 0) & (drift_2R > MAX_DRIFT.value).any(0)
        # the anchor of these rows is the log-sum-exp of the other columns: log p = log(1 - p_y)
        others_lse_R, reference_others_lse_R = (lse_R.float() for lse_R in models.lse_others)
        (head, reference_head), D = (model.head for model in self.operands), self.inputs[0].shape[1]
        D_reference = self.inputs[1].shape[1]
        block_d = triton.next_power_of_2(max(D, D_reference))
        R = len(self.ids_R)
        _joint_rescue_kernel[(triton.cdiv(R, RESCUE_ROWS),)](
            self.inputs[0],
            head.weight,
            reference_input_ptr=self.inputs[1],
            reference_weight_ptr=reference_head.weight,
            target_ptr=self.ids_R,
            rescued_ptr=rescued_R,
            others_lse_ptr=others_lse_R,
            reference_others_lse_ptr=reference_others_lse_R,
            larger_ptr=kept_RV[0],
            log_ratio_ptr=kept_RV[1],
            stride_n=self.inputs[0].stride(0),
            stride_v=head.weight.stride(0),
            stride_reference_n=self.inputs[1].stride(0),
            stride_reference_v=reference_head.weight.stride(0),
            stride_stored=kept_RV[0].stride(0),
            N=R,
            V=head.weight.shape[0],
            D=D,
            D_REFERENCE=D_reference,
            ROWS=RESCUE_ROWS,
            BLOCK_V=max(1, 4096 // block_d),
            BLOCK_D=block_d,
            num_warps=8,
            **joint_transforms(self.operands),
            **COMPILE,
        )
        # use the rounded anchors: with large logits their rounding is part of the stored values
        others_lse_2R = torch.stack([others_lse_R, reference_others_lse_R])
        return torch.where(rescued_R, others_lse_2R - models.lse, models.logps)

    def _run_fused(self, tile: GemmTile, kept_RV: list[Tensor] | None) -> None:
        heads = [model.head for model in self.operands]
        larger_RV, log_ratio_RV = kept_RV or (None, None)
        V = heads[0].weight.shape[0]
        kernels._joint_sweep_kernel[fused_grid(tile, len(self.ids_R), V, self.ids_R.device)](
            *descriptors(tile, self.inputs[0], heads[0].weight),
            *descriptors(tile, self.inputs[1], heads[1].weight),
            result_descriptor(tile, larger_RV, parts=8),
            result_descriptor(tile, log_ratio_RV, parts=8),
            start_v=0,
            stop_v=V,
            D=self.inputs[0].shape[1],
            D_REFERENCE=self.inputs[1].shape[1],
            **self._arguments(kept_RV),
            **joint_transforms(self.operands),
            **fused_blocks(tile),
        )

    def _run_products(self, kept_RV: list[Tensor] | None) -> None:
        heads = [model.head for model in self.operands]
        V = heads[0].weight.shape[0]
        for rows, cols in product_tiles(len(self.ids_R), V):
            products = [
                products_of(input_RD, head.weight[cols], rows)
                for input_RD, head in zip(self.inputs, heads, strict=True)
            ]
            kept = [None, None] if kept_RV is None else [part[rows, cols] for part in kept_RV]
            R, C = rows.stop - rows.start, cols.stop - cols.start
            kernels._joint_sweep_tile_kernel[row_grid(R, C, JOINT_ROW_TILE)](
                *products,
                *kept,
                stride_logits=products[0].stride(0),
                stride_stored=0 if kept[0] is None else kept[0].stride(0),
                first_n=rows.start,
                R=R,
                start_v=cols.start,
                stop_v=cols.stop,
                **self._arguments(kept_RV),
                **joint_transforms(self.operands),
                **row_blocks(JOINT_ROW_TILE),
            )

    def _arguments(self, kept_RV: list[Tensor] | None) -> dict[str, Any]:
        """Kernel arguments for the per-row inputs and outputs of a sweep."""
        anchor_R, reference_anchor_R = self.anchor_2R
        exp, ratio = (TRITON_DTYPES[kept.dtype] for kept in kept_RV) if kept_RV else (None, None)
        return {
            "target_ptr": self.ids_R,
            "anchor_ptr": anchor_R,
            "reference_anchor_ptr": reference_anchor_R,
            "max_ptr": self.max_BR,
            "sum_ptr": self.sum_BR,
            "reference_max_ptr": self.reference_max_BR,
            "reference_sum_ptr": self.reference_sum_BR,
            "gap_ptr": self.gap_BR,
            "N": len(self.ids_R),
            "EXP": exp,
            "RATIO": ratio,
            "UNDER_REFERENCE": self.under_reference,
        }


def joint_transforms(operands: tuple[Operands, Operands]) -> dict[str, Any]:
    """Kernel arguments for both models' biases and their common scale and softcap."""
    reference_bias = operands[1].head.bias
    return operands[0].transform | {
        "reference_bias_ptr": reference_bias,
        "HAS_REFERENCE_BIAS": reference_bias is not None,
    }
