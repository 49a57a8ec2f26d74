"""Log-probabilities of target tokens and the KL between two models, from hidden states."""

from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd

from fastpref_kernels.checks import (
    check_head,
    check_logit_transform,
    check_models,
    check_target,
    check_target_range,
)
from fastpref_kernels.dispatch import implementation
from fastpref_kernels.head import Targets, heads_of
from fastpref_kernels.registered import inside_op, needed_like, present, spread
from fastpref_kernels.row_sums import JointStats
from fastpref_kernels.token_logps import bwd_op as token_logps_bwd_op

DIRECTIONS = ("reference_policy", "policy_reference")


class TokenScores(NamedTuple):
    """What the models say about N tokens, in nats; None for what was not asked of them."""

    logps: Tensor
    """(N,) float32, log-probabilities under the policy."""
    reference_logps: Tensor | None
    """(N,) float32, log-probabilities under the reference; no gradient."""
    kl: Tensor | None
    """(N,) float32, KL of the two next-token distributions."""


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
    check_target(target, input)
    check_models(input, linear_weight, reference_input, reference_linear_weight)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    leaves = (input, linear_weight, linear_bias)
    needs_grad = [
        torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves
    ]
    stats = fwd_op(
        *leaves,
        reference_input.detach(),
        reference_linear_weight.detach(),
        None if reference_linear_bias is None else reference_linear_bias.detach(),
        target,
        direction,
        logit_scale,
        logit_softcap,
        ignore_index,
        needs_grad,
    )
    logps, _, reference_logps, _, kl, _, _ = stats
    return TokenScores(logps, reference_logps, kl)


@custom_op("fastpref::token_logps_kl_v1", mutates_args=())
def fwd_op(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_input: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    target: Tensor,
    direction: str,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fields of JointStats."""
    check_target_range(target, ignore_index, weight.shape[0])
    of_models = (input, weight, bias, reference_input, reference_weight, reference_bias)
    heads, targets = heads_of(of_models, scale, softcap), Targets.of(target, ignore_index)
    impl = implementation("token_logps_kl", input.device)
    with inside_op(input.device):
        mode = impl.choose_mode(heads, tuple(needs_grad))
        return tuple(impl.token_logps_kl_fwd(heads, targets, direction, mode))


@fwd_op.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_input: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    target: Tensor,
    direction: str,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_models = (input, weight, bias, reference_input, reference_weight, reference_bias)
    heads = heads_of(of_models, scale, softcap)
    impl = implementation("token_logps_kl", input.device)
    return tuple(impl.empty_stats(heads, impl.choose_mode(heads, tuple(needs_grad))))


@custom_op("fastpref::token_logps_kl_bwd_v1", mutates_args=())
def bwd_op(
    grad_logps: Tensor,
    grad_kl: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_input: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    target: Tensor,
    stats: list[Tensor],
    direction: str,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    mode: str,
    needs_grad: list[bool],
) -> list[Tensor]:
    """Those gradients of input, weight and bias that are needed."""
    of_models = (input, weight, bias, reference_input, reference_weight, reference_bias)
    impl = implementation("token_logps_kl", input.device)
    with inside_op(input.device):
        gradients = impl.token_logps_kl_bwd(
            (grad_logps, grad_kl),
            heads_of(of_models, scale, softcap),
            Targets.of(target, ignore_index),
            JointStats(*stats),
            direction=direction,
            mode=mode,
            needs_grad=tuple(needs_grad),
        )
    return present(gradients)


@bwd_op.register_fake
def _(
    grad_logps: Tensor,
    grad_kl: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    *arguments: Any,
) -> list[Tensor]:
    return needed_like((input, weight, bias), arguments[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    of_models, target = inputs[:6], inputs[6]
    *ctx.options, needs_grad = inputs[7:]
    _, scale, softcap, _ = ctx.options
    impl = implementation("token_logps_kl", target.device)
    ctx.mode = impl.choose_mode(heads_of(of_models, scale, softcap), tuple(needs_grad))
    ctx.save_for_backward(*of_models, target, *output)
    stats = JointStats(*output)
    ctx.mark_non_differentiable(
        *(tensor for tensor in stats if tensor is not stats.logps and tensor is not stats.kl)
    )
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
    # read once: activation checkpointing recomputes them once
    saved = ctx.saved_tensors
    leaves, target, stats = saved[:3], saved[6], JointStats(*saved[7:])
    needs_grad, options = list(ctx.needs_input_grad[:3]), ctx.options
    grad_logps, grad_kl = grads[0], grads[4]
    if grad_kl is None:
        if grad_logps is None:
            return (None,) * 12
        # the KL was only looked at: the reference's logits are not needed again
        nothing = (grad_logps.new_empty(0), grad_logps.new_empty(0))
        of_policy = [stats.logps, stats.lse, *nothing]
        gradients = token_logps_bwd_op(
            grad_logps, *leaves, target, of_policy, *options[1:], "lean", needs_grad
        )
    else:
        if grad_logps is None:
            grad_logps = torch.zeros_like(grad_kl)
        gradients = bwd_op(
            grad_logps, grad_kl, *saved[:7], list(stats), *options, ctx.mode, needs_grad
        )
    return (*spread(gradients, needs_grad), *(None,) * 9)


register_autograd("fastpref::token_logps_kl_v1", _differentiate, setup_context=_setup_context)
