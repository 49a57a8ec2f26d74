"""Float64 oracle of the LM-head benchmarks, for a subset of rows and columns."""

import torch
from fastpref_kernels.gemm import matmul
from head_cases import Case
from head_contenders import Contender, run_job
from head_goals import GRADIENT_ERROR, KL_ERROR, LOGP_ERROR, VALUE_ERROR
from kl_contenders import KLContender, kappa_of, models_of, run_kl_job
from torch import Tensor

ORACLE_ROWS = 64
"""Number of rows whose log-probabilities and input gradients are compared with float64."""


class Oracle:
    """Log-probabilities and gradients of some rows and columns in float64."""

    def __init__(self, case: Case, job: str) -> None:
        self.case, self.job = case, job
        N = len(case.target)
        self.rows = torch.linspace(0, N - 1, min(N, ORACLE_ROWS), device=case.input.device).long()
        columns = torch.cat([case.target[self.rows], torch.arange(64, device=case.input.device)])
        self.columns = columns.unique()
        logits_RV = self._logits(case.input[self.rows])
        lse_R = logits_RV.logsumexp(-1)
        self.logps = logits_RV.gather(1, case.target[self.rows, None])[:, 0] - lse_R
        self.logp_bound = max(LOGP_ERROR, 2 * self._product_error(logits_RV))
        self.input_grad, self.weight_grad = self._gradients()

    @property
    def trains_head(self) -> bool:
        return self.job == "train"

    def run(self, contender: Contender) -> tuple[Tensor, list[Tensor]]:
        return run_job(contender, self.job, self.case)

    def errors(self, contender: Contender) -> dict:
        """Largest and mean error of log p and relative errors of the gradients; empty for
        contenders that return a scalar."""
        value, gradients = self.run(contender)
        if not contender.per_token:
            return {}
        errors = (value[self.rows].double() - self.logps).abs()
        found = {"logp_error": errors.max().item(), "logp_mean_error": errors.mean().item()}
        if gradients:
            found["input_grad_error"] = _relative(gradients[0][self.rows], self.input_grad)
        if len(gradients) > 1:
            found["weight_grad_error"] = _relative(gradients[1][self.columns], self.weight_grad)
        return found

    def missed(self, row: dict) -> str | None:
        """Accuracy bounds that a result of ours exceeds, as text; None if none."""
        bounds = {"kl_error": KL_ERROR, "value_error": VALUE_ERROR}
        bounds["logp_error"] = self.logp_bound
        bounds["input_grad_error"] = GRADIENT_ERROR
        bounds["weight_grad_error"] = GRADIENT_ERROR
        over = [
            f"{name} {row[name]:.1e} > {bound:.0e}"
            for name, bound in bounds.items()
            # not >, which NaN is not either
            if not row.get(name, 0.0) <= bound
        ]
        return ", ".join(over) or None

    def _product_error(self, true_RV: Tensor) -> float:
        """Error of the library's GEMM with 16-bit operands and float32 sums: the larger of those at
        the target logits and of the log-sum-exps, as log p is their difference."""
        product_RV = matmul(self.case.input.detach()[self.rows], self.case.weight.detach().t())
        logits_RV = self._capped(product_RV.double())
        target_R1 = self.case.target[self.rows, None]
        of_targets = (logits_RV - true_RV).gather(1, target_R1).abs().max().item()
        of_sums = (logits_RV.logsumexp(-1) - true_RV.logsumexp(-1)).abs().max().item()
        return max(of_targets, of_sums)

    def _gradients(self) -> tuple[Tensor, Tensor]:
        """Gradients of the selected rows' hidden states and of the selected columns' weights."""
        case = self.case
        input_grad = self._dlogits(self.rows) @ case.weight.double()
        weight_grad = torch.zeros(
            len(self.columns), case.weight.shape[1], dtype=torch.float64, device=case.input.device
        )
        if self.trains_head:
            for rows in torch.arange(len(case.target), device=case.input.device).split(256):
                dlogits_RC = self._dlogits(rows)[:, self.columns]
                weight_grad += dlogits_RC.t() @ case.input[rows].double()
        return input_grad, weight_grad

    def _dlogits(self, rows: Tensor) -> Tensor:
        logits_RV = self._logits(self.case.input[rows])
        dlogits_RV = -logits_RV.softmax(-1)
        dlogits_RV[torch.arange(len(rows)), self.case.target[rows]] += 1
        dlogits_RV *= self.case.grad[rows, None]
        if self.case.softcap is not None:
            dlogits_RV *= 1 - (logits_RV / self.case.softcap) ** 2
        return dlogits_RV

    def _logits(self, input_RD: Tensor, weight_VD: Tensor | None = None) -> Tensor:
        """Logits (R, V) in float64; on a GPU too, where 64 rows take milliseconds."""
        weight_VD = (self.case.weight if weight_VD is None else weight_VD).detach()
        return self._capped(input_RD.double() @ weight_VD.double().t())

    def _capped(self, logits_RV: Tensor) -> Tensor:
        softcap = self.case.softcap
        return logits_RV if softcap is None else softcap * torch.tanh(logits_RV / softcap)


class KLOracle(Oracle):
    """TDPO's token values, their KL and gradients in float64."""

    def __init__(self, case: Case, job: str) -> None:
        self.models, self.kappa = models_of(case, job), kappa_of(job)
        super().__init__(case, job)
        log_p_RV, log_q_RV = self._log_softmaxes(self.rows)
        ratios_RV = log_p_RV - log_q_RV
        self.kl = -(log_q_RV.exp() * ratios_RV).sum(-1)
        index_R1 = case.target[self.rows, None]
        self.values = ratios_RV.gather(1, index_R1)[:, 0] + self.kappa * self.kl

    def run(self, contender: KLContender) -> tuple[Tensor, list[Tensor]]:
        values_N, _, gradients = run_kl_job(contender, self.job, self.case)
        return values_N, gradients

    def errors(self, contender: KLContender) -> dict:
        """Mean error of the values and the KL, relative errors of the gradients."""
        values_N, kl_N, gradients = run_kl_job(contender, self.job, self.case)
        if contender.name == "fla":
            return {}
        found = {"value_error": (values_N[self.rows] - self.values).abs().mean().item()}
        if kl_N is not None:
            found["kl_error"] = (kl_N[self.rows] - self.kl).abs().mean().item()
        found["input_grad_error"] = _relative(gradients[0][self.rows], self.input_grad)
        if len(gradients) > 1:
            found["weight_grad_error"] = _relative(gradients[1][self.columns], self.weight_grad)
        return found

    @property
    def trains_head(self) -> bool:
        return not self.job.endswith("frozen")

    def _log_softmaxes(self, rows: Tensor) -> tuple[Tensor, Tensor]:
        models = self.models
        policy_RV = self._logits(models.input.detach()[rows])
        reference_RV = self._logits(models.reference_input[rows], models.reference_weight)
        return policy_RV.log_softmax(-1), reference_RV.log_softmax(-1)

    def _dlogits(self, rows: Tensor) -> Tensor:
        """g · (e_y - p + κ (p - q)), without the last term for tokens whose KL is detached."""
        log_p_RV, log_q_RV = self._log_softmaxes(rows)
        p_RV = log_p_RV.exp()
        dlogits_RV = -p_RV
        dlogits_RV[torch.arange(len(rows)), self.case.target[rows]] += 1
        pushes_R = self.models.pushes_kl[rows] if self.kappa != 1 else torch.ones_like(rows)
        dlogits_RV += self.kappa * pushes_R[:, None] * (p_RV - log_q_RV.exp())
        dlogits_RV *= self.case.grad[rows, None]
        if self.case.softcap is not None:
            logits_RV = self._logits(self.case.input[rows])
            dlogits_RV *= 1 - (logits_RV / self.case.softcap) ** 2
        return dlogits_RV


def _relative(actual: Tensor, expected: Tensor) -> float:
    return ((actual.double() - expected).norm() / expected.norm()).item()
