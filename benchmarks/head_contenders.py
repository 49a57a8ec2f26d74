"""Implementations that turn hidden states and a head into log-probabilities, behind one interface.

A contender is a function of a case's tensors that returns log p of every token, or a scalar loss.
It imports its library when called: one that is not installed is reported, and the others run.
"""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from fastpref_kernels import get_workspace_mib, set_workspace_mib, token_logps
from torch import Tensor
from torch.nn import functional as F

JOBS = ("forward", "train", "frozen")
"""Log-probabilities only; with gradients of hidden states and head; of hidden states only."""
LEAN_MIB = 640
"""Workspace too small to keep exponentials, except with the smallest vocabulary; twice the size of
the logit slices."""
HALF_MIB = 2304
"""Workspace that holds the exponentials of half of 16,384 rows of S1."""
STORE_MIB = 16 * 1024
"""Workspace that holds the exponentials of every shape, which saves recomputing the logits."""


@dataclass(frozen=True, slots=True)
class Contender:
    """One implementation."""

    name: str
    score: Callable[[Tensor, Tensor, Tensor, float | None], Tensor]
    """input, weight, target, softcap -> log p (N,), or a scalar to minimise."""
    per_token: bool = True
    """Whether `score` returns log p of each token; else a scalar."""
    note: str = ""
    """How it differs, for the table's last column."""
    takes_softcap: bool = True
    jobs: tuple[str, ...] = JOBS


class CannotRunError(Exception):
    """A contender does not support a case; the message says why."""


def run_job(contender: Contender, job: str, case: Any) -> tuple[Tensor, list[Tensor]]:
    """Run a job once; returns the result and the gradients of hidden states and head.

    Raises:
        CannotRunError: the contender does not support the job, or the case's softcap.
    """
    if job not in contender.jobs:
        raise CannotRunError(f"no {job} job")
    if case.softcap is not None and not contender.takes_softcap:
        raise CannotRunError("no softcap")
    input_ND = case.input.detach().requires_grad_(job != "forward")
    weight_VD = case.weight.detach().requires_grad_(job == "train")
    with torch.set_grad_enabled(job != "forward"):
        value = contender.score(input_ND, weight_VD, case.target, case.softcap)
    if job == "forward":
        return value, []
    leaves = [leaf for leaf in (input_ND, weight_VD) if leaf.requires_grad]
    upstream = case.grad.to(value.dtype) if contender.per_token else None
    return value.detach(), list(torch.autograd.grad(value, leaves, upstream))


@contextmanager
def workspace(mib: float) -> Iterator[None]:
    before = get_workspace_mib()
    set_workspace_mib(mib)
    try:
        yield
    finally:
        set_workspace_mib(before)


def fastpref_within(mib: float) -> Callable[[Tensor, Tensor, Tensor, float | None], Tensor]:
    """`token_logps` with a given workspace limit, which determines its mode."""

    def score(input: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
        # with a frozen head no exponentials are kept, so the limit does not matter
        with workspace(mib if weight.requires_grad else get_workspace_mib()):
            return token_logps(input, weight, target, logit_softcap=softcap)

    return score


def eager(input: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
    logits_NV = F.linear(input, weight)
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return -F.cross_entropy(logits_NV.float(), target, reduction="none")


compiled = torch.compile(eager, dynamic=False)


def torch_linear_cross_entropy(
    input: Tensor, weight: Tensor, target: Tensor, softcap: float | None
) -> Tensor:
    if not hasattr(F, "linear_cross_entropy"):
        raise CannotRunError(f"needs torch >= 2.13, this is {torch.__version__}")
    return -F.linear_cross_entropy(input, weight, target, reduction="none")


def liger_cross_entropy(
    input: Tensor, weight: Tensor, target: Tensor, softcap: float | None
) -> Tensor:
    needs_gpu(input)
    from liger_kernel.transformers.functional import liger_fused_linear_cross_entropy

    return liger_fused_linear_cross_entropy(input, weight, target, softcap=softcap)


def liger_dpo(input: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
    from liger_kernel.chunked_loss import LigerFusedLinearDPOLoss

    length = 512 if len(input) % 1024 == 0 else len(input) // 2
    loss = LigerFusedLinearDPOLoss(use_ref_model=False)
    # the first half of the batch is chosen, the second rejected
    return loss(weight, input.unflatten(0, (-1, length)), target.unflatten(0, (-1, length)))[0]


def cce(
    input: Tensor,
    weight: Tensor,
    target: Tensor,
    softcap: float | None,
    *,
    filter_eps: str | None,
) -> Tensor:
    needs_gpu(input)
    from cut_cross_entropy import linear_cross_entropy

    options = {"softcap": softcap, "reduction": "none", "filter_eps": filter_eps}
    return -linear_cross_entropy(input, weight, target, **options)


def quack(input: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
    needs_gpu(input)
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(input, weight, target)


def trl(input: Tensor, weight: Tensor, target: Tensor, softcap: float | None) -> Tensor:
    from trl.kernels.chunked_logprob import ChunkedLogProbFunction

    # temperature 1, the tile width of TRL's DPO trainer, no extra outputs
    arguments = (input, weight, None, target, 1.0, 32_768, softcap, 1.0, ())
    return ChunkedLogProbFunction.apply(*arguments)[0]


def needs_gpu(input: Tensor) -> None:
    if not input.is_cuda:
        raise CannotRunError("needs a GPU")


CONTENDERS = {
    contender.name: contender
    for contender in [
        Contender("fastpref", fastpref_within(LEAN_MIB), note="workspace of 640 MiB"),
        Contender(
            "fastpref half",
            fastpref_within(HALF_MIB),
            note="workspace of 2.25 GiB",
            jobs=("train",),
        ),
        Contender(
            "fastpref large",
            fastpref_within(STORE_MIB),
            note="workspace of 16 GiB",
            jobs=("forward", "train"),
        ),
        Contender("torch eager", eager),
        Contender("torch.compile", compiled),
        Contender(
            "torch linear CE",
            torch_linear_cross_entropy,
            takes_softcap=False,
            note="F.linear_cross_entropy, reduction none",
        ),
        Contender("Liger CE", liger_cross_entropy, per_token=False, note="returns the mean"),
        Contender(
            "Liger DPO",
            liger_dpo,
            per_token=False,
            takes_softcap=False,
            jobs=("train",),
            note="the whole loss without reference, pairs of 512 tokens",
        ),
        Contender("CCE", partial(cce, filter_eps=None), note="gradient filter off"),
        Contender(
            "CCE filtered",
            partial(cce, filter_eps="high"),
            note="its default: drops gradients below 2^-12",
        ),
        Contender("QuACK", quack, per_token=False, takes_softcap=False, note="returns the mean"),
        Contender("TRL", trl, note="the chunked log-probability of its DPO trainer"),
    ]
}
