"""Implementations of TDPO's token values from two models' hidden states, behind one interface.

A contender returns, for each token, v = log p_y - log q_y + κ · KL(q ‖ p) and the KL, κ = 1 for
TDPO1 and 0.5 for TDPO2, where the KL of the chosen tokens (one half) is detached, as in its loss.
"frozen": both models share one head, which requires no gradient.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from fastpref_kernels import tdpo1_token_values, token_logps_and_kl
from head_cases import Case
from head_contenders import LEAN_MIB, STORE_MIB, CannotRunError, needs_gpu, workspace
from torch import Tensor
from torch.nn import functional as F

KL_JOBS = ("tdpo2", "tdpo1", "tdpo2 frozen", "tdpo1 frozen")
ALPHA = 0.5


@dataclass(frozen=True, slots=True)
class Models:
    """Tensors of a case; those that a job differentiates are leaves that require a gradient."""

    input: Tensor
    weight: Tensor
    target: Tensor
    reference_input: Tensor
    reference_weight: Tensor
    softcap: float | None
    pushes_kl: Tensor
    """(N,) bool: the tokens whose KL has a gradient."""

    @property
    def operands(self) -> tuple[Tensor, ...]:
        """Positional arguments of the ops."""
        return (
            self.input,
            self.weight,
            self.target,
            self.reference_input,
            self.reference_weight,
        )

    def values(self, log_ratios_N: Tensor, kl_N: Tensor, kappa: float) -> Tensor:
        if kappa == 1:
            return log_ratios_N + kl_N
        return log_ratios_N + kappa * torch.where(self.pushes_kl, kl_N, kl_N.detach())


@dataclass(frozen=True, slots=True)
class KLContender:
    """One implementation."""

    name: str
    score: Callable[[Models, float], tuple[Tensor, Tensor | None]]
    """models, κ -> values (N,) and KL (N,); None if the KL is not computed separately."""
    note: str = ""
    jobs: tuple[str, ...] = KL_JOBS


def models_of(case: Case, job: str) -> Models:
    """New leaves for one run of a job."""
    frozen = job.endswith("frozen")
    weight = case.weight.detach().requires_grad_(not frozen)
    # tokens alternate between chosen and rejected; only the rejected KL has a gradient
    pushes_kl = torch.arange(len(case.target), device=case.input.device) % 2 == 1
    return Models(
        case.input.detach().requires_grad_(),
        weight,
        case.target,
        case.reference_input,
        weight.detach() if frozen else case.reference_weight,
        case.softcap,
        pushes_kl,
    )


def run_kl_job(
    contender: KLContender, job: str, case: Case
) -> tuple[Tensor, Tensor | None, list[Tensor]]:
    """Run a job once; returns values, KL, and the gradients of hidden states and head.

    Raises:
        CannotRunError: the contender does not support the job.
    """
    if job not in contender.jobs:
        raise CannotRunError(f"no {job} job")
    models = models_of(case, job)
    values_N, kl_N = contender.score(models, kappa_of(job))
    leaves = [leaf for leaf in (models.input, models.weight) if leaf.requires_grad]
    gradients = list(torch.autograd.grad(values_N, leaves, case.grad.to(values_N.dtype)))
    return values_N.detach(), None if kl_N is None else kl_N.detach(), gradients


def kappa_of(job: str) -> float:
    return ALPHA if job.startswith("tdpo2") else 1.0


def fastpref(models: Models, kappa: float) -> tuple[Tensor, Tensor | None]:
    if kappa == 1 and models.softcap is None:
        return tdpo1_token_values(*models.operands), None
    scores = token_logps_and_kl(*models.operands, logit_softcap=models.softcap)
    return models.values(scores.logps - scores.reference_logps, scores.kl, kappa), scores.kl


def fastpref_within(mib: float) -> Callable[[Models, float], tuple[Tensor, Tensor | None]]:
    """`fastpref` with a given workspace limit, which determines its mode."""

    def score(models: Models, kappa: float) -> tuple[Tensor, Tensor | None]:
        with workspace(mib):
            return fastpref(models, kappa)

    return score


def trl_composed(models: Models, kappa: float) -> tuple[Tensor, Tensor | None]:
    from trl.kernels.chunked_divergence import ChunkedDivergenceFunction
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    input, weight, target, reference_input, reference_weight = models.operands
    softcap = models.softcap
    arguments = (None, target, 1.0, 32_768, softcap, 1.0, ())
    logps_N = ChunkedLogProbFunction.apply(input, weight, *arguments)[0]
    with torch.no_grad():
        reference_N = ChunkedLogProbFunction.apply(reference_input, reference_weight, *arguments)[0]
    # beta 0: KL(teacher ‖ student)
    kl_N = ChunkedDivergenceFunction.apply(
        input, weight, None, reference_input, reference_weight, None, 0.0, 1.0, 1.0, softcap, 1.0,
        softcap,
    )[0]  # fmt: skip
    return models.values(logps_N - reference_N, kl_N, kappa), kl_N


def seed_loss(models: Models, kappa: float) -> tuple[Tensor, Tensor | None]:
    """As in the TDPO repository: softmax of both models' float32 logits, then logarithm."""
    logits_NV = _logits(models.input, models.weight, models.softcap)
    with torch.no_grad():
        reference_NV = _logits(models.reference_input, models.reference_weight, models.softcap)
        reference_p_NV = reference_NV.softmax(-1)
        reference_logps_NV = reference_p_NV.log()
    logps_NV = logits_NV.softmax(-1).log()
    kl_N = (reference_p_NV * (reference_logps_NV - logps_NV)).sum(-1)
    index_N1 = models.target[:, None]
    log_ratios_N = (logps_NV.gather(1, index_N1) - reference_logps_NV.gather(1, index_N1))[:, 0]
    return models.values(log_ratios_N, kl_N, kappa), kl_N


def _eager(models: Models, kappa: float) -> tuple[Tensor, Tensor]:
    logps_NV = _logits(models.input, models.weight, models.softcap).log_softmax(-1)
    with torch.no_grad():
        reference_NV = _logits(models.reference_input, models.reference_weight, models.softcap)
        reference_NV = reference_NV.log_softmax(-1)
    kl_N = (reference_NV.exp() * (reference_NV - logps_NV)).sum(-1)
    index_N1 = models.target[:, None]
    log_ratios_N = (logps_NV.gather(1, index_N1) - reference_NV.gather(1, index_N1))[:, 0]
    return models.values(log_ratios_N, kl_N, kappa), kl_N


compiled = torch.compile(_eager, dynamic=False)


def fla_kl(models: Models, kappa: float) -> tuple[Tensor, Tensor | None]:
    needs_gpu(models.input)
    if models.softcap is not None:
        raise CannotRunError("no softcap")
    from fla.modules.fused_kl_div import fused_kl_div_loss

    input, weight, _, reference_input, reference_weight = models.operands
    # a scalar, the mean over the batch: the cost of training with it, but no per-token values
    loss = fused_kl_div_loss(input, reference_input, weight, reference_weight)
    return loss.expand(len(input)) / len(input), None


def _logits(input_ND: Tensor, weight_VD: Tensor, softcap: float | None) -> Tensor:
    logits_NV = F.linear(input_ND, weight_VD).float()
    return logits_NV if softcap is None else softcap * torch.tanh(logits_NV / softcap)


KL_CONTENDERS = {
    contender.name: contender
    for contender in [
        KLContender("fastpref", fastpref_within(LEAN_MIB), note="workspace of 640 MiB"),
        KLContender("fastpref large", fastpref_within(STORE_MIB), note="workspace of 16 GiB"),
        KLContender("TRL", trl_composed, note="its divergence and two of its log-probabilities"),
        KLContender("TDPO repository", seed_loss, note="softmax, then logarithm, of full logits"),
        KLContender("torch.compile", compiled, note="log-softmax of full logits"),
        KLContender("fla", fla_kl, note="mean KL alone, no log-probabilities", jobs=KL_JOBS[:1]),
    ]
}
