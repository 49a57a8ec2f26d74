"""Log-probabilities of target tokens straight from hidden states and the LM head."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd

from fastpref_kernels.checks import (
    check_head,
    check_logit_transform,
    check_target,
    check_target_range,
)
from fastpref_kernels.dispatch import implementation
from fastpref_kernels.head import Head, Targets
from fastpref_kernels.registered import inside_op, needed_like, present, spread
from fastpref_kernels.row_sums import TokenStats


def token_logps(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    logit_softcap: float | None = None,
    ignore_index: int = -100,
) -> Tensor:
    """Log-probability of each target token; logits exist a tile at a time and are recomputed.

        z = cap · tanh(scale · (input @ linear_weightᵀ + linear_bias) / cap)
        logps = z[target] - logsumexp(z)

    Sums are float32 whatever the dtypes, and autocast does not change them. Differentiable once,
    in `input`, `linear_weight` and `linear_bias`; what is frozen allocates no gradient. The same
    inputs give the same bits.

    Args:
        input: Hidden states, (N, D), bfloat16, float16 or float32, any strides; N may be 0.
        linear_weight: LM-head weight, (V, D), the same dtypes, not necessarily input's. Bias
            columns of -inf (a padded vocabulary) have probability 0.
        target: Token ids, (N,) int64 or int32, in [0, V) or `ignore_index`. Checked on the CPU;
            on a GPU an id out of range scores -inf.
        linear_bias: LM-head bias, (V,).
        logit_scale: Multiplies the logits before the softcap, > 0.
        logit_softcap: Bounds the logits by cap · tanh(z / cap), > 0; None for no bound.
        ignore_index: Rows with this target score 0 and get zero gradient, whatever `input` holds
            there; any value, also a valid id.

    Returns:
        logps: (N,) float32, in nats, <= 0.

    Raises:
        ValueError: shapes, dtypes, devices or ranges are not as above, or a DTensor came.
    """
    check_head(input, linear_weight, linear_bias)
    check_logit_transform(logit_scale, logit_softcap)
    check_target(target, input)
    leaves = (input, linear_weight, linear_bias)
    needs_grad = [
        torch.is_grad_enabled() and leaf is not None and leaf.requires_grad for leaf in leaves
    ]
    logps, _, _, _ = fwd_op(*leaves, target, logit_scale, logit_softcap, ignore_index, needs_grad)
    return logps


@custom_op("fastpref::token_logps_v1", mutates_args=())
def fwd_op(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Fields of TokenStats."""
    check_target_range(target, ignore_index, weight.shape[0])
    head = Head(input, weight, bias, scale, softcap)
    impl = implementation("token_logps", input.device)
    with inside_op(input.device):
        mode = impl.choose_mode(head, tuple(needs_grad))
        return tuple(impl.token_logps_fwd(head, Targets.of(target, ignore_index), mode))


@fwd_op.register_fake
def _(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    scale: float,
    softcap: float | None,
    ignore_index: int,
    needs_grad: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    head = Head(input, weight, bias, scale, softcap)
    impl = implementation("token_logps", input.device)
    return tuple(impl.empty_stats(head, impl.choose_mode(head, tuple(needs_grad))))


@custom_op("fastpref::token_logps_bwd_v1", mutates_args=())
def bwd_op(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    stats: list[Tensor],
    scale: float,
    softcap: float | None,
    ignore_index: int,
    mode: str,
    needs_grad: list[bool],
) -> list[Tensor]:
    """Those gradients of input, weight and bias that are needed."""
    head, targets = Head(input, weight, bias, scale, softcap), Targets.of(target, ignore_index)
    impl = implementation("token_logps", input.device)
    with inside_op(input.device):
        gradients = impl.token_logps_bwd(
            grad, head, targets, TokenStats(*stats), mode, tuple(needs_grad)
        )
    return present(gradients)


@bwd_op.register_fake
def _(
    grad: Tensor,
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    stats: list[Tensor],
    scale: float,
    softcap: float | None,
    ignore_index: int,
    mode: str,
    needs_grad: list[bool],
) -> list[Tensor]:
    return needed_like((input, weight, bias), needs_grad)


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    input, weight, bias, target, *options, needs_grad = inputs
    scale, softcap, _ = options
    impl = implementation("token_logps", input.device)
    ctx.mode = impl.choose_mode(Head(input, weight, bias, scale, softcap), tuple(needs_grad))
    ctx.options = options
    ctx.save_for_backward(input, weight, bias, target, *output)
    ctx.mark_non_differentiable(*output[1:])
    ctx.set_materialize_grads(False)


def _differentiate(ctx: Any, grad: Tensor | None, *_: None) -> tuple[Tensor | None, ...]:
    # read once: activation checkpointing recomputes them once
    input, weight, bias, target, *stats = ctx.saved_tensors
    needs_grad = list(ctx.needs_input_grad[:3])
    if grad is None:
        return (None,) * 8
    gradients = bwd_op(grad, input, weight, bias, target, stats, *ctx.options, ctx.mode, needs_grad)
    return (*spread(gradients, needs_grad), *(None,) * 5)


register_autograd("fastpref::token_logps_v1", _differentiate, setup_context=_setup_context)
