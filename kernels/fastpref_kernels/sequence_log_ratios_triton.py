"""Triton launchers of `sequence_log_ratios`: one kernel forward, one backward."""

import torch
import triton
from torch import Tensor

from fastpref_kernels import sequence_log_ratios_kernels as kernels
from fastpref_kernels import sequence_log_ratios_torch as portable
from fastpref_kernels.launch import COMPILE

_BLOCK_N = 1024
_MOST_READS = 2**30
"""Sequences times tokens above which sorting the tokens first is cheaper."""


def sequence_log_ratios_fwd(
    logps: Tensor, reference_logps: Tensor, weights: Tensor | None, ids: Tensor, num_sequences: int
) -> Tensor:
    """Sum of each sequence, (S,) float32; N >= 1 and S >= 1."""
    N = len(logps)
    if N * num_sequences > _MOST_READS:
        arguments = (logps, reference_logps, weights, ids, num_sequences)
        return portable.sequence_log_ratios_fwd(*arguments)
    sums_S = logps.new_empty(num_sequences, dtype=torch.float32)
    kernels._sum_kernel[(num_sequences,)](
        logps,
        reference_logps,
        weights,
        ids,
        sums_S,
        stride_logps=logps.stride(0),
        stride_reference=reference_logps.stride(0),
        stride_weights=0 if weights is None else weights.stride(0),
        stride_ids=ids.stride(0),
        N=N,
        # a power of two limits the number of compiled kernels
        NUM_BLOCKS=triton.next_power_of_2(triton.cdiv(N, _BLOCK_N)),
        BLOCK_N=_BLOCK_N,
        HAS_WEIGHTS=weights is not None,
        **COMPILE,
    )
    return sums_S


def sequence_log_ratios_bwd(
    grad: Tensor, weights: Tensor | None, ids: Tensor, dtype: torch.dtype
) -> Tensor:
    """Gradient of the log-probabilities, (N,) of `dtype`; 0 for an id outside of [0, S)."""
    N = len(ids)
    grad_N = grad.new_empty(N, dtype=dtype)
    kernels._spread_kernel[(triton.cdiv(N, _BLOCK_N),)](
        grad,
        weights,
        ids,
        grad_N,
        stride_grad=grad.stride(0),
        stride_weights=0 if weights is None else weights.stride(0),
        stride_ids=ids.stride(0),
        N=N,
        S=len(grad),
        BLOCK_N=_BLOCK_N,
        HAS_WEIGHTS=weights is not None,
        **COMPILE,
    )
    return grad_N
