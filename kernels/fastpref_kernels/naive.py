"""Every op in plain torch with full logits: its definition and, in float64, the test oracle.

Arguments as in the ops, but unchecked. Computes and returns float32, or float64 for float64 inputs;
differentiable any number of times.
"""

import torch
from torch import Tensor
from torch.nn import functional as F

from fastpref_kernels.token_logps_kl import TokenScores


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
    """log softmax(z)[target] with z = cap · tanh(scale · (input @ linear_weightᵀ + bias) / cap).

    Computed as log p_y = -softplus(log Σ_{j≠y} exp(z_j) - z_y), which stays accurate as p_y -> 1.

    Args:
        As in `fastpref_kernels.token_logps`; float64 is allowed too.

    Returns:
        logps: (N,), 0 for ignored rows.
    """
    ignored_N = target.long() == ignore_index
    logits_NV = _logits(input, linear_weight, linear_bias, logit_scale, logit_softcap, ignored_N)
    return _target_logps(logits_NV, target, ignored_N)


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
    """Both models' log-probabilities and KL = Σ p · (log p - log q) over tokens with p > 0.

    p is the reference and q the policy for direction "reference_policy"; the reverse for
    "policy_reference".

    Args:
        As in `fastpref_kernels.token_logps_and_kl`; float64 is allowed too.

    Returns:
        logps, reference_logps, kl: each (N,), 0 for ignored rows.
    """
    ignored_N = target.long() == ignore_index
    transform = (logit_scale, logit_softcap, ignored_N)
    logits_NV = _logits(input, linear_weight, linear_bias, *transform)
    with torch.no_grad():
        reference_logits_NV = _logits(
            reference_input, reference_linear_weight, reference_linear_bias, *transform
        )
    policy_NV, reference_NV = logits_NV.log_softmax(-1), reference_logits_NV.log_softmax(-1)
    under_reference = direction == "reference_policy"
    log_p_NV, log_q_NV = (reference_NV, policy_NV) if under_reference else (policy_NV, reference_NV)
    p_NV = log_p_NV.exp()
    log_ratios_NV = (log_p_NV - log_q_NV).masked_fill(p_NV == 0, 0)
    return TokenScores(
        _target_logps(logits_NV, target, ignored_N),
        _target_logps(reference_logits_NV, target, ignored_N),
        (p_NV * log_ratios_NV).sum(-1).masked_fill(ignored_N, 0),
    )


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
    """log p_y - log q_y + KL(q ‖ p) of policy p and reference q, with both softmaxes computed.

    Args:
        As in `fastpref_kernels.tdpo1_token_values`; float64 is allowed too.

    Returns:
        values: (N,), 0 for ignored rows.
    """
    logps_N, reference_logps_N, kl_N = token_logps_and_kl(
        input,
        linear_weight,
        target,
        reference_input,
        reference_linear_weight,
        linear_bias=linear_bias,
        reference_linear_bias=reference_linear_bias,
        logit_scale=logit_scale,
        ignore_index=ignore_index,
    )
    assert reference_logps_N is not None and kl_N is not None
    return logps_N - reference_logps_N + kl_N


def sequence_log_ratios(
    logps: Tensor,
    reference_logps: Tensor,
    sequence_ids: Tensor,
    num_sequences: int,
    *,
    token_weights: Tensor | None = None,
) -> Tensor:
    """Σ w · (log p - log p_ref) over the tokens of each sequence, one sequence at a time.

    Args:
        As in `fastpref_kernels.sequence_log_ratios`; float64 is allowed too.

    Returns:
        log_ratios: (S,).
    """
    log_ratios_N = _upcast(logps) - _upcast(reference_logps.detach())
    if token_weights is not None:
        log_ratios_N = log_ratios_N * _upcast(token_weights.detach())
    sums = [log_ratios_N[sequence_ids == i].sum() for i in range(num_sequences)]
    return torch.stack(sums) if sums else log_ratios_N.new_zeros(0)


def _logits(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    ignored_N: Tensor,
) -> Tensor:
    # ignored rows may hold NaN
    hidden_ND = _upcast(input).masked_fill(ignored_N[:, None], 0)
    logits_NV = scale * F.linear(
        hidden_ND, _upcast(weight), None if bias is None else _upcast(bias)
    )
    return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


def _target_logps(logits_NV: Tensor, target: Tensor, ignored_N: Tensor) -> Tensor:
    index_N1 = target.masked_fill(ignored_N, 0).long()[:, None]
    target_logit_N = logits_NV.gather(1, index_N1)[:, 0]
    lse_others_N = logits_NV.scatter(1, index_N1, float("-inf")).logsumexp(1)
    # above the threshold softplus(x) is returned as x; from 40 on that is exact in float64 too
    logps_N = -F.softplus(lse_others_N - target_logit_N, threshold=40)
    return logps_N.masked_fill(ignored_N, 0)


def _upcast(tensor: Tensor) -> Tensor:
    """Convert to float32; float64 is kept."""
    return tensor if tensor.dtype == torch.float64 else tensor.float()
