"""Weighted log-ratios of policy and reference, summed over the tokens of each sequence."""

from typing import Any

import torch
from torch import Tensor
from torch.library import custom_op, register_autograd

from fastpref_kernels.checks import INDEX_DTYPES, INPUT_DTYPES, check_range, check_tensor


def sequence_log_ratios(
    logps: Tensor,
    reference_logps: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    token_weights: Tensor | None = None,
) -> Tensor:
    """Sum over each sequence's tokens of w · (log p - log p_ref), without atomics.

    Tokens are subtracted one by one and summed in float64, so two close models never round apart
    and the order of the tokens does not show. Gradients flow to `logps` only.

    Args:
        logps: Token log-probabilities under the policy, (N,), in nats.
        reference_logps: The same under the reference, (N,).
        sequence_ids: The sequence of each token, (N,) int64 or int32 in [0, num_sequences), in any
            order; checked on the CPU.
        num_sequences: S >= 0; a sequence without tokens sums to 0.
        token_weights: w, (N,); None weighs every token 1.

    Returns:
        log_ratios: (S,) float32, in nats.

    Raises:
        ValueError: shapes, dtypes, devices or ranges are not as above.
    """
    _check(logps, reference_logps, sequence_ids, num_sequences, token_weights)
    log_ratios_N = logps.double() - reference_logps.detach().double()
    if token_weights is not None:
        log_ratios_N = log_ratios_N * token_weights.detach()
    return _segment_sum(log_ratios_N, sequence_ids, num_sequences).float()


@custom_op("fastpref::segment_sum_v1", mutates_args=())
def _segment_sum(values: Tensor, ids: Tensor, num_segments: int) -> Tensor:
    """Sums of the elements with equal ids, (S,): sorted, then one segment after another."""
    check_range("sequence_ids", ids, num_segments)
    if not values.numel() or not num_segments:
        return values.new_zeros(num_segments)
    sorted_ids_N, order_N = ids.sort(stable=True)
    bounds = torch.arange(num_segments + 1, device=ids.device, dtype=ids.dtype)
    offsets = torch.searchsorted(sorted_ids_N, bounds)
    # unsafe: the check of the offsets would wait for the device
    return torch.segment_reduce(values[order_N], "sum", offsets=offsets, unsafe=True)


@_segment_sum.register_fake
def _(values: Tensor, ids: Tensor, num_segments: int) -> Tensor:
    return values.new_empty(num_segments)


def _save_ids(ctx: Any, inputs: tuple[Tensor, Tensor, int], output: Tensor) -> None:
    ctx.save_for_backward(inputs[1])


def _gather(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    (ids,) = ctx.saved_tensors
    return grad[ids], None, None


register_autograd("fastpref::segment_sum_v1", _gather, setup_context=_save_ids)


def _check(
    logps: Tensor,
    reference_logps: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    token_weights: Tensor | None,
) -> None:
    if num_sequences < 0:
        raise ValueError(f"num_sequences must be >= 0, got {num_sequences}")
    check_tensor("sequence_ids", sequence_ids, INDEX_DTYPES, device=logps.device)
    values = {"logps": logps, "reference_logps": reference_logps, "token_weights": token_weights}
    for name, tensor in values.items():
        if tensor is not None:
            check_tensor(name, tensor, INPUT_DTYPES, device=logps.device)
    for name, tensor in (values | {"sequence_ids": sequence_ids}).items():
        if tensor is not None and (tensor.dim() != 1 or tensor.shape != logps.shape):
            raise ValueError(f"{name} must be (N,) like logps, got {tuple(tensor.shape)}")
