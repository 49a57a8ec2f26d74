"""What TDPO1 sums over a response, from hidden states, without the policy's softmax."""

from torch import Tensor

from fastpref_kernels.checks import (
    check_head,
    check_logit_transform,
    check_models,
    check_target,
)
from fastpref_kernels.head import Head
from fastpref_kernels.registered import sweep_heads


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
    reference = (reference_input, reference_linear_weight, reference_linear_bias)
    check_models(input, linear_weight, *reference)
    check_logit_transform(logit_scale, None)
    check_target(target, input, ignore_index)
    heads = [
        Head(input, linear_weight, linear_bias, logit_scale, None),
        Head(*reference, logit_scale, None),
    ]
    return sweep_heads("tdpo1_token_values", heads, target, ignore_index=ignore_index).values
