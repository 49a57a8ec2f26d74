"""Log-probabilities of target tokens and the KL between two models, from hidden states."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fastpref_kernels.checks import check_head, check_logit_transform, check_target
from fastpref_kernels.dispatch import implementation
from fastpref_kernels.head import Head, Targets
from fastpref_kernels.token_logps_kl_torch import JointStats
from fastpref_kernels.token_logps_torch import TokenStats

DIRECTIONS = ("reference_policy", "policy_reference")


class TokenScores(NamedTuple):
    """What the models say about N tokens, in nats; None for what was not asked of them."""

    logps: Tensor
    """(N,) float32, log-probabilities under the policy."""
    reference_logps: Tensor | None
    """(N,) float32, log-probabilities under the reference; no gradient."""
    kl: Tensor | None
    """(N,) float32, KL of the two next-token distributions."""


# a graph break: the number of tiles follows the shapes, compiled it would be unrolled
@torch.compiler.disable
def token_logps_and_kl(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    reference_input: Tensor,
    reference_linear_weight: Tensor,
    *,
    direction: str = "reference_policy",
    linear_bias: Tensor | None = None,
    reference_linear_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
) -> TokenScores:
    """`token_logps` of policy and reference and the KL between them, from one joint sweep.

    "reference_policy" is KL(reference ‖ policy), the one of TDPO (arXiv:2404.11999, eq. 8);
    "policy_reference" is KL(policy ‖ reference), TIS-DPO's. A column whose probability under the
    first is 0 in float32 adds nothing. Two identical models give log-ratio, KL and the KL's
    gradient of exactly zero.

    Gradients flow to `input`, `linear_weight` and `linear_bias`, never to the reference.

    Args:
        input, linear_weight, target, linear_bias, ignore_index: As in `token_logps`.
        reference_input: The reference's hidden states, (N, D'), D' not necessarily D.
        reference_linear_weight: Its LM-head weight, (V, D'); may be the policy's tensor.
        direction: "reference_policy" or "policy_reference".
        reference_linear_bias: Its LM-head bias, (V,).
        logit_scale, logit_softcap: As in `token_logps`, of both models.

    Returns:
        logps, reference_logps, kl: each (N,) float32; 0 where ignored.

    Raises:
        ValueError: as in `token_logps`, or the models disagree on N or V, or an unknown direction.
    """
    check_head(input, linear_weight, linear_bias)
    check_head(reference_input, reference_linear_weight, reference_linear_bias, prefix="reference_")
    check_logit_transform(logit_scale, logit_softcap)
    check_target(target, ignore_index, input, linear_weight.shape[0])
    _check_models(input, linear_weight, reference_input, reference_linear_weight)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    logps, reference_logps, kl = _TokenLogpsAndKL.apply(
        input,
        linear_weight,
        linear_bias,
        target,
        reference_input,
        reference_linear_weight,
        reference_linear_bias,
        direction,
        logit_scale,
        logit_softcap,
        ignore_index,
    )
    return TokenScores(logps, reference_logps, kl)


class _TokenLogpsAndKL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        reference_input: Tensor,
        reference_weight: Tensor,
        reference_bias: Tensor | None,
        direction: str,
        scale: float,
        softcap: float | None,
        ignore_index: int,
    ) -> tuple[Tensor, Tensor, Tensor]:
        targets = Targets.of(target, ignore_index)
        heads = (
            Head(input, weight, bias, scale, softcap),
            Head(reference_input, reference_weight, reference_bias, scale, softcap),
        )
        impl = implementation("token_logps_kl", input.device)
        with torch.autocast(input.device.type, enabled=False):
            stats = impl.token_logps_kl_fwd(heads, targets, direction)
        ctx.direction, ctx.scale, ctx.softcap = direction, scale, softcap
        ctx.save_for_backward(*heads[0][:3], *heads[1][:3], *targets, *stats)
        ctx.mark_non_differentiable(stats.reference_logps)
        ctx.set_materialize_grads(False)
        return stats.logps, stats.reference_logps, stats.kl

    @staticmethod
    @once_differentiable
    def backward(
        ctx: Any, grad_logps: Tensor | None, _: Tensor | None, grad_kl: Tensor | None
    ) -> tuple[Tensor | None, ...]:
        # read once: activation checkpointing recomputes them once
        saved = ctx.saved_tensors
        input, weight, bias, *of_reference = saved[:6]
        reference_input, reference_weight, reference_bias = of_reference
        policy = Head(input, weight, bias, ctx.scale, ctx.softcap)
        reference = Head(reference_input, reference_weight, reference_bias, ctx.scale, ctx.softcap)
        targets, stats = Targets(*saved[6:8]), JointStats(*saved[8:])
        needs_grad, device = ctx.needs_input_grad[:3], targets.ids.device
        with torch.autocast(device.type, enabled=False):
            if grad_kl is None:
                # the KL was only looked at: the reference's logits are not needed again
                gradients = implementation("token_logps", device).token_logps_bwd(
                    grad_logps, policy, targets, TokenStats(stats.logps, stats.lse), needs_grad
                )
            else:
                if grad_logps is None:
                    grad_logps = torch.zeros_like(grad_kl)
                gradients = implementation("token_logps_kl", device).token_logps_kl_bwd(
                    (grad_logps, grad_kl),
                    (policy, reference),
                    targets,
                    stats,
                    direction=ctx.direction,
                    needs_grad=needs_grad,
                )
        return (*gradients, *(None,) * 8)


def _check_models(
    input: Tensor, weight: Tensor, reference_input: Tensor, reference_weight: Tensor
) -> None:
    """Policy and reference share N, V and the device."""
    if reference_input.device != input.device:
        raise ValueError(
            f"reference_input must be on input's {input.device}, got {reference_input.device}"
        )
    if reference_input.shape[0] != input.shape[0]:
        raise ValueError(
            f"reference_input must have input's {input.shape[0]} rows, "
            f"got {tuple(reference_input.shape)}"
        )
    if reference_weight.shape[0] != weight.shape[0]:
        raise ValueError(
            f"reference_linear_weight must have linear_weight's vocabulary of {weight.shape[0]}, "
            f"got {tuple(reference_weight.shape)}"
        )
