"""What each loss asks of the models and how its token scores become one loss a pair.

An `Objective` is chosen before the training loop starts; the loop never learns which one it is.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fastpref_kernels import TokenScores, sequence_log_ratios
from torch import Tensor

from fastpref.batch import PackedBatch
from fastpref.config import (
    DPOConfig,
    IPOConfig,
    LossConfig,
    SFTConfig,
    TDPOConfig,
    TISDPOConfig,
)
from fastpref.losses import (
    PairLoss,
    dpo_loss,
    implicit_accuracies,
    ipo_loss,
    sft_loss,
    tdpo_loss,
    tisdpo_loss,
)

Metrics = dict[str, Tensor]
"""Name as in the seed repositories without the split ("rewards/chosen") -> (P,) float32."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SequenceScores:
    """Token scores summed over each response, times the token weights if the loss has any."""

    logps: Tensor
    """(S,) log π(response | prompt), in nats."""
    log_ratios: Tensor
    """(S,) log π - log π_ref, summed token by token: two close numbers never round apart."""
    kl: Tensor | None
    """(S,) sequential KL in the objective's direction."""


PairObjective = Callable[[SequenceScores, SequenceScores], PairLoss]
"""Chosen scores, rejected scores -> losses, chosen rewards, rejected rewards."""

KLLoss = Callable[[Tensor, Tensor, Tensor, Tensor], PairLoss]
"""Chosen and rejected log-ratios, chosen and rejected KL (P,) -> as above."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Objective:
    """What a loss needs before it can be computed, and the loss.

    `evaluate(scores, batch)` gives the losses (P,) and the metrics of one micro-batch. The step's
    loss is their sum over all micro-batches and ranks, divided by the number of pairs of the step
    (of sequences in SFT), so how the pairs were split changes nothing.
    """

    title: str
    """The method's usual name, with its variant: TDPO2, not TDPO."""
    needs_pairs: bool
    """False in SFT, which trains on one response a prompt."""
    needs_weights: bool
    """Token weights multiply log-ratios and KL."""
    kl_direction: str | None
    """The KL that the scores must carry, as `token_logps_and_kl` names it; None for no KL."""
    evaluate: Callable[[TokenScores, PackedBatch], tuple[Tensor, Metrics]]
    evaluate_values: Callable[[Tensor, PackedBatch], tuple[Tensor, Metrics]] | None = None
    """The same losses from `tdpo1_token_values` (N,), and those metrics that these tell."""
    detailed_every: int = 1
    """Optimizer steps between those that ask for every metric, where some cost more."""
    starts_at_log_two: bool = False
    """The loss is ln 2 while policy and reference are equal."""

    @property
    def needs_reference(self) -> bool:
        return self.needs_pairs


def build_objective(config: LossConfig) -> Objective:
    """The objective of a loss config."""
    match config:
        case SFTConfig():
            return Objective(
                title="SFT",
                needs_pairs=False,
                needs_weights=False,
                kl_direction=None,
                evaluate=_evaluate_sft,
            )
        case DPOConfig():
            title = "cDPO" if config.label_smoothing else "DPO"
            return _pair_objective(
                title,
                _dpo(config),
                weighted=config.token_level,
                starts_at_log_two=not config.reference_free,
            )
        case IPOConfig():
            return _pair_objective("IPO", _ipo(config))
        case TDPOConfig():
            title = "TDPO2" if config.if_tdpo2 else "TDPO1"
            tdpo = partial(
                tdpo_loss, beta=config.beta, alpha=config.alpha, if_tdpo2=config.if_tdpo2
            )
            return _pair_objective(
                title,
                _with_kl(tdpo),
                kl_direction="reference_policy",
                value_loss=None if config.if_tdpo2 else tdpo,
                detailed_every=1 if config.if_tdpo2 else config.kl_metrics_every,
                starts_at_log_two=True,
            )
        case TISDPOConfig():
            tisdpo = partial(
                tisdpo_loss,
                beta=config.beta,
                alpha=config.alpha,
                token_level=config.token_level,
            )
            if not config.token_level:
                return _pair_objective(
                    "TIS-DPO", _without_kl(tisdpo), weighted=True, starts_at_log_two=True
                )
            return _pair_objective(
                "TIS-DPO",
                _with_kl(tisdpo),
                kl_direction="policy_reference",
                weighted=True,
                starts_at_log_two=True,
            )
    raise AssertionError(f"no objective for {type(config).__name__}")


def _dpo(config: DPOConfig) -> PairObjective:
    options: dict[str, Any] = {
        "beta": config.beta,
        "label_smoothing": config.label_smoothing,
    }

    def loss(chosen: SequenceScores, rejected: SequenceScores) -> PairLoss:
        # log-ratios stand in for the policy and zero for the reference: the same differences
        # without subtracting two sums of hundreds of nats
        zeros_P = torch.zeros_like(chosen.log_ratios)
        return dpo_loss(chosen.log_ratios, rejected.log_ratios, zeros_P, zeros_P, **options)

    def reference_free_loss(chosen: SequenceScores, rejected: SequenceScores) -> PairLoss:
        reference_chosen_P = chosen.logps - chosen.log_ratios
        reference_rejected_P = rejected.logps - rejected.log_ratios
        return dpo_loss(
            chosen.logps,
            rejected.logps,
            reference_chosen_P,
            reference_rejected_P,
            reference_free=True,
            **options,
        )

    return reference_free_loss if config.reference_free else loss


def _ipo(config: IPOConfig) -> PairObjective:
    def loss(chosen: SequenceScores, rejected: SequenceScores) -> PairLoss:
        zeros_P = torch.zeros_like(chosen.log_ratios)
        return ipo_loss(chosen.log_ratios, rejected.log_ratios, zeros_P, zeros_P, beta=config.beta)

    return loss


def _without_kl(loss: KLLoss) -> PairObjective:
    def evaluate(chosen: SequenceScores, rejected: SequenceScores) -> PairLoss:
        zeros_P = torch.zeros_like(chosen.log_ratios)
        return loss(chosen.log_ratios, rejected.log_ratios, zeros_P, zeros_P)

    return evaluate


def _with_kl(loss: KLLoss) -> PairObjective:
    def evaluate(chosen: SequenceScores, rejected: SequenceScores) -> PairLoss:
        assert chosen.kl is not None and rejected.kl is not None
        return loss(chosen.log_ratios, rejected.log_ratios, chosen.kl, rejected.kl)

    return evaluate


def _pair_objective(
    title: str,
    loss: PairObjective,
    *,
    kl_direction: str | None = None,
    weighted: bool = False,
    value_loss: KLLoss | None = None,
    detailed_every: int = 1,
    starts_at_log_two: bool = False,
) -> Objective:
    def evaluate(scores: TokenScores, batch: PackedBatch) -> tuple[Tensor, Metrics]:
        chosen, rejected = _sum_sequences(scores, batch, weighted=weighted)
        losses, chosen_rewards, rejected_rewards = loss(chosen, rejected)
        metrics = _reward_metrics(chosen_rewards, rejected_rewards)
        if chosen.kl is not None and rejected.kl is not None:
            metrics["kl/chosen"] = chosen.kl
            metrics["kl/rejected"] = rejected.kl
            metrics["kl/margin"] = chosen.kl - rejected.kl
        metrics |= {"logps/chosen": chosen.logps, "logps/rejected": rejected.logps, "loss": losses}
        return losses, {name: value.detach() for name, value in metrics.items()}

    return Objective(
        title=title,
        needs_pairs=True,
        needs_weights=weighted,
        kl_direction=kl_direction,
        evaluate=evaluate,
        evaluate_values=None if value_loss is None else _evaluate_values(value_loss),
        detailed_every=detailed_every,
        starts_at_log_two=starts_at_log_two,
    )


def _evaluate_values(
    loss: KLLoss,
) -> Callable[[Tensor, PackedBatch], tuple[Tensor, Metrics]]:
    """TDPO1's loss from the sum of log-ratio and KL, all that it and its rewards depend on."""

    def evaluate(values_N: Tensor, batch: PackedBatch) -> tuple[Tensor, Metrics]:
        chosen_P, rejected_P = _sum(values_N, batch, None).chunk(2)
        zeros_P = torch.zeros_like(chosen_P)
        losses, *rewards = loss(chosen_P, rejected_P, zeros_P, zeros_P)
        return losses, _reward_metrics(*rewards) | {"loss": losses.detach()}

    return evaluate


def _reward_metrics(chosen_rewards: Tensor, rejected_rewards: Tensor) -> Metrics:
    return {
        "rewards/chosen": chosen_rewards,
        "rewards/rejected": rejected_rewards,
        "rewards/accuracies": implicit_accuracies(chosen_rewards, rejected_rewards),
        "rewards/margins": chosen_rewards - rejected_rewards,
    }


def _evaluate_sft(scores: TokenScores, batch: PackedBatch) -> tuple[Tensor, Metrics]:
    logps_S = _sum(scores.logps, batch, None)
    losses = sft_loss(logps_S)
    return losses, {"logps/chosen": logps_S.detach(), "loss": losses.detach()}


def _sum_sequences(
    scores: TokenScores, batch: PackedBatch, *, weighted: bool
) -> tuple[SequenceScores, SequenceScores]:
    weights_N = batch.token_weights if weighted else None
    assert scores.reference_logps is not None
    logps_S = _sum(scores.logps, batch, weights_N)
    log_ratios_S = sequence_log_ratios(
        scores.logps,
        scores.reference_logps,
        batch.sequence_ids,
        batch.num_sequences,
        token_weights=weights_N,
    )
    P = batch.num_sequences // 2
    kl_S = None if scores.kl is None else _sum(scores.kl, batch, weights_N)
    chosen, rejected = (
        SequenceScores(
            logps=logps_S[side],
            log_ratios=log_ratios_S[side],
            kl=None if kl_S is None else kl_S[side],
        )
        for side in (slice(0, P), slice(P, 2 * P))
    )
    return chosen, rejected


def _sum(values_N: Tensor, batch: PackedBatch, weights_N: Tensor | None) -> Tensor:
    """Sum of token values over each sequence, (S,)."""
    return sequence_log_ratios(
        values_N,
        torch.zeros_like(values_N),
        batch.sequence_ids,
        batch.num_sequences,
        token_weights=weights_N,
    )
