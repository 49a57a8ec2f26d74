"""Log-probabilities of target tokens and the KL between two models, from hidden states."""

from typing import NamedTuple

from torch import Tensor

from fastpref_kernels.checks import (
    check_head,
    check_logit_transform,
    check_models,
    check_target,
)
from fastpref_kernels.head import Head
from fastpref_kernels.registered import sweep_heads

DIRECTIONS = ("reference_policy", "policy_reference")


class TokenScores(NamedTuple):
    """Scores of N target tokens, in nats; None for those that were not computed."""

    logps: Tensor
    """(N,) float32, log-probabilities under the policy."""
    reference_logps: Tensor | None
    """(N,) float32, log-probabilities under the reference; no gradient."""
    kl: Tensor | None
    """(N,) float32, KL between the two next-token distributions."""


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
    """`token_logps` of policy and reference, and their KL, from one pass over the vocabulary.

    "reference_policy" is KL(reference ‖ policy), used by TDPO (arXiv:2404.11999, eq. 8);
    "policy_reference" is KL(policy ‖ reference), used by TIS-DPO. Tokens whose probability under
    the first model is 0 in float32 contribute nothing. For identical models the log-ratio, the KL
    and the KL's gradient are exactly zero.

    Gradients flow to `input`, `linear_weight` and `linear_bias`, never to the reference.

    Args:
        input, linear_weight, target, linear_bias, ignore_index: As in `token_logps`.
        reference_input: Hidden states of the reference, (N, D'), D' not necessarily D.
        reference_linear_weight: LM-head weight of the reference, (V, D'); may be the policy's
            tensor.
        direction: "reference_policy" or "policy_reference".
        reference_linear_bias: LM-head bias of the reference, (V,).
        logit_scale, logit_softcap: As in `token_logps`; applied to both models.

    Returns:
        logps, reference_logps, kl: each (N,) float32; 0 for ignored rows.

    Raises:
        ValueError: as in `token_logps`, or N or V differ between the models, or the direction is
            unknown.
    """
    check_head(input, linear_weight, linear_bias)
    reference = (reference_input, reference_linear_weight, reference_linear_bias)
    check_models(input, linear_weight, *reference)
    check_logit_transform(logit_scale, logit_softcap)
    check_target(target, input, ignore_index)
    if direction not in DIRECTIONS:
        raise ValueError(f"direction must be one of {', '.join(DIRECTIONS)}, got {direction!r}")
    heads = [
        Head(input, linear_weight, linear_bias, logit_scale, logit_softcap),
        Head(*reference, logit_scale, logit_softcap),
    ]
    stats = sweep_heads(
        "token_logps_kl", heads, target, direction=direction, ignore_index=ignore_index
    )
    return TokenScores(stats.logps, stats.reference_logps, stats.kl)
