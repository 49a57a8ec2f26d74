"""Weighted log-ratios of policy and reference, summed over the tokens of each sequence."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd

from fastpref_kernels.checks import (
    INDEX_DTYPES,
    INPUT_DTYPES,
    check_range,
    check_tensor,
    check_whole,
    refuse_transforms,
)
from fastpref_kernels.dispatch import implementation
from fastpref_kernels.registered import differentiable_once, inside_op


def sequence_log_ratios(
    logps: Tensor,
    reference_logps: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    token_weights: Tensor | None = None,
) -> Tensor:
    """Sum over each sequence's tokens of w · (log p - log p_ref), without atomics.

    Differences are taken per token and summed in float64, so that no digits cancel between two
    close models and token order has no effect. Gradients flow to `logps` only. On a GPU the
    forward and the backward are one kernel launch each.

    Args:
        logps: Token log-probabilities under the policy, (N,), in nats.
        reference_logps: The same under the reference, (N,).
        sequence_ids: Sequence of each token, (N,) int64 or int32 in [0, num_sequences), in any
            order. Checked on the CPU only: on a GPU tokens with an id out of range are skipped.
        num_sequences: S >= 0; the sum of a sequence without tokens is 0.
        token_weights: w, (N,), without gradient; None for 1 everywhere.

    Returns:
        log_ratios: (S,) float32, in nats.

    Raises:
        ValueError: a shape, dtype, device or range is not as above.
    """
    _check(logps, reference_logps, sequence_ids, num_sequences, token_weights)
    if logps.requires_grad:
        refuse_transforms("sequence_log_ratios")
    weights = None if token_weights is None else token_weights.detach()
    return fwd_op(
        logps, reference_logps.detach(), weights, sequence_ids, num_sequences=num_sequences
    )


@custom_op("fastpref::sequence_log_ratios_v3", mutates_args=())
def fwd_op(
    logps: Tensor,
    reference_logps: Tensor,
    weights: Tensor | None,
    ids: Tensor,
    *,
    num_sequences: int,
) -> Tensor:
    """Sum of each sequence, (S,) float32."""
    check_range("sequence_ids", ids, num_sequences)
    if not logps.numel() or not num_sequences:
        return logps.new_zeros(num_sequences, dtype=torch.float32)
    impl = implementation("sequence_log_ratios", logps.device)
    with inside_op(logps.device):
        return impl.sequence_log_ratios_fwd(logps, reference_logps, weights, ids, num_sequences)


@fwd_op.register_fake
def _(
    logps: Tensor,
    reference_logps: Tensor,
    weights: Tensor | None,
    ids: Tensor,
    *,
    num_sequences: int,
) -> Tensor:
    return logps.new_empty(num_sequences, dtype=torch.float32)


@custom_op("fastpref::sequence_log_ratios_bwd_v2", mutates_args=())
def bwd_op(grad: Tensor, weights: Tensor | None, ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Gradient of the log-probabilities, of `dtype`: token weight times sequence gradient."""
    if not ids.numel():
        return grad.new_empty(0, dtype=dtype)
    impl = implementation("sequence_log_ratios", grad.device)
    with inside_op(grad.device):
        return impl.sequence_log_ratios_bwd(grad, weights, ids, dtype)


@bwd_op.register_fake
def _(grad: Tensor, weights: Tensor | None, ids: Tensor, dtype: torch.dtype) -> Tensor:
    return grad.new_empty(ids.shape, dtype=dtype)


def _setup_context(
    ctx: Any, inputs: tuple[Any, ...], keyword_only_inputs: dict[str, Any], output: Tensor
) -> None:
    logps, _, weights, ids = inputs
    ctx.dtype = logps.dtype
    ctx.save_for_backward(weights, ids)


def _differentiate(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
    return bwd_op(grad, *ctx.saved_tensors, ctx.dtype), None, None, None


register_autograd("fastpref::sequence_log_ratios_v3", _differentiate, setup_context=_setup_context)
differentiable_once("fastpref::sequence_log_ratios_bwd_v2", lambda _: "sequence_log_ratios")


def _check(
    logps: Tensor,
    reference_logps: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    token_weights: Tensor | None,
) -> None:
    check_whole("num_sequences", num_sequences, low=0)
    check_tensor("logps", logps, INPUT_DTYPES, device=None)
    check_tensor("sequence_ids", sequence_ids, INDEX_DTYPES, device=logps.device)
    values = {"reference_logps": reference_logps}
    if token_weights is not None:
        values["token_weights"] = token_weights
    for name, tensor in values.items():
        check_tensor(name, tensor, INPUT_DTYPES, device=logps.device)
    for name, tensor in (values | {"logps": logps, "sequence_ids": sequence_ids}).items():
        if tensor.dim() != 1 or tensor.shape != logps.shape:
            raise ValueError(f"{name} must be (N,) like logps, got {tuple(tensor.shape)}")
