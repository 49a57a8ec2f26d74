"""The losses: pure functions of per-sequence scores, one value per pair, without reduction.

Every log probability, log-ratio and KL is a sum over response tokens, in nats, shape (P,) for P
preference pairs; float32 or float64, others are computed in float32. A log-ratio is
log π(response | prompt) - log π_ref(response | prompt). Returned rewards are detached.

Each function raises ValueError if an argument is not a tensor, shapes differ or an option is out of
range.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid

from fastpref.checks import check_number

PairLoss = tuple[Tensor, Tensor, Tensor]


def sft_loss(logps: Tensor) -> Tensor:
    """Supervised fine-tuning: the negative log-likelihood of each response.

    Args:
        logps: log p(response | prompt) summed over response tokens, in nats. Shape (S,).

    Returns:
        losses, shape (S,). Not divided by the length, so long responses weigh more.
    """
    (logps,) = _numbers(logps=logps)
    return -logps


def dpo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
    label_smoothing: float = 0.0,
    reference_free: bool = False,
) -> PairLoss:
    """Direct preference optimization (Rafailov et al. 2023, eq. 7; smoothing: cDPO, eq. 3).

        loss = -(1 - ε) log σ(β h) - ε log σ(-β h)
        h = (log π_w - log π_l) - (log ref_w - log ref_l)

    Args:
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
            reference_rejected_logps: log p(response | prompt). The reference carries no gradient.
        beta: Inverse temperature of the implicit reward, > 0.
        label_smoothing: ε, the probability that a pair is mislabelled, in [0, 0.5).
        reference_free: Omit the reference from h; the rewards still include it.

    Returns:
        losses, chosen_rewards, rejected_rewards: each (P,). The rewards are β (log π - log ref).
    """
    _check_option("beta", beta, gt=0)
    _check_option("label_smoothing", label_smoothing, ge=0, lt=0.5)
    policy_chosen_logps, policy_rejected_logps, *reference = _numbers(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
    )
    reference_chosen_logps, reference_rejected_logps = (logps.detach() for logps in reference)
    chosen_log_ratios = policy_chosen_logps - reference_chosen_logps
    rejected_log_ratios = policy_rejected_logps - reference_rejected_logps
    if reference_free:
        margins = policy_chosen_logps - policy_rejected_logps
    else:
        margins = chosen_log_ratios - rejected_log_ratios
    losses = -(1 - label_smoothing) * logsigmoid(beta * margins)
    # without smoothing the term is omitted: 0 · log σ(-∞) would be NaN
    if label_smoothing:
        losses = losses - label_smoothing * logsigmoid(-beta * margins)
    return losses, beta * chosen_log_ratios.detach(), beta * rejected_log_ratios.detach()


def ipo_loss(
    policy_chosen_logps: Tensor,
    policy_rejected_logps: Tensor,
    reference_chosen_logps: Tensor,
    reference_rejected_logps: Tensor,
    *,
    beta: float,
) -> PairLoss:
    """Identity preference optimization (Azar et al. 2023, eq. 17) on summed log probabilities.

        loss = (h - 1 / (2 β))²,   h as in `dpo_loss`

    Args:
        policy_chosen_logps, policy_rejected_logps, reference_chosen_logps,
            reference_rejected_logps: as in `dpo_loss`.
        beta: Regularisation τ of the paper, > 0.

    Returns:
        losses, chosen_rewards, rejected_rewards: each (P,).
    """
    _check_option("beta", beta, gt=0)
    policy_chosen_logps, policy_rejected_logps, *reference = _numbers(
        policy_chosen_logps=policy_chosen_logps,
        policy_rejected_logps=policy_rejected_logps,
        reference_chosen_logps=reference_chosen_logps,
        reference_rejected_logps=reference_rejected_logps,
    )
    reference_chosen_logps, reference_rejected_logps = (logps.detach() for logps in reference)
    chosen_log_ratios = policy_chosen_logps - reference_chosen_logps
    rejected_log_ratios = policy_rejected_logps - reference_rejected_logps
    losses = (chosen_log_ratios - rejected_log_ratios - 1 / (2 * beta)).square()
    return losses, beta * chosen_log_ratios.detach(), beta * rejected_log_ratios.detach()


def simpo_loss(
    chosen_logps: Tensor,
    rejected_logps: Tensor,
    chosen_num_tokens: Tensor,
    rejected_num_tokens: Tensor,
    *,
    beta: float,
    gamma: float,
) -> PairLoss:
    """Simple preference optimization (Meng et al. 2024, arXiv:2405.14734, eq. 6).

        loss = -log σ(β (log π_w / |y_w| - log π_l / |y_l|) - γ)

    Args:
        chosen_logps, rejected_logps: log π(response | prompt).
        chosen_num_tokens, rejected_num_tokens: |y|, tokens of the responses, >= 1.
        beta: Scale of the mean log-probability, > 0.
        gamma: Target reward margin, >= 0.

    Returns:
        losses, chosen_rewards, rejected_rewards: each (P,). The rewards are β log π / |y|.
    """
    _check_option("beta", beta, gt=0)
    _check_option("gamma", gamma, ge=0)
    chosen_logps, rejected_logps, chosen_num_tokens, rejected_num_tokens = _numbers(
        chosen_logps=chosen_logps,
        rejected_logps=rejected_logps,
        chosen_num_tokens=chosen_num_tokens,
        rejected_num_tokens=rejected_num_tokens,
    )
    chosen_rewards = beta * chosen_logps / chosen_num_tokens
    rejected_rewards = beta * rejected_logps / rejected_num_tokens
    losses = -logsigmoid(chosen_rewards - rejected_rewards - gamma)
    return losses, chosen_rewards.detach(), rejected_rewards.detach()


def tdpo_loss(
    chosen_log_ratios: Tensor,
    rejected_log_ratios: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    *,
    beta: float,
    alpha: float = 0.5,
    if_tdpo2: bool = True,
) -> PairLoss:
    """Token-level direct preference optimization (Zeng et al. 2024, arXiv:2404.11999).

        TDPO1: loss = -log σ(β [(M_w - M_l) - (K_l - K_w)])
        TDPO2: loss = -log σ(β [(M_w - M_l) - α (K_l - stop_gradient(K_w))])

    Args:
        chosen_log_ratios, rejected_log_ratios: M_w, M_l.
        chosen_kl, rejected_kl: K_w, K_l, the sequential KL(reference ‖ policy): the sum over
            response positions of the KL between the two next-token distributions. >= 0.
        beta: Inverse temperature of the implicit reward, > 0.
        alpha: Weight of the KL difference, >= 0; TDPO2 only.
        if_tdpo2: TDPO2 (the paper's recommendation) or TDPO1.

    Returns:
        losses, chosen_rewards, rejected_rewards: each (P,). The rewards are β (M + K) in both
        variants, as the TDPO repository logs them; their difference is the TDPO1 margin.
    """
    _check_option("beta", beta, gt=0)
    _check_option("alpha", alpha, ge=0)
    chosen_log_ratios, rejected_log_ratios, chosen_kl, rejected_kl = _numbers(
        chosen_log_ratios=chosen_log_ratios,
        rejected_log_ratios=rejected_log_ratios,
        chosen_kl=chosen_kl,
        rejected_kl=rejected_kl,
    )
    margins = chosen_log_ratios - rejected_log_ratios
    if if_tdpo2:
        # the chosen KL is detached: only the rejected KL gets a gradient (arXiv:2404.11999)
        margins = margins - _times(alpha, rejected_kl - chosen_kl.detach())
    else:
        margins = margins - (rejected_kl - chosen_kl)
    chosen_rewards = beta * (chosen_log_ratios + chosen_kl).detach()
    rejected_rewards = beta * (rejected_log_ratios + rejected_kl).detach()
    return -logsigmoid(beta * margins), chosen_rewards, rejected_rewards


def tisdpo_loss(
    chosen_log_ratios: Tensor,
    rejected_log_ratios: Tensor,
    chosen_kl: Tensor,
    rejected_kl: Tensor,
    *,
    beta: float,
    alpha: float = 0.5,
    token_level: bool = False,
) -> PairLoss:
    """Token-importance-sampling DPO (Liu et al. 2025, arXiv:2410.04350), as in its code.

        loss = -log σ(β [(M_w - M_l) - α (K_w - K_l)])   with token_level, else without the K term

    Args:
        chosen_log_ratios, rejected_log_ratios: M_w, M_l: sums of token weight x log-ratio.
        chosen_kl, rejected_kl: K_w, K_l: sums of token weight x KL(policy ‖ reference), the
            opposite direction of TDPO's. Used only with token_level.
        beta: Inverse temperature of the implicit reward, > 0.
        alpha: Weight of the KL difference, >= 0.
        token_level: Include the KL term; gradients then flow through both sides of it.

    Returns:
        losses, chosen_rewards, rejected_rewards: each (P,). The rewards are β M, or β (M - K)
        with token_level (the code applies no α there).
    """
    _check_option("beta", beta, gt=0)
    _check_option("alpha", alpha, ge=0)
    chosen_log_ratios, rejected_log_ratios, chosen_kl, rejected_kl = _numbers(
        chosen_log_ratios=chosen_log_ratios,
        rejected_log_ratios=rejected_log_ratios,
        chosen_kl=chosen_kl,
        rejected_kl=rejected_kl,
    )
    margins = chosen_log_ratios - rejected_log_ratios
    chosen_rewards, rejected_rewards = chosen_log_ratios, rejected_log_ratios
    if token_level:
        margins = margins - _times(alpha, chosen_kl - rejected_kl)
        chosen_rewards = chosen_rewards - chosen_kl
        rejected_rewards = rejected_rewards - rejected_kl
    losses = -logsigmoid(beta * margins)
    return losses, beta * chosen_rewards.detach(), beta * rejected_rewards.detach()


def implicit_accuracies(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Tensor:
    """1 where the chosen reward is strictly higher, else 0, also for ties; (P,) float32."""
    chosen_rewards, rejected_rewards = _numbers(
        chosen_rewards=chosen_rewards, rejected_rewards=rejected_rewards
    )
    return (chosen_rewards > rejected_rewards).to(torch.float32)


def _check_option(name: str, value: float, **bounds: float) -> None:
    """`check_number` for a required option: refuses None and other non-numbers."""
    # a tensor or array of several elements also has __float__, which fails
    if not hasattr(value, "__float__") or getattr(value, "ndim", False):
        raise ValueError(f"{name} must be a number, got {value!r}")
    check_number(name, value, **bounds)


def _times(alpha: float, difference: Tensor) -> Tensor:
    """α · difference; 0 for α = 0 even where the difference is infinite."""
    if not alpha:
        difference = difference.masked_fill(~difference.isfinite(), 0)
    return alpha * difference


def _numbers(**tensors: Tensor) -> list[Tensor]:
    """The tensors, converted to float32 unless they are float32 or float64.

    Raises:
        ValueError: one is not a tensor, or shapes differ (broadcasting would hide the mistake).
    """
    for name, tensor in tensors.items():
        if not isinstance(tensor, Tensor):
            raise ValueError(f"{name} must be a tensor, got {tensor!r}")
    (first_name, first), *others = tensors.items()
    for name, tensor in others:
        if tensor.shape != first.shape:
            raise ValueError(
                f"{name} must have the shape of {first_name}, {tuple(first.shape)}, got "
                f"{tuple(tensor.shape)}"
            )
    kept = (torch.float32, torch.float64)
    return [x if x.dtype in kept else x.float() for x in tensors.values()]
