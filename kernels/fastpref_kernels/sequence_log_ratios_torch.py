"""Portable `sequence_log_ratios` in plain torch: sorts tokens by sequence, then sums segments."""

import torch
from torch import Tensor


def sequence_log_ratios_fwd(
    logps: Tensor, reference_logps: Tensor, weights: Tensor | None, ids: Tensor, num_sequences: int
) -> Tensor:
    """Sum of each sequence, (S,) float32; N >= 1 and S >= 1."""
    log_ratios_N = logps.double() - reference_logps.double()
    if weights is not None:
        log_ratios_N *= weights
    sorted_ids_N, order_N = ids.sort(stable=True)
    bounds = torch.arange(num_sequences + 1, device=ids.device, dtype=ids.dtype)
    offsets = torch.searchsorted(sorted_ids_N, bounds)
    # unsafe: skip the check of the offsets, which would synchronize with the device
    sums_S = torch.segment_reduce(log_ratios_N[order_N], "sum", offsets=offsets, unsafe=True)
    return sums_S.float()


def sequence_log_ratios_bwd(
    grad: Tensor, weights: Tensor | None, ids: Tensor, dtype: torch.dtype
) -> Tensor:
    """Gradient of the log-probabilities, (N,) of `dtype`; 0 for an id outside of [0, S)."""
    last = len(grad) - 1
    grad_N = grad[ids.clamp(0, last)].where((ids >= 0) & (ids <= last), 0)
    return (grad_N if weights is None else grad_N * weights).to(dtype)
