"""What TDPO1 sums over a response, from hidden states, without the policy's softmax."""

from typing import Any

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
from fastpref_kernels.row_sums import ValueStats


def tdpo1_token_values(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    reference_input: Tensor,
    reference_linear_weight: Tensor,
    *,
    linear_bias: Tensor | None = None,
    reference_linear_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = -100,
) -> Tensor:
    """Log-ratio plus KL of each token, TDPO1's share of a token in its margin.

        v = log p_y - log q_y + KL(q ‖ p)            (arXiv:2404.11999, eq. 13 and 15)
          = (z_y - z'_y) - Σ_j q_j (z_j - z'_j)      the policy's log-sum-exp cancels
        dv/dz = e_y - q

    with policy p = softmax(z) and reference q = softmax(z'). The policy's logits are needed at the
    target and in their mean under q, which is linear in the hidden states: h · Σ_j q_j W_j. So the
    vocabulary is swept for the reference only. If both models use one head, h - h' takes the place
    of the logits, and two equal models give exactly 0. A softcap is not linear: there
    `token_logps_and_kl` is the way.

    Gradients flow to `input`, `linear_weight` and `linear_bias`, never to the reference.

    Args:
        input, linear_weight, target, linear_bias, ignore_index: As in `token_logps`.
        reference_input: The reference's hidden states, (N, D'), D' not necessarily D.
        reference_linear_weight: Its LM-head weight, (V, D'); may be the policy's tensor.
        reference_linear_bias: Its LM-head bias, (V,).
        logit_scale: Multiplies both models' logits, > 0.

    Returns:
        values: (N,) float32, in nats; 0 where ignored.

    Raises:
        ValueError: as in `token_logps`, or the models disagree on N or V.
    """
    check_head(input, linear_weight, linear_bias)
    check_head(reference_input, reference_linear_weight, reference_linear_bias, prefix="reference_")
    check_logit_transform(logit_scale, None)
    check_target(target, input)
    check_models(input, linear_weight, reference_input, reference_linear_weight)
    leaves = (input, linear_weight, linear_bias)
    needs_grad = [
        torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves
    ]
    values, *_ = fwd_op(
        *leaves,
        reference_input.detach(),
        reference_linear_weight.detach(),
        None if reference_linear_bias is None else reference_linear_bias.detach(),
        target,
        logit_scale,
        ignore_index,
        needs_grad,
    )
    return values


@custom_op("fastpref::tdpo1_token_values_v1", mutates_args=())
def fwd_op(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_input: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    target: Tensor,
    scale: float,
    ignore_index: int,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Fields of ValueStats."""
    check_target_range(target, ignore_index, weight.shape[0])
    of_models = (input, weight, bias, reference_input, reference_weight, reference_bias)
    heads = heads_of(of_models, scale, None)
    impl = implementation("tdpo1_token_values", input.device)
    with inside_op(input.device):
        mode = impl.choose_mode(heads, tuple(needs_grad))
        targets = Targets.of(target, ignore_index)
        return tuple(impl.tdpo1_token_values_fwd(heads, targets, mode))


@fwd_op.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_input: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    target: Tensor,
    scale: float,
    ignore_index: int,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    of_models = (input, weight, bias, reference_input, reference_weight, reference_bias)
    heads = heads_of(of_models, scale, None)
    impl = implementation("tdpo1_token_values", input.device)
    mode = impl.choose_mode(heads, tuple(needs_grad))
    return tuple(impl.empty_stats(heads, mode))


@custom_op("fastpref::tdpo1_token_values_bwd_v1", mutates_args=())
def bwd_op(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    reference_input: Tensor,
    reference_weight: Tensor,
    reference_bias: Tensor | None,
    target: Tensor,
    stats: list[Tensor],
    scale: float,
    ignore_index: int,
    mode: str,
    needs_grad: list[bool],
) -> list[Tensor]:
    """Those gradients of input, weight and bias that are needed."""
    of_models = (input, weight, bias, reference_input, reference_weight, reference_bias)
    heads = heads_of(of_models, scale, None)
    impl = implementation("tdpo1_token_values", input.device)
    with inside_op(input.device):
        gradients = impl.tdpo1_token_values_bwd(
            grad,
            heads,
            Targets.of(target, ignore_index),
            ValueStats(*stats),
            mode=mode,
            needs_grad=tuple(needs_grad),
        )
    return present(gradients)


@bwd_op.register_fake
def _(
    grad: Tensor, input: Tensor, weight: Tensor, bias: Tensor | None, *arguments: Any
) -> list[Tensor]:
    return needed_like((input, weight, bias), arguments[-1])


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    scale, ignore_index, needs_grad = inputs[7:]
    heads = heads_of(inputs[:6], scale, None)
    impl = implementation("tdpo1_token_values", inputs[0].device)
    ctx.mode = impl.choose_mode(heads, tuple(needs_grad))
    ctx.options = (scale, ignore_index)
    ctx.save_for_backward(*inputs[:7], *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    # read once: activation checkpointing recomputes them once
    saved = ctx.saved_tensors
    needs_grad = list(ctx.needs_input_grad[:3])
    if grad is None:
        return (None,) * 10
    gradients = bwd_op(grad, *saved[:7], saved[7:], *ctx.options, ctx.mode, needs_grad)
    return (*spread(gradients, needs_grad), *(None,) * 7)


register_autograd("fastpref::tdpo1_token_values_v1", _differentiate, setup_context=_setup_context)
