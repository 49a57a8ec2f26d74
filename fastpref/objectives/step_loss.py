"""Loss of a micro-batch: runs the models by the cheapest valid path and applies the objective."""

from collections.abc import Callable

import torch
from fastpref_kernels import TokenScores
from torch import Tensor

from fastpref.batch import Batch
from fastpref.model.own_reference import OwnReference
from fastpref.model.scorer import HeadStates, TokenScorer
from fastpref.objectives.objective import Metrics, Objective


class StepLoss:
    """The training loop's interface to a loss.

    Policy and reference run the same code in the same dtype on the same batch, so identical models
    give log-ratios and KL of exactly zero.

    Args:
        objective: The loss and its requirements.
        policy: The model that is trained.
        reference: Frozen; None if the loss has no reference or its scores are precomputed.
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
        # with a softcap the mean of the logits is not linear in the hidden states
        has_values = objective.losses_of_values is not None
        self._from_values = has_values and policy.path.softcap is None

    def compute(self, batch: Batch, step: int | None) -> tuple[Tensor, Metrics]:
        """Losses and metrics of a micro-batch.

        Args:
            batch: Micro-batch on the device.
            step: Optimizer steps before this one; None for held-out rows, which get every metric.

        Returns:
            Losses (P,), differentiable in grad mode, and metrics (P,) by name. In grad mode the
            losses include the load-balancing loss, if any; the metric "loss" does not.
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
        """Losses and metrics of the objective, without the load-balancing loss."""
        detailed = step is None or step % self.objective.detailed_every == 0
        if detailed or not self._from_values:
            score = self._score_in_detail if detailed else self._score
            return self.objective.losses(score(batch), batch)
        assert self._reference is not None and self.objective.losses_of_values is not None
        values_N = self._policy.tdpo1_values(batch, _states(self._reference, batch))
        return self.objective.losses_of_values(values_N, batch)

    def done(self) -> None:
        """Free gathered weights and router logits; to be called after a micro-batch's backward."""
        self._policy.release()
        if self._reference is not None:
            self._reference.release()


def _choose_scores(
    direction: str | None, policy: TokenScorer, reference: TokenScorer | OwnReference | None
) -> Callable[[Batch], TokenScores]:
    """Choose the function that scores a micro-batch: policy with gradients, reference without.

    Args:
        direction: Direction of the KL; None for no KL.
        policy, reference: As in `StepLoss`; without a reference model there is no KL.
    """
    if reference is None:
        # reference_logps is None if the loss has no reference
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
