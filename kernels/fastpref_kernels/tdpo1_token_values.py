"""Per-token terms of TDPO1's margin from hidden states, without the policy's softmax."""

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
    """Log-ratio plus KL of each token: its contribution to TDPO1's margin.

        v = log p_y - log q_y + KL(q ‖ p)            (arXiv:2404.11999, eq. 13 and 15)
          = (z_y - z'_y) - Σ_j q_j (z_j - z'_j)      the policy's log-sum-exp cancels
        dv/dz = e_y - q

    with policy p = softmax(z) and reference q = softmax(z'). Of the policy only z_y and the mean
    of z under q are needed, and that mean is linear in the hidden states: h · Σ_j q_j W_j. Only
    the reference's logits are therefore computed. If both models share one head, v is computed
    from h - h', and identical models give exactly 0. A softcap is not linear and therefore not
    supported: use `token_logps_and_kl`.

    Gradients flow to `input`, `linear_weight` and `linear_bias`, never to the reference.

    Args:
        input, linear_weight, target, linear_bias, ignore_index: As in `token_logps`.
        reference_input: Hidden states of the reference, (N, D'), D' not necessarily D.
        reference_linear_weight: LM-head weight of the reference, (V, D'); may be the policy's.
        reference_linear_bias: LM-head bias of the reference, (V,).
        logit_scale: Multiplies both models' logits, > 0.

    Returns:
        values: (N,) float32, in nats; 0 for ignored rows.

    Raises:
        ValueError: as in `token_logps`, or N or V differ between the models.
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
