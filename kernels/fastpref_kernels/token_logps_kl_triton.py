"""Triton launchers of `token_logps_and_kl`, in four modes with different numbers of GEMM passes.

    store    4 passes, 3 if the head is frozen: an exponential and a log-ratio of every column fit
             in the workspace and are kept for the backward
    partial  between store and lean: the same for as many leading rows as fit in the workspace
    lean     6 passes, 5 if the head is frozen: the backward recomputes both models' logits
    scores   2 passes: no gradient is required

A pass is 2·N·D·V floating-point operations. With float16 operands, lean replaces store and partial.
"""

from typing import Any

import torch
from torch import Tensor

from fastpref_kernels import token_logps_kl_gradient_kernels as kernels
from fastpref_kernels.gemm import matmul
from fastpref_kernels.gemm_tiles import JOINT_ROW_TILE
from fastpref_kernels.head import (
    Gradients,
    Heads,
    NeedsGrad,
    Targets,
    head_gradients,
    joint_exp_dtype,
    kl_target_gradients,
    logit_gradients,
)
from fastpref_kernels.launch import (
    TRITON_DTYPES,
    Operands,
    aligned_columns,
    descriptors,
    fused_blocks,
    fused_grid,
    gradient_tile,
    product_tiles,
    result_descriptor,
    row_blocks,
    row_grid,
)
from fastpref_kernels.row_sums import JointStats
from fastpref_kernels.token_logps_backward import times_slope
from fastpref_kernels.token_logps_kl_sweep import JointSweep, joint_transforms
from fastpref_kernels.workspace import keeping_mode, kept_rows, slices

_SWEEP_ROWS = 4096
"""Rows per pass over the vocabulary: bounds the memory of five sums per row and column block."""


def choose_mode(heads: Heads, needs_grad: NeedsGrad) -> str:
    """Mode of a call; see the module's docstring."""
    policy, _ = heads
    if not any(needs_grad):
        return "scores"
    if policy.gemm_dtype == torch.float16:
        return "lean"
    return keeping_mode(policy.input.shape[0], _row_bytes(heads))


def empty_stats(heads: Heads, mode: str) -> JointStats:
    """Uninitialised results of the forward, with the tensors the mode keeps for its backward."""
    policy, _ = heads
    N, V = policy.input.shape[0], policy.weight.shape[0]
    num_kept = {"store": N, "partial": kept_rows(N, _row_bytes(heads))}.get(mode, 0)
    kept_shape = (2, num_kept, aligned_columns(V))
    return JointStats.empty(
        policy.input,
        kept=policy.input.new_empty(kept_shape, dtype=joint_exp_dtype(heads)),
        kept_scales=policy.input.new_empty((2, num_kept), dtype=torch.float32),
    )


def token_logps_kl_fwd(heads: Heads, targets: Targets, direction: str, mode: str) -> JointStats:
    """Both models' target log-probabilities and their KL, from one pass over the vocabulary."""
    stats = empty_stats(heads, mode)
    operands = _operands(heads, targets)
    V = heads[0].weight.shape[0]
    K, N = stats.kept.shape[1], len(targets.ids)
    if K:
        # alignment columns: an op must not return uninitialised memory
        stats.kept[:, :, V:] = 0
    for rows in [*slices(K, _SWEEP_ROWS), *slices(N, _SWEEP_ROWS, start=K)]:
        sweep = JointSweep(operands, rows, under_reference=direction == "reference_policy")
        kept_RV = [kept_KV[rows, :V] for kept_KV in _kept(stats)] if rows.stop <= K else None
        sweep.run(kept_RV)
        sums = sweep.finish()
        for total_N, part_R in zip(stats[:5], sums.results, strict=True):
            total_N[rows] = part_R
        if kept_RV is not None:
            stats.kept_scales[:, rows] = sweep.rescue(sums, kept_RV)
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
    """Gradients of the policy's input, weight and bias; formulas as in token_logps_kl_torch.py.

    The same for all modes: rows that were not kept are recomputed.
    """
    policy, _ = heads
    (grad_logps_N, grad_kl_N), unit = logit_gradients(policy, targets, *grads)
    operands = _operands(heads, targets)
    vectors = {
        "grad_logps_ptr": grad_logps_N,
        "grad_kl_ptr": grad_kl_N,
        "kl_ptr": stats.kl,
        "target_grad_ptr": kl_target_gradients(stats, grad_logps_N, grad_kl_N, direction),
        "target_ptr": operands[0].ids,
    }
    K, N = stats.kept.shape[1], len(targets.ids)
    remake = _from_products if operands[0].tile is None else _from_fused
    sources = (
        (slice(0, K), _from_stored, vectors | _stored_vectors(operands[0], stats, vectors)),
        (
            slice(K, N),
            remake,
            vectors | {"lse_ptr": stats.lse, "reference_lse_ptr": stats.reference_lse},
        ),
    )
    # ignored rows may hold NaN, and 0 · NaN would reach the head's gradient
    clean_ND = operands[0].head.input
    if needs_grad[1]:
        clean_ND = clean_ND.masked_fill(targets.ignored[:, None], 0)

    def dlogits(rows: slice, cols: slice, hidden_RD: Tensor, weight_CD: Tensor) -> Tensor:
        R, C = len(hidden_RD), len(weight_CD)
        dlogits_RC = hidden_RD.new_empty(R, aligned_columns(C))[:, :C]
        for of_source, fill, row_arguments in sources:
            part = slice(max(rows.start, of_source.start), min(rows.stop, of_source.stop))
            if part.start >= part.stop:
                continue
            arguments: dict[str, Any] = {
                name: vector[part] for name, vector in row_arguments.items()
            }
            arguments["UNDER_REFERENCE"] = direction == "reference_policy"
            part_RC = dlogits_RC[part.start - rows.start : part.stop - rows.start]
            fill(operands, stats, part, cols, part_RC, arguments)
        return dlogits_RC

    tile = gradient_tile(operands[0], clean_ND.dtype)
    return head_gradients(policy, needs_grad, tile, lambda rows: clean_ND[rows], dlogits, unit=unit)


def _stored_vectors(
    policy: Operands, stats: JointStats, vectors: dict[str, Tensor]
) -> dict[str, Tensor]:
    """Arguments of `_from_stored` that exist for kept rows only, (K,) each."""
    log_scale_K, reference_log_scale_K = stats.kept_scales
    K = len(log_scale_K)
    target_K = vectors["target_grad_ptr"][:K]
    if policy.head.softcap is not None:
        # stored exponentials include the softcap's slope; the target's gradient does not
        target_K = times_slope(target_K, policy.head, policy.target_logits(slice(0, K)))
    return {
        "log_scale_ptr": log_scale_K,
        "reference_log_scale_ptr": reference_log_scale_K,
        "target_grad_ptr": target_K,
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
    R, C = dlogits_RC.shape
    kernels._joint_dlogits_kernel[fused_grid(tile, R, C, dlogits_RC.device)](
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
        **joint_transforms(operands),
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
            **joint_transforms(operands),
            **row_blocks(JOINT_ROW_TILE),
        )


def _operands(heads: Heads, targets: Targets) -> tuple[Operands, Operands]:
    """Both models' operands; both use the fused joint kernels, or both the library's GEMM."""
    policy, reference = (Operands.of(head, targets, joint=True) for head in heads)
    dtypes = {operands.head.input.dtype for operands in (policy, reference)}
    tile = policy.tile if len(dtypes) == 1 and reference.tile is not None else None
    return policy._replace(tile=tile), reference._replace(tile=tile)


def _kept(stats: JointStats) -> tuple[Tensor, Tensor]:
    """Larger exponentials and log-ratios, (K, V rounded up) each.

    16-bit log-ratios are float16: its rounding error is an eighth of bfloat16's, and its range
    suffices for 50 nats.
    """
    larger_NV, log_ratio_NV = stats.kept
    in_half = larger_NV.dtype == torch.bfloat16
    return larger_NV, log_ratio_NV.view(torch.float16) if in_half else log_ratio_NV


def _row_bytes(heads: Heads) -> int:
    """Bytes kept per row."""
    return 2 * aligned_columns(heads[0].weight.shape[0]) * joint_exp_dtype(heads).itemsize
