"""The loss of a micro-batch, from the models: which scores, by the cheapest way that is valid."""

from collections.abc import Callable

import torch
from fastpref_kernels import TokenScores
from torch import Tensor

from fastpref.batch import Batch
from fastpref.model.own_reference import OwnReference
from fastpref.model.scorer import HeadStates, TokenScorer
from fastpref.objectives.objective import Metrics, Objective


class StepLoss:
    """What the training loop knows of a loss.

    Policy and reference run the same code in the same dtype on the same batch, so two equal models
    give log-ratios and KL of exactly zero.

    Args:
        objective: The loss, and what it needs.
        policy: Gets gradients.
        reference: Gets none; None where the loss has no reference, or what it says of a batch is
            there beforehand.
    """

    def __init__(
        self,
        objective: Objective,
        policy: TokenScorer,
        reference: TokenScorer | OwnReference | None,
    ) -> None:
        self.objective = objective
        self._policy = policy
        self._reference = reference
        needs = objective.needs
        self._score = _choose_scores(needs.kl, policy, reference)
        self._score_in_detail = _choose_scores(needs.kl or needs.metrics_kl, policy, reference)
        # behind a softcap the mean of the logits is not linear in the hidden states
        has_values = objective.losses_of_values is not None
        self._from_values = has_values and policy.path.softcap is None

    def compute(self, batch: Batch, step: int | None) -> tuple[Tensor, Metrics]:
        """Losses and metrics of a micro-batch.

        Args:
            batch: On the device.
            step: Optimizer steps before this one; None on held-out rows, where every metric is due.

        Returns:
            Losses (P,), with gradients where torch records them, and metrics (P,) by name. Of a
            mixture of experts the losses have its router's in them, the metric "loss" has not.
        """
        losses_P, metrics = self._preferences(batch, step)
        balance = self._policy.balance
        if balance is None or not torch.is_grad_enabled():
            return losses_P, metrics
        of_router = balance.take(batch, len(losses_P))
        metrics |= {
            "router_aux_loss": of_router.losses.detach(),
            "router_max_load": of_router.max_loads,
        }
        return losses_P + balance.coefficient * of_router.losses, metrics

    def _preferences(self, batch: Batch, step: int | None) -> tuple[Tensor, Metrics]:
        """The objective's losses and metrics."""
        detailed = step is None or step % self.objective.detailed_every == 0
        if detailed or not self._from_values:
            score = self._score_in_detail if detailed else self._score
            return self.objective.losses(score(batch), batch)
        assert self._reference is not None and self.objective.losses_of_values is not None
        values_N = self._policy.tdpo1_values(batch, _states(self._reference, batch))
        return self.objective.losses_of_values(values_N, batch)

    def done(self) -> None:
        """Free what is kept until a micro-batch's backward has read it."""
        self._policy.release()
        if self._reference is not None:
            self._reference.release()


def _choose_scores(
    direction: str | None, policy: TokenScorer, reference: TokenScorer | OwnReference | None
) -> Callable[[Batch], TokenScores]:
    """Token scores of a micro-batch: policy with gradients, reference without.

    Args:
        direction: Of the KL; None: without one.
        policy, reference: As in `StepLoss`; a reference that is not here has no KL.
    """
    if reference is None:
        # None where the loss has no reference
        return lambda batch: TokenScores(policy(batch), batch.reference_logps, None)

    def score_log_ratios(batch: Batch) -> TokenScores:
        with torch.no_grad():
            reference_logps_N = reference(batch)
        return TokenScores(policy(batch), reference_logps_N, None)

    def score_with_kl(batch: Batch) -> TokenScores:
        return policy(batch, _states(reference, batch), direction)

    return score_log_ratios if direction is None else score_with_kl


@torch.no_grad()
def _states(reference: TokenScorer | OwnReference, batch: Batch) -> HeadStates:
    return reference.states(batch)
