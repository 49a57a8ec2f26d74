"""Portable `token_logps_and_kl` in plain torch, both models' logits of one tile at a time."""

import torch
from torch import Tensor

from fastpref_kernels.head import (
    Gradients,
    Heads,
    NeedsGrad,
    Targets,
    head_gradients,
    kl_target_gradients,
    logit_gradients,
    put_target,
    take_target,
)
from fastpref_kernels.row_sums import JointStats, JointSums, RowSums, base_gap, log_softmax_
from fastpref_kernels.workspace import slices, tile_shape


def choose_mode(heads: Heads, needs_grad: NeedsGrad) -> str:
    """Always "lean": the backward recomputes both models' logits."""
    return "lean"


def empty_stats(heads: Heads, mode: str) -> JointStats:
    """Uninitialised results of the forward."""
    input = heads[0].input
    return JointStats.empty(input, kept=input.new_empty(0), kept_scales=input.new_empty(0))


def token_logps_kl_fwd(heads: Heads, targets: Targets, direction: str, mode: str) -> JointStats:
    """Both models' target log-probabilities and their KL, from one pass over the vocabulary.

    Args:
        heads: Policy and reference: hidden states (N, D), (N, D') and weights (V, D), (V, D').
        targets: Target ids of the N rows.
        direction: "reference_policy" for KL(reference ‖ policy) or "policy_reference".
    """
    N = len(targets.ids)
    tile_rows, tile_cols = _tile_shape(heads)
    stats = empty_stats(heads, mode)
    for rows in slices(N, tile_rows):
        sums = _sweep(heads, targets, rows, tile_cols, direction)
        for total_N, part_R in zip(stats[:5], sums.results, strict=True):
            total_N[rows] = part_R
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
    """Gradients of the policy's input, weight and bias, from recomputed logits.

        reference_policy: dz = g_l · (e_y - p) + g_k · (p - q)
        policy_reference: dz = g_l · (e_y - p) + g_k · p · (log p - log q - KL)

    Args:
        grads: (N,) upstream gradients g_l of the log-probabilities and g_k of the KL, any strides.
        heads, targets, direction: As in the forward.
        stats, mode: Result and mode of the forward.
        needs_grad: Which of input, weight and bias require a gradient; the others get None.
    """
    policy, reference = heads
    (grad_logps_N, grad_kl_N), unit = logit_gradients(policy, targets, *grads)
    under_reference = direction == "reference_policy"
    target_grad_N = kl_target_gradients(stats, grad_logps_N, grad_kl_N, direction)

    def dlogits(rows: slice, cols: slice, hidden_RD: Tensor, head_CD: Tensor) -> Tensor:
        R = rows.stop - rows.start
        logps_RC = policy.logits(hidden_RD, head_CD, cols)[:R]
        slope_RC = policy.softcap_slope(logps_RC)
        reference_RD = reference.input_tile(rows, targets.ignored)
        reference_RC = reference.logits(reference_RD, reference.weight_tile(cols), cols)[:R]
        log_softmax_(logps_RC, stats.lse[rows])
        log_softmax_(reference_RC, stats.reference_lse[rows])
        gradient = _kl_gradient_under_reference if under_reference else _kl_gradient_under_policy
        dlogits_RC = gradient(
            logps_RC, reference_RC, grad_logps_N[rows], grad_kl_N[rows], stats.kl[rows]
        )
        put_target(dlogits_RC, targets.ids[rows], cols, target_grad_N[rows])
        return dlogits_RC if slope_RC is None else dlogits_RC.mul_(slope_RC)

    return head_gradients(
        policy,
        needs_grad,
        _tile_shape(heads),
        lambda rows: policy.input_tile(rows, targets.ignored),
        dlogits,
        unit=unit,
    )


def _sweep(
    heads: Heads, targets: Targets, rows: slice, tile_cols: int, direction: str
) -> JointSums:
    """Sums of R rows, from one pass over the vocabulary."""
    R, device = rows.stop - rows.start, targets.ids.device
    under_reference = direction == "reference_policy"
    first = int(under_reference)
    hidden = [head.input_tile(rows, targets.ignored) for head in heads]
    models = (RowSums.empty(R, device), RowSums.empty(R, device))
    target_logits = [
        head.target_logits(hidden_RD[:R], targets.ids[rows])
        for head, hidden_RD in zip(heads, hidden, strict=True)
    ]
    base_gap_R = base_gap(target_logits[first], target_logits[1 - first])
    gap_R = torch.zeros_like(base_gap_R)
    for cols in slices(heads[0].weight.shape[0], tile_cols):
        logits = [
            head.logits(hidden_RD, head.weight_tile(cols), cols)[:R]
            for head, hidden_RD in zip(heads, hidden, strict=True)
        ]
        models, gap_R = _add_columns(
            models, gap_R, logits, base_gap_R, targets.ids[rows], cols, first=first
        )
    policy, reference = models
    return JointSums(RowSums.of_both(policy, reference), gap_R, base_gap_R, under_reference)


def _add_columns(
    models: tuple[RowSums, RowSums],
    gap_R: Tensor,
    logits: list[Tensor],
    base_gap_R: Tensor,
    target_R: Tensor,
    cols: slice,
    *,
    first: int,
) -> tuple[tuple[RowSums, RowSums], Tensor]:
    """Add a tile's columns to the sums of both models and to the gap under model `first`."""
    target_logits = [take_target(logits_RC, target_R, cols) for logits_RC in logits]
    # z - z' first: the difference of two close floats is exact
    gap_RC = (logits[first] - logits[1 - first]).sub_(base_gap_R[:, None])
    policy, reference = (
        sums.add(logits_RC, target_logit_R)
        for sums, logits_RC, target_logit_R in zip(models, logits, target_logits, strict=True)
    )
    # a column of -inf has weight 0 and a gap that may be NaN
    gap_RC.masked_fill_(logits[first] == 0, 0)
    rescale_R = (models[first].max - (policy, reference)[first].max).exp()
    return (policy, reference), gap_R * rescale_R + gap_RC.mul_(logits[first]).sum(1)


def _tile_shape(heads: Heads) -> tuple[int, int]:
    V, hidden = heads[0].weight.shape[0], max(head.weight.shape[1] for head in heads)
    return tile_shape(V, hidden, heads[0].weight.device)


def _kl_gradient_under_reference(
    logps_RC: Tensor, reference_RC: Tensor, grad_logps_R: Tensor, grad_kl_R: Tensor, _: Tensor
) -> Tensor:
    """g_k · (p - q) - g_l · p, in place; p - q is computed first, so that equal models give 0."""
    p_RC, q_RC = logps_RC.exp_(), reference_RC.exp_()
    dlogits_RC = torch.sub(p_RC, q_RC, out=q_RC).mul_(grad_kl_R[:, None])
    return dlogits_RC.sub_(p_RC.mul_(grad_logps_R[:, None]))


def _kl_gradient_under_policy(
    logps_RC: Tensor, reference_RC: Tensor, grad_logps_R: Tensor, grad_kl_R: Tensor, kl_R: Tensor
) -> Tensor:
    """p · (g_k · (log p - log q - KL) - g_l), in place."""
    dlogits_RC = torch.sub(logps_RC, reference_RC, out=reference_RC)
    dlogits_RC.sub_(kl_R[:, None]).mul_(grad_kl_R[:, None]).sub_(grad_logps_R[:, None])
    p_RC = logps_RC.exp_()
    # where p is 0, log p - log q may be infinite or NaN
    return dlogits_RC.masked_fill_(p_RC == 0, 0).mul_(p_RC)
