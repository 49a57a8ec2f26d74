"""One pass ("sweep") over the vocabulary on a GPU: kernel launches and sums of a group of rows."""

from typing import Any

import torch
import triton
from torch import Tensor

from fastpref_kernels import token_logps_kernels as kernels
from fastpref_kernels.gemm_tiles import ROW_TILE, GemmTile
from fastpref_kernels.launch import (
    COMPILE,
    TRITON_DTYPES,
    Operands,
    combine,
    descriptors,
    fused_grid,
    looping_blocks,
    product_tiles,
    products_of,
    result_descriptor,
    row_blocks,
    row_grid,
)
from fastpref_kernels.rescue_kernels import RESCUE_ROWS, _rescue_kernel
from fastpref_kernels.row_sums import RowSums


class Sweep:
    """Sums of a group of rows over the columns swept so far."""

    def __init__(self, operands: Operands, rows: slice, *, stored: bool, gap: bool = False) -> None:
        self.operands = operands
        self.input_RD, self.ids_R = operands.head.input[rows], operands.ids[rows]
        self.anchor_R = operands.target_logits(rows)
        self.exp_dtype = operands.exp_dtype if stored else None
        # fused kernels store sums per part of a tile; the gap needs registers, so smaller parts
        self.parts = 4 if gap else 2
        tile = operands.tile
        block_v = ROW_TILE.block_v if tile is None else tile.block_v // self.parts
        num_blocks = triton.cdiv(operands.head.weight.shape[0], block_v)
        self.max_BR, self.sum_BR = self._empty(num_blocks), self._empty(num_blocks)
        self.stored_sum_BR = self._empty(num_blocks) if stored else None
        self.gap_BR = self._empty(num_blocks) if gap else None

    def add(self, cols: slice, stored_RC: Tensor | None = None) -> None:
        """Add the columns `cols`, which start at a block boundary; store exponentials if asked."""
        if self.operands.tile is None:
            self._add_products(cols, stored_RC)
        else:
            self._add_fused(self.operands.tile, cols, stored_RC)

    def finish(self) -> tuple[RowSums, Tensor]:
        """Sums over all columns, and of stored exponentials, (R,): uninitialised if none are."""
        row_max_R, row_sum_R, stored_sum_R = combine(self.max_BR, self.sum_BR, self.stored_sum_BR)
        return RowSums(row_max_R, row_sum_R, self.anchor_R), stored_sum_R

    def finish_gap(self) -> Tensor:
        """Σ of stored exponentials times (logit - target's logit) over all columns, (R,)."""
        *_, gap_R = combine(self.max_BR, self.sum_BR, self.gap_BR)
        return gap_R

    def rescue(
        self,
        sums: RowSums,
        stored_sum_R: Tensor,
        gap_R: Tensor | None = None,
        *,
        stored_RV: Tensor | None = None,
        total_RD: Tensor | None = None,
    ) -> None:
        """Recompute rows whose target is more than MAX_DRIFT nats below another column.

        Overwrites exactly one of `stored_RV`, their exponentials, and `total_RD`, the product of
        exponentials and head; and with it `stored_sum_R` and, if given, `gap_R`.
        """
        weight_VD, D = self.operands.head.weight, self.input_RD.shape[1]
        block_d = triton.next_power_of_2(D)
        R = len(self.ids_R)
        _rescue_kernel[(triton.cdiv(R, RESCUE_ROWS),)](
            self.input_RD,
            weight_VD,
            target_ptr=self.ids_R,
            anchor_ptr=self.anchor_R,
            row_max_ptr=sums.max,
            row_sum_ptr=sums.sum_exp,
            stored_ptr=stored_RV,
            total_ptr=total_RD,
            stored_sum_ptr=stored_sum_R,
            gap_ptr=gap_R,
            stride_n=self.input_RD.stride(0),
            stride_v=weight_VD.stride(0),
            stride_stored=0 if stored_RV is None else stored_RV.stride(0),
            N=R,
            V=weight_VD.shape[0],
            D=D,
            ROWS=RESCUE_ROWS,
            BLOCK_V=max(1, 8192 // block_d),
            BLOCK_D=block_d,
            STORE=stored_RV is not None,
            GAP=gap_R is not None,
            num_warps=8,
            **self.operands.transform,
            **COMPILE,
        )

    def _add_fused(self, tile: GemmTile, cols: slice, stored_RC: Tensor | None) -> None:
        R, C = len(self.ids_R), cols.stop - cols.start
        kernels._sweep_kernel[fused_grid(tile, R, C, self.input_RD.device)](
            *descriptors(tile, self.input_RD, self.operands.head.weight),
            result_descriptor(tile, stored_RC, parts=self.parts),
            start_v=cols.start,
            stop_v=cols.stop,
            D=self.input_RD.shape[1],
            PARTS=self.parts,
            **self._sums,
            **self.operands.transform,
            **looping_blocks(tile, self.input_RD.device),
        )

    def _add_products(self, cols: slice, stored_RC: Tensor | None) -> None:
        weight_CD = self.operands.head.weight[cols]
        for part_rows, part_cols in product_tiles(len(self.ids_R), len(weight_CD)):
            products_RC = products_of(self.input_RD, weight_CD[part_cols], part_rows)
            part_RC = None if stored_RC is None else stored_RC[part_rows, part_cols]
            R, C = part_rows.stop - part_rows.start, products_RC.shape[1]
            kernels._sweep_tile_kernel[row_grid(R, C)](
                products_RC,
                part_RC,
                stride_logits=products_RC.stride(0),
                stride_stored=0 if part_RC is None else part_RC.stride(0),
                first_n=part_rows.start,
                R=R,
                start_v=cols.start + part_cols.start,
                stop_v=cols.start + part_cols.stop,
                **self._sums,
                **self.operands.transform,
                **row_blocks(),
            )

    @property
    def _sums(self) -> dict[str, Any]:
        """Kernel arguments for the per-row inputs and outputs of a sweep."""
        return {
            "target_ptr": self.ids_R,
            "anchor_ptr": self.anchor_R,
            "max_ptr": self.max_BR,
            "sum_ptr": self.sum_BR,
            "stored_sum_ptr": self.stored_sum_BR,
            "gap_ptr": self.gap_BR,
            "GAP": self.gap_BR is not None,
            "N": len(self.ids_R),
            "EXP": None if self.exp_dtype is None else TRITON_DTYPES[self.exp_dtype],
        }

    def _empty(self, *leading: int) -> Tensor:
        return self.anchor_R.new_empty(*leading, len(self.ids_R))


def weigh_target(stored_RV: Tensor, ids_R: Tensor, weight_R: Tensor) -> None:
    """Store minus the others' sum at the target, so that dz sums to zero over a row.

    Args:
        stored_RV: Exponentials, without a value at the target; modified in place.
        ids_R: Targets, < 0 for ignored rows.
        weight_R: Sum of the other columns, times the softcap's slope at the target.
    """
    ids_R1 = ids_R[:, None]
    weight_R1 = -weight_R[:, None].masked_fill(ids_R1 < 0, 0).to(stored_RV.dtype)
    stored_RV.scatter_(1, ids_R1.clamp_min(0), weight_R1)


def shared(others_N: Tensor, stored_sum_N: Tensor) -> Tensor:
    """others / stored_sum: factor from a stored exponential to its column's share of `others_N`.

    0 where the stored sum is 0: the other columns then have a total probability of 0.
    """
    return torch.where(stored_sum_N > 0, others_N / stored_sum_N, 0)
