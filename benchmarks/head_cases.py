"""Shapes and inputs of the LM-head benchmarks: logits with the statistics of a trained model.

Random normal logits would be unfair: every probability would be below 2^-12, where some kernels
skip work. Here, as in a real model, frequent tokens are likely everywhere, entropy varies from
token to token, and about a quarter of a percent of all probabilities are above 2^-12.
"""

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Shape:
    """Shape of a language model's head."""

    hidden: int
    vocab: int
    softcap: float | None = None
    model: str = ""


SHAPES = {
    "S1": Shape(4096, 128_256, model="Llama-3-8B"),
    "S2": Shape(2048, 151_936, model="Qwen3-1.7B"),
    "S3": Shape(2304, 256_000, softcap=30.0, model="Gemma-2-2B"),
    "S4": Shape(4096, 32_000, model="Llama-2-7B"),
    "S5": Shape(2048, 248_320, model="D 2,048, V 248,320"),
    "tiny": Shape(128, 4096, model="for a CPU"),
    "tiny-cap": Shape(128, 4096, softcap=30.0, model="for a CPU"),
}

SMALL_SHAPES = {"S6": Shape(896, 151_936, model="Qwen2.5-0.5B")}
"""Shapes with so little GEMM work that launches and epilogues dominate."""

MEAN_ENTROPY = 2.6
"""Mean entropy of the next-token distributions in nats, as of SmolLM2-135M on chat responses."""
DRIFT_NATS = 0.077
"""Standard deviation of the logits' change from reference to policy. It gives a mean KL of 0.003
nats, as of SmolLM2-135M after one DPO step (0.0028; 0.034 after eight)."""
_PROBE_ROWS = 256


@dataclass(slots=True)
class Case:
    """Input of every contender."""

    name: str
    input: Tensor
    """(N, D) bfloat16."""
    weight: Tensor
    """(V, D) bfloat16."""
    target: Tensor
    """(N,) int64."""
    grad: Tensor
    """(N,) float32, upstream gradients, different for each token."""
    softcap: float | None
    reference_input: Tensor
    """(N, D) hidden states of a reference from which the policy has drifted, as in a few steps."""
    reference_weight: Tensor
    """(V, D) head of the reference."""

    @property
    def pass_flops(self) -> int:
        """Floating-point operations of one GEMM over all tokens, 2·N·D·V."""
        return 2 * self.input.numel() * self.weight.shape[0]


def synthetic_case(name: str, rows: int, device: str) -> Case:
    """Hidden states and a head with z = log π + r · s · (g·x), x and g normal.

    π is Zipf's law over the token ids, r in [0.5, 1.5] varies the entropy from token to token, and
    s is found by bisection for a mean entropy of 2.6 nats. Targets are sampled from the model.
    """
    shape = (SHAPES | SMALL_SHAPES)[name]
    generator = torch.Generator(device=device).manual_seed(0)
    options = {"device": device, "generator": generator}
    V, D = shape.vocab, shape.hidden
    weight_VD = torch.randn(V, D, dtype=torch.bfloat16, **options)
    weight_VD[:, 0] = -torch.log(torch.arange(V, device=device) + 2.7)
    input_ND = torch.randn(rows, D, dtype=torch.bfloat16, **options) / (D - 1) ** 0.5
    input_ND *= 0.5 + torch.rand(rows, 1, **options)
    input_ND[:, 0] = 1
    low, high = 0.5, 12.0
    for _ in range(12):
        spread = (low + high) / 2
        probe = _scaled(input_ND[:_PROBE_ROWS], spread)
        entropy = _entropy(_logits(probe, weight_VD, shape.softcap)).mean().item()
        low, high = (spread, high) if entropy > MEAN_ENTROPY else (low, spread)
    input_ND = _scaled(input_ND, (low + high) / 2)
    target_N = _draw(input_ND, weight_VD, shape.softcap, generator)
    return _case(f"{name} N={rows}", input_ND, weight_VD, target_N, shape.softcap, generator)


def real_case(path: Path, rows: int, device: str) -> Case:
    """Hidden states of real responses and the head of a real model.

    Args:
        path: A torch file with "head_int8" (V, D), "head_scale" (V, 1), "hidden" (N, D) and
            "target" (N,).
        rows: Maximum number of hidden states to use.
        device: Device of the tensors.
    """
    stored = torch.load(path, map_location=device, weights_only=True)
    weight_VD = (stored["head_int8"].float() * stored["head_scale"]).bfloat16()
    input_ND, target_N = stored["hidden"][:rows].bfloat16(), stored["target"][:rows]
    generator = torch.Generator(device=device).manual_seed(0)
    name = f"real N={len(target_N)}"
    return _case(name, input_ND.contiguous(), weight_VD, target_N, None, generator)


def statistics(case: Case) -> dict[str, float]:
    """Characteristic statistics of the logits, over the first rows."""
    logits_RV = _logits(case.input[:_PROBE_ROWS], case.weight, case.softcap)
    p_RV = logits_RV.softmax(-1)
    logps_R = logits_RV.log_softmax(-1).gather(1, case.target[:_PROBE_ROWS, None])
    return {
        "mean_entropy": _entropy(logits_RV).mean().item(),
        "mean_target_logp": logps_R.mean().item(),
        "share_above_2^-12": (p_RV >= 2**-12).float().mean().item(),
    }


def _case(
    name: str,
    input_ND: Tensor,
    weight_VD: Tensor,
    target_N: Tensor,
    softcap: float | None,
    generator: torch.Generator,
) -> Case:
    grad_N = torch.rand(len(target_N), device=input_ND.device, generator=generator)
    # as in DPO: positive for chosen tokens, negative for rejected ones, divided by N
    sign_N = torch.where(torch.arange(len(grad_N), device=grad_N.device) % 2 == 0, 1.0, -1.0)
    grad_N *= sign_N / len(grad_N)
    # KL = ½ Var(Δz) and Δz = W·Δh: a change of the logits by 0.077 nats gives a KL of 0.003
    size = DRIFT_NATS / (weight_VD.float().square().mean().sqrt() * weight_VD.shape[1] ** 0.5)
    drift_ND = torch.randn(input_ND.shape, device=input_ND.device, generator=generator) * size
    reference_ND = (input_ND.float() + drift_ND).bfloat16()
    return Case(
        name, input_ND, weight_VD, target_N, grad_N, softcap, reference_ND, weight_VD.clone()
    )


def _scaled(input_ND: Tensor, spread: float) -> Tensor:
    """Scale all columns except the first, which carries log π."""
    scaled_ND = input_ND * spread
    scaled_ND[:, 0] = 1
    return scaled_ND


def _logits(input_RD: Tensor, weight_VD: Tensor, softcap: float | None) -> Tensor:
    logits_RV = (input_RD @ weight_VD.t()).float()
    return logits_RV if softcap is None else softcap * torch.tanh(logits_RV / softcap)


def _entropy(logits_RV: Tensor) -> Tensor:
    logps_RV = logits_RV.log_softmax(-1)
    return -(logps_RV.exp() * logps_RV).sum(-1)


def _draw(
    input_ND: Tensor, weight_VD: Tensor, softcap: float | None, generator: torch.Generator
) -> Tensor:
    drawn = [
        _logits(input_RD, weight_VD, softcap).softmax(-1).multinomial(1, generator=generator)
        for input_RD in input_ND.split(512)
    ]
    return torch.cat(drawn)[:, 0]
