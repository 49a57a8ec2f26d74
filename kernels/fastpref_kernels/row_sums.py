"""What a sweep over the vocabulary adds up for each row, and what is left of it."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class RowSums:
    """Online log-sum-exp of R rows over the columns seen so far, the target's column left out.

    What is left of it is made once, and for several models, (M, R) for each (R,) below, together:
    for few rows a GPU waits for the launches.
    """

    max: Tensor
    """(R,) largest logit, the lowest float32 before the first."""
    sum_exp: Tensor
    """(R,) Σ exp(z - max)."""
    target_logit: Tensor
    """(R,) the target's own logit, -inf until its column was seen."""

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> "RowSums":
        zeros_R = torch.zeros(rows, dtype=torch.float32, device=device)
        # finite, so that a row of nothing but -inf adds exp(-inf) and never exp(-inf + inf)
        lowest_R = torch.full_like(zeros_R, torch.finfo(torch.float32).min)
        return cls(lowest_R, zeros_R, torch.full_like(zeros_R, float("-inf")))

    @classmethod
    def of_both(cls, policy: "RowSums", reference: "RowSums") -> "RowSums":
        """(2, R) of two times (R,)."""
        return cls(
            torch.stack([policy.max, reference.max]),
            torch.stack([policy.sum_exp, reference.sum_exp]),
            torch.stack([policy.target_logit, reference.target_logit]),
        )

    def add(self, logits_RC: Tensor, target_logit_R: Tensor) -> "RowSums":
        """Add columns whose target was taken out; `logits_RC` becomes exp(z - max)."""
        max_R = torch.maximum(self.max, logits_RC.amax(1))
        logits_RC.sub_(max_R[:, None]).exp_()
        sum_exp_R = self.sum_exp * (self.max - max_R).exp() + logits_RC.sum(1)
        return RowSums(max_R, sum_exp_R, torch.maximum(self.target_logit, target_logit_R))

    # float64: a float32's last bits would depend on whether a row's place among the others falls
    # into a vector instruction or behind the last one

    @cached_property
    def logps(self) -> Tensor:
        """(R,) log p(target) = -softplus(lse_others - z_y).

        Exact for a confident token too: lse - z_y in float32 is 0 from a margin of 16 nats on.
        """
        return -self.surprisal.float()

    @cached_property
    def surprisal(self) -> Tensor:
        """(R,) float64, -log p(target)."""
        return _model_by_model(F.softplus, self.lse_others - self.target_logit)

    @cached_property
    def lse(self) -> Tensor:
        """(R,) float64, log Σ exp(z) over the whole row."""
        return _model_by_model(torch.logaddexp, self.lse_others, self.exact_target_logit)

    @cached_property
    def lse_over_max(self) -> Tensor:
        """(R,) float64, lse - max, with the digits that lse loses when max is large."""
        target_over_max_R = self.exact_target_logit - self.max
        return _model_by_model(torch.logaddexp, self._log_sum_exp, target_over_max_R)

    @cached_property
    def lse_others(self) -> Tensor:
        """(R,) float64, log Σ exp(z) without the target."""
        return self.max + self._log_sum_exp

    @cached_property
    def _log_sum_exp(self) -> Tensor:
        return _model_by_model(torch.log, self.sum_exp.double())

    @cached_property
    def exact_target_logit(self) -> Tensor:
        """(R,) `target_logit` in float64."""
        return self.target_logit.double()


def _model_by_model(function: Callable[..., Tensor], *values: Tensor) -> Tensor:
    """`function` of (R,) or (M, R), on a CPU one model after the other.

    There a float64's last bit depends on its place as well: side by side, equal models would have
    a KL of 1e-17 where it is 0. A GPU's threads all compute the same.
    """
    if values[0].dim() == 1 or not values[0].is_cpu:
        return function(*values)
    return torch.stack([function(*of_model) for of_model in zip(*values, strict=True)])


@dataclass(frozen=True)
class JointSums:
    """Sums of R rows over both models' columns, the target's column left out."""

    models: RowSums
    """(2, R), of policy and reference."""
    gap: Tensor
    """(R,) Σ exp(z - max) · (z - z' - base_gap), z of the model the KL's expectation is under, z'
    of the other."""
    base_gap: Tensor
    """(R,) What the sum counts from, see `base_gap`."""
    under_reference: bool
    """Which model the expectation is under."""

    @cached_property
    def kl(self) -> Tensor:
        """KL(first ‖ second), (R,), the first being the model its expectation is under.

            KL = Σ p_j · [(z_j - a) - (z'_j - a')] - (lse - a) + (lse' - a')

        holds for any a and a'. They are the target's logits where it is the first model's
        likeliest column, else each model's largest other logit, so that no term is larger than
        the KL asks for: plain logits near 200 would leave an error of 2e-5. A target that the
        second model does not have, with a logit of -inf, is nothing to count from.
        """
        models = self.models
        first, second = (1, 0) if self.under_reference else (0, 1)
        # subtracted in float64: logits of 200 differ by 1e-5 at least in float32
        target_logit_2R = models.exact_target_logit
        at_target_R = models.target_logit[first] >= models.max[first]
        at_target_R &= models.target_logit[second] > -torch.inf
        pivot_2R = torch.where(at_target_R, target_logit_2R, models.max.double())
        pivot_gap_R = pivot_2R[first] - pivot_2R[second]
        lse_2R = torch.where(at_target_R, models.surprisal, models.lse_over_max)
        over_base_R = self.gap - models.sum_exp[first] * (pivot_gap_R - self.base_gap)
        # not max - lse, whose digits go where logits are large
        others_R = over_base_R / models.lse_over_max[first].exp()
        target_gap_R = target_logit_2R[first] - target_logit_2R[second]
        target_R = models.surprisal[first].neg().exp() * (target_gap_R - pivot_gap_R)
        # not a number where the first model does not have the target, which then adds nothing
        target_R.nan_to_num_(nan=0, posinf=torch.inf, neginf=-torch.inf)
        return (others_R + target_R - lse_2R[first] + lse_2R[second]).float()

    @property
    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The first five of JointStats, (R,); log-sum-exps in float64."""
        (logps_R, reference_logps_R), (lse_R, reference_lse_R) = self.models.logps, self.models.lse
        return logps_R, lse_R, reference_logps_R, reference_lse_R, self.kl


def base_gap(first_logit_R: Tensor, second_logit_R: Tensor) -> Tensor:
    """What the gaps of `JointSums` count from, (R,): the gap of the targets' logits.

    Any number serves, and so 0 does where a logit is infinite; this one takes out what all logits
    of one model have more than the other's, which would cost the sums their digits.
    """
    return (first_logit_R - second_logit_R).nan_to_num_(nan=0, posinf=0, neginf=0)


class JointStats(NamedTuple):
    """What a forward over two models finds out about each row, (N,), and what it keeps.

    Float32, but for log-sum-exps: with large logits a rounded one would be off by a part of every
    probability that counts from it, 1e-4 at logits of 1,000.
    """

    logps: Tensor
    """0 where ignored, and so are the reference's and the KL."""
    lse: Tensor
    reference_logps: Tensor
    reference_lse: Tensor
    kl: Tensor
    kept: Tensor
    """(2, K, V rounded up) of the first K rows, what the mode keeps for its backward: larger
    exponentials, and log-ratios; no elements if nothing."""
    kept_scales: Tensor
    """(2, K) float32, log p and log q of what is kept as 1."""

    @classmethod
    def empty(cls, input: Tensor, *, kept: Tensor, kept_scales: Tensor) -> "JointStats":
        """Uninitialised, one number a row of `input`."""
        # not len(input): torch.compile would make a constant of it, here and wherever it traces
        N = input.shape[0]
        logps, reference_logps, kl = (input.new_empty(N, dtype=torch.float32) for _ in range(3))
        lse, reference_lse = (input.new_empty(N, dtype=torch.float64) for _ in range(2))
        return cls(logps, lse, reference_logps, reference_lse, kl, kept, kept_scales)


class ValueStats(NamedTuple):
    """What a forward of `tdpo1_token_values` finds out about each row, and what it keeps."""

    values: Tensor
    """(N,) float32, 0 where ignored."""
    slopes: Tensor
    """(N, D) derivatives of the values in the hidden states, in the input's dtype, for float16 in
    float32; no elements if nothing wants a gradient."""
    reference_logps: Tensor
    """(N,) float32, 0 where ignored."""
    reference_lse: Tensor
    """(N,) float64."""
    kept: Tensor
    """(K, V rounded up) exponentials of the reference that the mode keeps of the first K rows; no
    elements if none."""
    kept_sums: Tensor
    """(K,) float32, their sums without the target."""

    @classmethod
    def empty(
        cls, input: Tensor, slopes: Tensor, *, kept: Tensor, kept_sums: Tensor
    ) -> "ValueStats":
        """Uninitialised, one number a row of `input`."""
        N = input.shape[0]
        values, logps = (input.new_empty(N, dtype=torch.float32) for _ in range(2))
        lse = input.new_empty(N, dtype=torch.float64)
        return cls(values, slopes, logps, lse, kept, kept_sums)


def empty_slopes(input: Tensor, mode: str) -> Tensor:
    """Derivatives in the hidden states, uninitialised; no elements in the mode "scores".

    For float16 in float32: those of a confident token are below its smallest number until the
    upstream gradient, or the scale of a loss in it, has multiplied them.
    """
    dtype = torch.float32 if input.dtype == torch.float16 else input.dtype
    return input.new_empty(0 if mode == "scores" else input.shape, dtype=dtype)


class TokenStats(NamedTuple):
    """What a forward finds out about each row, and what it keeps for its backward."""

    logps: Tensor
    """(N,) float32, 0 where ignored."""
    lse: Tensor
    """(N,) float64."""
    kept: Tensor
    """What the mode keeps: (K, V rounded up) exponentials of the first K rows, or (N, D)
    derivatives in the hidden states; no elements if nothing."""
    kept_sums: Tensor
    """(K,) float32, sums of the exponentials without the target, before a softcap's slope."""


def log_softmax_(logits_RC: Tensor, lse_R: Tensor) -> Tensor:
    """Logits less their float64 log-sum-exp, in place.

    In two steps, as float32 holds it in two numbers: the first one leaves no error where
    exponentials of what is left are worth anything.
    """
    high_R = lse_R.float()
    return logits_RC.sub_(high_R[:, None]).sub_((lse_R - high_R).float()[:, None])
