"""For each loss: the scores it needs from the models, and how they become one loss per pair.

An `Objective` is chosen before the training loop starts; the loop does not depend on which.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import Any

import torch
from fastpref_kernels import TokenScores, sequence_log_ratios
from torch import Tensor

from fastpref.batch import IGNORED, Batch
from fastpref.config.loss import (
    DPOConfig,
    IPOConfig,
    LossConfig,
    LossNeeds,
    SFTConfig,
    SimPOConfig,
    TDPOConfig,
    TISDPOConfig,
)
from fastpref.losses import (
    PairLoss,
    dpo_loss,
    implicit_accuracies,
    ipo_loss,
    sft_loss,
    simpo_loss,
    tdpo_loss,
    tisdpo_loss,
)

Metrics = dict[str, Tensor]
"""Name as in the seed repositories, without the split ("rewards/chosen") -> (P,) float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceScores:
    """Token scores summed over each response, with token weights if the loss uses them."""

    logps: Tensor
    """(S,) log π(response | prompt), in nats."""
    num_tokens: Tensor
    """(S,) float32: number of the response's tokens in the loss, unweighted."""
    log_ratios: Tensor | None
    """(S,) log π - log π_ref, in nats: a sum of per-token differences, which avoids cancellation;
    None without reference."""
    kl: Tensor | None
    """(S,) sequential KL in the objective's direction, in nats; None if not computed."""
    unweighted_logps: Tensor | None
    """(S,) log π(response | prompt) without token weights, in nats; None if `logps` has none."""


LossOfSums = Callable[..., PairLoss]
"""A function of `fastpref.losses`, called with (P,) tensors: a first score of the chosen and of the
rejected responses, a second score of both, and so on."""
Sums = Callable[[SequenceScores], tuple[Tensor, ...]]
"""Selects these scores for one side, in that order."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """A loss and its requirements.

    `losses(scores, batch)` returns the losses (P,) and the metrics of one micro-batch. The step's
    loss is their sum over all micro-batches and ranks, divided by the number of pairs of the step
    (sequences in SFT), and so does not depend on how the pairs were split.
    """

    title: str
    """Usual name of the method, with its variant: TDPO2, not TDPO."""
    needs: LossNeeds
    """What the loss requires from data and models."""
    losses: Callable[[TokenScores, Batch], tuple[Tensor, Metrics]]
    losses_of_values: Callable[[Tensor, Batch], tuple[Tensor, Metrics]] | None = None
    """The same losses from `tdpo1_token_values` (N,), with the metrics that these allow."""
    detailed_every: int = 1
    """Interval, in optimizer steps, of steps that compute all metrics, where the loss itself does
    not need some of them."""
    starts_at_log_two: bool = False
    """Whether the loss is ln 2 while policy and reference are equal."""


def build_objective(config: LossConfig) -> Objective:
    """The objective of a loss config."""
    match config:
        case SFTConfig():
            return Objective(title="SFT", needs=config.needs, losses=_sft_losses)
        case DPOConfig():
            dpo = partial(
                dpo_loss,
                beta=config.beta,
                label_smoothing=config.label_smoothing,
                reference_free=config.reference_free,
            )
            return _pair_objective(
                "cDPO" if config.label_smoothing else "DPO",
                config,
                dpo,
                _logps_and_reference if config.reference_free else _log_ratios_alone,
                starts_at_log_two=not config.reference_free,
            )
        case IPOConfig():
            ipo = partial(ipo_loss, beta=config.beta)
            return _pair_objective("IPO", config, ipo, _log_ratios_alone)
        case SimPOConfig():
            simpo = partial(simpo_loss, beta=config.beta, gamma=config.gamma)
            return _pair_objective("SimPO", config, simpo, lambda x: (x.logps, x.num_tokens))
        case TDPOConfig():
            tdpo = partial(
                tdpo_loss, beta=config.beta, alpha=config.alpha, if_tdpo2=config.if_tdpo2
            )
            return _pair_objective(
                "TDPO2" if config.if_tdpo2 else "TDPO1",
                config,
                tdpo,
                _log_ratios_and_kl,
                starts_at_log_two=True,
                losses_of_values=None if config.if_tdpo2 else _losses_of_values(tdpo),
                detailed_every=config.kl_metrics_every,
            )
        case TISDPOConfig():
            tisdpo = partial(
                tisdpo_loss, beta=config.beta, alpha=config.alpha, token_level=config.token_level
            )
            sums = _log_ratios_and_kl if config.token_level else _log_ratios_alone
            return _pair_objective(
                "TIS-DPO",
                config,
                tisdpo,
                sums,
                starts_at_log_two=True,
                detailed_every=config.kl_metrics_every,
            )
    raise AssertionError(f"build_objective has no case for {type(config).__name__}")


def _log_ratios_alone(scores: SequenceScores) -> tuple[Tensor, Tensor]:
    """Log-ratios in place of the policy's log-probabilities, zeros in place of the reference's: the
    same difference, without subtracting two sums of hundreds of nats. Or zeros for an unused KL.
    """
    assert scores.log_ratios is not None
    return scores.log_ratios, torch.zeros_like(scores.log_ratios)


def _log_ratios_and_kl(scores: SequenceScores) -> tuple[Tensor, Tensor]:
    assert scores.log_ratios is not None and scores.kl is not None
    return scores.log_ratios, scores.kl


def _logps_and_reference(scores: SequenceScores) -> tuple[Tensor, Tensor]:
    """Log-probabilities of policy and reference, for a loss that does not use only their ratio."""
    assert scores.log_ratios is not None
    return scores.logps, scores.logps - scores.log_ratios


def _pair_objective(
    title: str, config: LossConfig, loss: LossOfSums, sums: Sums, **more: Any
) -> Objective:
    """The objective of a loss of pairs; `more` are further fields of it."""

    def losses(scores: TokenScores, batch: Batch) -> tuple[Tensor, Metrics]:
        chosen, rejected = _sum_sequences(scores, batch, weighted=config.needs.weights)
        of_both_sides = zip(sums(chosen), sums(rejected), strict=True)
        losses_P, *rewards = loss(*chain.from_iterable(of_both_sides))
        metrics = _reward_metrics(*rewards)
        if chosen.kl is not None and rejected.kl is not None:
            metrics["kl/chosen"] = chosen.kl
            metrics["kl/rejected"] = rejected.kl
            metrics["kl/margin"] = chosen.kl - rejected.kl
        metrics |= {"logps/chosen": chosen.logps, "logps/rejected": rejected.logps}
        if chosen.unweighted_logps is not None and rejected.unweighted_logps is not None:
            metrics["logps/chosen_unweighted"] = chosen.unweighted_logps
            metrics["logps/rejected_unweighted"] = rejected.unweighted_logps
        metrics["loss"] = losses_P
        return losses_P, {name: value.detach() for name, value in metrics.items()}

    return Objective(title=title, needs=config.needs, losses=losses, **more)


def _losses_of_values(loss: LossOfSums) -> Callable[[Tensor, Batch], tuple[Tensor, Metrics]]:
    """TDPO1's loss from log-ratio + KL of each token; loss and rewards depend on this sum alone."""

    def losses(values_N: Tensor, batch: Batch) -> tuple[Tensor, Metrics]:
        chosen_P, rejected_P = _sum(values_N, batch, None).chunk(2)
        zeros_P = torch.zeros_like(chosen_P)
        losses_P, *rewards = loss(chosen_P, rejected_P, zeros_P, zeros_P)
        return losses_P, _reward_metrics(*rewards) | {"loss": losses_P.detach()}

    return losses


def _reward_metrics(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Metrics:
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": implicit_accuracies(chosen_rewards, rejected_rewards),
        "rewards/margins": chosen_rewards - rejected_rewards,
    }


def _sft_losses(scores: TokenScores, batch: Batch) -> tuple[Tensor, Metrics]:
    logps_S = _sum(scores.logps, batch, None)
    losses = sft_loss(logps_S)
    return losses, {"logps/chosen": logps_S.detach(), "loss": losses.detach()}


def _sum_sequences(
    scores: TokenScores, batch: Batch, *, weighted: bool
) -> tuple[SequenceScores, SequenceScores]:
    weights_N = batch.token_weights if weighted else None
    logps_S = _sum(scores.logps, batch, weights_N)
    is_scored_N = batch.target[: batch.num_scored] != IGNORED
    num_tokens_S = _sum(is_scored_N.to(scores.logps), batch, None)
    kl_S = None if scores.kl is None else _sum(scores.kl, batch, weights_N)
    unweighted_logps_S = _sum(scores.logps.detach(), batch, None) if weighted else None
    log_ratios_S = None
    if scores.reference_logps is not None:
        log_ratios_S = _sum(scores.logps, batch, weights_N, minus_N=scores.reference_logps)
    P = batch.num_sequences // 2
    chosen, rejected = (
        SequenceScores(
            logps=logps_S[side],
            num_tokens=num_tokens_S[side],
            log_ratios=None if log_ratios_S is None else log_ratios_S[side],
            kl=None if kl_S is None else kl_S[side],
            unweighted_logps=None if unweighted_logps_S is None else unweighted_logps_S[side],
        )
        for side in (slice(0, P), slice(P, 2 * P))
    )
    return chosen, rejected


def _sum(
    values_N: Tensor, batch: Batch, weights_N: Tensor | None, minus_N: Tensor | None = None
) -> Tensor:
    """Weighted sum of `values_N`, or of `values_N - minus_N`, over each sequence, (S,)."""
    return sequence_log_ratios(
        values_N,
        torch.zeros_like(values_N) if minus_N is None else minus_N,
        batch.sequence_ids,
        batch.num_sequences,
        token_weights=weights_N,
    )
