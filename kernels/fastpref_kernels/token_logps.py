"""Log-probabilities of target tokens straight from hidden states and the LM head."""

from torch import Tensor

from fastpref_kernels.checks import (
    check_head,
    check_logit_transform,
    check_target,
)
from fastpref_kernels.head import Head
from fastpref_kernels.registered import sweep_heads


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
    """Log-probability of each target token, without materializing the (N, V) logits.

        z = cap · tanh(scale · (input @ linear_weightᵀ + linear_bias) / cap)
        logps = z[target] - logsumexp(z)

    Accumulates in float32 for all dtypes, also under autocast. Differentiable once, in `input`,
    `linear_weight` and `linear_bias`; no gradient is allocated for frozen ones. Deterministic: the
    same inputs give the same bits.

    Args:
        input: Hidden states, (N, D), bfloat16, float16 or float32, any strides; N may be 0.
        linear_weight: LM-head weight, (V, D), one of these dtypes, not necessarily input's.
        target: Token ids, (N,) int64 or int32, in [0, V) or `ignore_index`. The range is checked on
            the CPU only: on a GPU an id out of range scores -inf or NaN, and may trigger a
            device-side assert where gradients are computed.
        linear_bias: LM-head bias, (V,). A column of -inf (a padded vocabulary) has probability 0;
            under a softcap it has the logit -cap, as in the definition.
        logit_scale: Multiplies the logits before the softcap, > 0.
        logit_softcap: Bounds the logits by cap · tanh(z / cap), > 0; None for no bound.
        ignore_index: Rows with this target score 0 and get zero gradient, even if `input` is NaN
            there. Any integer, also a valid id.

    Returns:
        logps: (N,) float32, in nats, <= 0.

    Raises:
        ValueError: a shape, dtype, device or range is not as above, or an argument is a DTensor.
    """
    check_head(input, linear_weight, linear_bias)
    check_logit_transform(logit_scale, logit_softcap)
    check_target(target, input, ignore_index)
    head = Head(input, linear_weight, linear_bias, logit_scale, logit_softcap)
    return sweep_heads("token_logps", [head], target, ignore_index=ignore_index).logps
