"""Per-row sums of a pass over the vocabulary, and the statistics derived from them."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F


@dataclass(frozen=True)
class RowSums:
    """Online log-sum-exp of R rows over the columns seen so far, excluding the target's column.

    Derived values are cached. Fields may be (M, R) to derive those of M models together: with few
    rows a GPU is bound by launch latency.
    """

    max: Tensor
    """(R,) largest logit; the lowest finite float32 before the first column."""
    sum_exp: Tensor
    """(R,) Σ exp(z - max)."""
    target_logit: Tensor
    """(R,) logit of the target; -inf before its column was seen."""

    @classmethod
    def empty(cls, rows: int, device: torch.device) -> "RowSums":
        zeros_R = torch.zeros(rows, dtype=torch.float32, device=device)
        # finite, so that a row of only -inf adds exp(-inf) = 0 and never exp(-inf + inf) = NaN
        lowest_R = torch.full_like(zeros_R, torch.finfo(torch.float32).min)
        return cls(lowest_R, zeros_R, torch.full_like(zeros_R, float("-inf")))

    @classmethod
    def of_both(cls, policy: "RowSums", reference: "RowSums") -> "RowSums":
        """Stack the sums of two models, (R,) each, to (2, R)."""
        return cls(
            torch.stack([policy.max, reference.max]),
            torch.stack([policy.sum_exp, reference.sum_exp]),
            torch.stack([policy.target_logit, reference.target_logit]),
        )

    def add(self, logits_RC: Tensor, target_logit_R: Tensor) -> "RowSums":
        """Add columns whose target is set to -inf; `logits_RC` becomes exp(z - max) in place."""
        max_R = torch.maximum(self.max, logits_RC.amax(1))
        logits_RC.sub_(max_R[:, None]).exp_()
        sum_exp_R = self.sum_exp * (self.max - max_R).exp() + logits_RC.sum(1)
        return RowSums(max_R, sum_exp_R, torch.maximum(self.target_logit, target_logit_R))

    # float64: on a CPU the last bits of a float32 result depend on whether the row is processed by
    # a vector instruction or in the scalar tail

    @cached_property
    def logps(self) -> Tensor:
        """(R,) log p(target) = -softplus(lse_others - z_y).

        Accurate for confident tokens too: in float32 lse - z_y is 0 from a margin of 16 nats on.
        """
        return -self.surprisal.float()

    @cached_property
    def surprisal(self) -> Tensor:
        """(R,) float64, -log p(target), in nats."""
        return _model_by_model(F.softplus, self.lse_others - self.target_logit)

    @cached_property
    def lse(self) -> Tensor:
        """(R,) float64, log Σ exp(z) over all columns, the target's included."""
        return _model_by_model(torch.logaddexp, self.lse_others, self.exact_target_logit)

    @cached_property
    def lse_over_max(self) -> Tensor:
        """(R,) float64, lse - max, without the cancellation of subtracting a large max."""
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
    """Apply `function` to (R,) or (M, R) tensors, on a CPU one model at a time.

    On a CPU the last bit of a float64 result depends on its position too: computed together, equal
    models would get a KL of 1e-17 instead of 0. On a GPU all threads compute the same.
    """
    if values[0].dim() == 1 or not values[0].is_cpu:
        return function(*values)
    return torch.stack([function(*of_model) for of_model in zip(*values, strict=True)])


@dataclass(frozen=True)
class JointSums:
    """Sums of R rows under both models, excluding the target's column."""

    models: RowSums
    """(2, R), of policy and reference."""
    gap: Tensor
    """(R,) Σ exp(z - max) · (z - z' - base_gap), with logits z of the model that the KL's
    expectation is under and z' of the other one."""
    base_gap: Tensor
    """(R,) offset of the sum, see `base_gap`."""
    under_reference: bool
    """Whether the KL's expectation is under the reference; else under the policy."""

    @cached_property
    def kl(self) -> Tensor:
        """KL(first ‖ second), (R,) float32; the expectation is under the first model.

            KL = Σ p_j · [(z_j - a) - (z'_j - a')] - (lse - a) + (lse' - a')

        holds for any a and a'. They are the target's logits where the target is the first model's
        likeliest token (and its logit under the second is not -inf), else each model's largest
        other logit. This keeps all terms of the order of the KL: with plain logits near 200 the
        error would be 2e-5.
        """
        models = self.models
        first, second = (1, 0) if self.under_reference else (0, 1)
        # subtract in float64: near 200 the spacing of float32 is 1e-5
        target_logit_2R = models.exact_target_logit
        at_target_R = models.target_logit[first] >= models.max[first]
        at_target_R &= models.target_logit[second] > -torch.inf
        pivot_2R = torch.where(at_target_R, target_logit_2R, models.max.double())
        pivot_gap_R = pivot_2R[first] - pivot_2R[second]
        lse_2R = torch.where(at_target_R, models.surprisal, models.lse_over_max)
        over_base_R = self.gap - models.sum_exp[first] * (pivot_gap_R - self.base_gap)
        # not exp(max - lse), which cancels for large logits
        others_R = over_base_R / models.lse_over_max[first].exp()
        target_gap_R = target_logit_2R[first] - target_logit_2R[second]
        target_R = models.surprisal[first].neg().exp() * (target_gap_R - pivot_gap_R)
        # NaN where the target's logit is -inf under the first model: it then contributes 0
        target_R.nan_to_num_(nan=0, posinf=torch.inf, neginf=-torch.inf)
        return (others_R + target_R - lse_2R[first] + lse_2R[second]).float()

    @property
    def results(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        """The first five fields of JointStats, (R,) each."""
        (logps_R, reference_logps_R), (lse_R, reference_lse_R) = self.models.logps, self.models.lse
        return logps_R, lse_R, reference_logps_R, reference_lse_R, self.kl


def base_gap(first_logit_R: Tensor, second_logit_R: Tensor) -> Tensor:
    """Offset of the logit gaps summed in `JointSums`, (R,): the gap of the targets' logits.

    Any offset gives the same KL, so it is 0 where a logit is infinite. This one removes a constant
    shift between the two models' logits, which would cost precision in the sums.
    """
    return (first_logit_R - second_logit_R).nan_to_num_(nan=0, posinf=0, neginf=0)


class JointStats(NamedTuple):
    """Results of a forward over two models, (N,) each, and tensors kept for its backward.

    Float32, except for log-sum-exps in float64: rounding these to float32 would give all
    probabilities of a row a relative error, 1e-4 at logits of 1,000.
    """

    logps: Tensor
    """0 for ignored rows, like `reference_logps` and `kl`."""
    lse: Tensor
    reference_logps: Tensor
    reference_lse: Tensor
    kl: Tensor
    kept: Tensor
    """(2, K, V rounded up) for the first K rows: the larger of both models' exponentials, and
    their log-ratio (see token_logps_kl_kernels.py); empty if the mode keeps nothing."""
    kept_scales: Tensor
    """(2, K) float32, log p and log q that a stored exponential of 1 stands for."""

    @classmethod
    def empty(cls, input: Tensor, *, kept: Tensor, kept_scales: Tensor) -> "JointStats":
        """Uninitialised results for the rows of `input`."""
        # not len(input), which torch.compile would specialize to a constant
        N = input.shape[0]
        logps, reference_logps, kl = (input.new_empty(N, dtype=torch.float32) for _ in range(3))
        lse, reference_lse = (input.new_empty(N, dtype=torch.float64) for _ in range(2))
        return cls(logps, lse, reference_logps, reference_lse, kl, kept, kept_scales)


class ValueStats(NamedTuple):
    """Results of a forward of `tdpo1_token_values`, and tensors kept for its backward."""

    values: Tensor
    """(N,) float32, 0 for ignored rows."""
    slopes: Tensor
    """(N, D) derivatives of the values with respect to the hidden states, in the input's dtype,
    float32 for float16; empty if no gradient is required."""
    reference_logps: Tensor
    """(N,) float32, 0 for ignored rows."""
    reference_lse: Tensor
    """(N,) float64."""
    kept: Tensor
    """(K, V rounded up) exponentials of the reference for the first K rows; empty if the mode
    keeps none."""
    kept_sums: Tensor
    """(K,) float32, their sums without the target."""

    @classmethod
    def empty(
        cls, input: Tensor, slopes: Tensor, *, kept: Tensor, kept_sums: Tensor
    ) -> "ValueStats":
        """Uninitialised results for the rows of `input`."""
        N = input.shape[0]
        values, logps = (input.new_empty(N, dtype=torch.float32) for _ in range(2))
        lse = input.new_empty(N, dtype=torch.float64)
        return cls(values, slopes, logps, lse, kept, kept_sums)


def empty_slopes(input: Tensor, mode: str) -> Tensor:
    """Derivatives with respect to the hidden states, uninitialised; empty in mode "scores".

    Float32 for float16 inputs: those of a confident token would underflow float16 until they are
    multiplied with the upstream gradient, which may carry a loss scale.
    """
    dtype = torch.float32 if input.dtype == torch.float16 else input.dtype
    return input.new_empty(0 if mode == "scores" else input.shape, dtype=dtype)


class TokenStats(NamedTuple):
    """Results of a forward of `token_logps`, and tensors kept for its backward."""

    logps: Tensor
    """(N,) float32, 0 for ignored rows."""
    lse: Tensor
    """(N,) float64 log-sum-exp of all columns."""
    kept: Tensor
    """(K, V rounded up) exponentials of the first K rows, or (N, D) derivatives with respect to
    the hidden states; empty if the mode keeps nothing."""
    kept_sums: Tensor
    """(K,) float32, sums of the exponentials without the target, before the softcap's slope."""


def log_softmax_(logits_RC: Tensor, lse_R: Tensor) -> Tensor:
    """Logits minus their float64 log-sum-exp, in place.

    The log-sum-exp is split into a high and a low float32. Subtracting the high part is exact for
    logits close to it, the only ones with a probability that matters.
    """
    high_R = lse_R.float()
    return logits_RC.sub_(high_R[:, None]).sub_((lse_R - high_R).float()[:, None])
