"""Triton launchers of `tdpo1_token_values`, in five modes with different numbers of GEMM passes.

    store    3 passes: the reference's exponentials fit in the workspace and are kept for the
             head's gradient
    partial  3 to 4 passes: exponentials of as many leading rows as fit in the workspace are kept
    lean     4 passes: the backward recomputes the reference's logits
    frozen   2 passes: only the hidden states require a gradient, which the forward computes
    scores   2 passes: no gradient is required

A pass is 2·N·D·V floating-point operations. The forward's two are the reference's logits and the
mean of the policy's head weights under the reference's probabilities; policy logits are never
computed. The kernels are those of `token_logps`, run on the reference. With float16 operands, lean
replaces store and partial.
"""

import torch
from torch import Tensor

from fastpref_kernels.gemm import add_matmul
from fastpref_kernels.head import Gradients, Heads, NeedsGrad, Targets, joint_exp_dtype
from fastpref_kernels.launch import Operands, aligned_columns
from fastpref_kernels.row_sums import TokenStats, ValueStats, empty_slopes
from fastpref_kernels.tdpo1_token_values_torch import scaled_slopes, share_head, values_of
from fastpref_kernels.token_logps_backward import Call, lean_bwd, partial_bwd, store_bwd
from fastpref_kernels.token_logps_sweep import Sweep, shared, weigh_target
from fastpref_kernels.workspace import (
    ROW_MULTIPLE,
    keeping_mode,
    kept_rows,
    limit,
    slices,
)

_SWEEP_ROWS = 2048
"""Rows of exponentials multiplied with the policy's head at once."""
_PRODUCT_COLUMNS = 32768
_PRODUCT_COLUMNS_APART = 4096
"""Columns per GEMM where the models do not share a head and a value is the small difference of two
sums. A GPU's matrix units truncate when they accumulate: with logits of ten nats the error of a
value is 3e-4 nats with 32,768 columns and 5e-5 with 4,096, as simulated on a CPU. Sums over several
GEMMs are rounded."""


def choose_mode(heads: Heads, needs_grad: NeedsGrad) -> str:
    """Mode of a call; see the module's docstring."""
    policy, _ = heads
    if not any(needs_grad):
        return "scores"
    if needs_grad == (True, False, False):
        return "frozen"
    if policy.gemm_dtype == torch.float16:
        return "lean"
    return keeping_mode(policy.input.shape[0], _row_bytes(heads))


def empty_stats(heads: Heads, mode: str) -> ValueStats:
    """Uninitialised results of the forward, with the tensors the mode keeps for its backward."""
    policy, _ = heads
    input, N = policy.input, policy.input.shape[0]
    columns = aligned_columns(policy.weight.shape[0])
    num_kept = {"store": N, "partial": kept_rows(N, _row_bytes(heads))}.get(mode, 0)
    return ValueStats.empty(
        input,
        empty_slopes(input, mode),
        kept=input.new_empty(num_kept, columns, dtype=joint_exp_dtype(heads)),
        kept_sums=input.new_empty(num_kept, dtype=torch.float32),
    )


def tdpo1_token_values_fwd(heads: Heads, targets: Targets, mode: str) -> ValueStats:
    """Values, their derivatives in the hidden states, and the tensors the backward needs."""
    policy, reference = (Operands.of(head, targets) for head in heads)
    # the reference's exponentials are multiplied with the policy's head
    reference = reference._replace(exp_dtype=joint_exp_dtype(heads))
    stats = empty_stats(heads, mode)
    N, V = len(targets.ids), policy.head.weight.shape[0]
    K, step = len(stats.kept), _sweep_rows(heads)
    if K:
        # alignment columns: an op must not return uninitialised memory
        stats.kept[:, V:] = 0
    scratch = policy.head.input.new_empty(
        min(step, N - K), aligned_columns(V), dtype=reference.exp_dtype
    )
    for rows in [*slices(K, step), *slices(N, step, start=K)]:
        kept_RC = stats.kept[rows] if rows.stop <= K else scratch[: rows.stop - rows.start]
        _score_rows((policy, reference), heads, rows, kept_RC[:, :V], stats)
    for scores_N in (stats.values, stats.reference_logps):
        scores_N.masked_fill_(targets.ignored, 0)
    return stats


def tdpo1_token_values_bwd(
    grad: Tensor,
    heads: Heads,
    targets: Targets,
    stats: ValueStats,
    *,
    mode: str,
    needs_grad: NeedsGrad,
) -> Gradients:
    """Gradients of the policy's input, weight and bias: dz = g · (e_y - q)."""
    policy, _ = heads
    input_ND = scaled_slopes(grad, policy, targets, stats) if needs_grad[0] else None
    of_head = (False, *needs_grad[1:])
    if not any(of_head):
        return input_ND, None, None
    operands, scored = (Operands.of(head, targets) for head in heads)
    if operands.head.input.itemsize > scored.head.input.itemsize:
        # a tile of float32 gradients beside a fused GEMM's operands exceeds the shared memory
        scored = scored._replace(tile=None)
    # dz is that of `token_logps` with the reference's softmax in place of the policy's
    call = Call(grad, policy, operands, targets, TokenStats(*stats[2:]))
    if mode == "store":
        gradients = store_bwd(call, of_head)
    else:
        backward = partial_bwd if mode == "partial" else lean_bwd
        gradients = backward(call, of_head, scored=scored)
    return input_ND, *gradients[1:]


def _score_rows(
    operands: tuple[Operands, Operands],
    heads: Heads,
    rows: slice,
    kept_RV: Tensor,
    stats: ValueStats,
) -> None:
    policy, reference = operands
    head, ids_R = policy.head, policy.ids[rows]
    sweep = Sweep(reference, rows, stored=True, gap=True)
    sweep.add(slice(0, head.weight.shape[0]), kept_RV)
    sums, stored_sum_R = sweep.finish()
    gap_R = sweep.finish_gap()
    sweep.rescue(sums, stored_sum_R, gap_R, stored_RV=kept_RV)
    # 0 for ignored rows; NaN for a negative id
    others_R = -sums.logps.expm1()
    share_R = shared(others_R, stored_sum_R)
    step = _PRODUCT_COLUMNS if share_head(heads) else _PRODUCT_COLUMNS_APART
    slopes_RD = _product(kept_RV, head.weight, step).mul_(-share_R[:, None])
    slopes_RD += others_R[:, None] * head.weight[ids_R.clamp_min(0)]
    slopes_RD *= head.scale
    if head.bias is not None:
        bias_V = head.bias.float()
        over_R = _weighted_sum(kept_RV, bias_V, step) - stored_sum_R * bias_V[ids_R.clamp_min(0)]
        gap_R -= over_R * head.scale
    stats.values[rows] = values_of(heads, rows, slopes_RD, share_R * gap_R)
    stats.reference_logps[rows], stats.reference_lse[rows] = sums.logps, sums.lse
    if len(stats.slopes):
        stats.slopes[rows] = slopes_RD.masked_fill_(ids_R[:, None] < 0, 0)
    if rows.stop <= len(stats.kept):
        stats.kept_sums[rows] = stored_sum_R
        weigh_target(kept_RV, ids_R, stored_sum_R)


def _product(exp_RV: Tensor, weight_VD: Tensor, step: int) -> Tensor:
    """Exponentials times the head, (R, D) float32, summed over GEMMs of `step` columns."""
    total_RD = exp_RV.new_zeros(len(exp_RV), weight_VD.shape[1], dtype=torch.float32)
    for cols in slices(len(weight_VD), step):
        add_matmul(total_RD, exp_RV[:, cols], weight_VD[cols].to(exp_RV.dtype))
    return total_RD


def _weighted_sum(exp_RV: Tensor, values_V: Tensor, step: int) -> Tensor:
    """Exponentials times a float32 value per column, (R,); a high and a low part keep precision.

    A value of -inf counts only in rows where the column has weight, as 0 · (-inf) is NaN.
    """
    lost_V = values_V.isneginf()
    finite_V = values_V.masked_fill(lost_V, 0)
    high_V = finite_V.to(exp_RV.dtype)
    parts = [high_V, finite_V - high_V, lost_V]
    parts_V3 = torch.stack([part_V.to(exp_RV.dtype) for part_V in parts], 1)
    high_R, low_R, lost_R = _product(exp_RV, parts_V3, step).unbind(1)
    return (high_R + low_R).masked_fill_(lost_R > 0, -torch.inf)


def _sweep_rows(heads: Heads) -> int:
    """Rows per pass over the vocabulary; their exponentials take at most half of the workspace."""
    fitting = int(limit() / 2 / _row_bytes(heads))
    return max(ROW_MULTIPLE, min(_SWEEP_ROWS, fitting // ROW_MULTIPLE * ROW_MULTIPLE))


def _row_bytes(heads: Heads) -> int:
    """Bytes of a row's exponentials."""
    return aligned_columns(heads[0].weight.shape[0]) * joint_exp_dtype(heads).itemsize
