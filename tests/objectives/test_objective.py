"""Objectives against the seed repositories' formulas in float64, on padded full-logits batches."""

from copy import deepcopy
from types import SimpleNamespace

import pytest
import torch
from fastpref_kernels import TokenScores
from tiny_models import build_model
from torch import Tensor
from torch.nn import functional as F

from fastpref.batch import EncodedRow
from fastpref.batches.packed import pack_rows
from fastpref.batches.padded import pad_rows
from fastpref.config import (
    LOSSES,
    DPOConfig,
    IPOConfig,
    LossConfig,
    SFTConfig,
    SimPOConfig,
    TDPOConfig,
    TISDPOConfig,
)
from fastpref.model.attention.interface import build_attention
from fastpref.model.scorer import TokenScorer
from fastpref.objectives.objective import build_objective
from fastpref.objectives.step_loss import StepLoss
from fastpref.train.logs.metrics import name_for_split

ROWS = [
    EncodedRow([5, 6], [7, 8, 2], [9, 2], [0.7, 1.3, 0.0], [1.1, 0.0]),
    EncodedRow([5], [3, 2], [4, 4, 4, 2], [-0.5, 0.0], [1.0, 0.9, 0.8, 0.0]),
]
V = 11
CONFIGS = {
    "sft": SFTConfig(),
    "dpo": DPOConfig(),
    "cdpo": DPOConfig(label_smoothing=0.2),
    "dpo reference_free": DPOConfig(reference_free=True),
    "dpo weighted": DPOConfig(token_level=True),
    "ipo": IPOConfig(beta=0.3),
    "simpo": SimPOConfig(beta=1.7, gamma=0.6),
    "tdpo1": TDPOConfig(if_tdpo2=False),
    "tdpo2": TDPOConfig(alpha=0.7),
    "tisdpo": TISDPOConfig(),
    "tisdpo token_level": TISDPOConfig(token_level=True, alpha=0.3),
}


def token_scores(log_p_NV: Tensor, log_q_NV: Tensor, target: Tensor, direction: str | None):
    log_ratio_NV = log_p_NV - log_q_NV
    kl_N = None
    if direction == "reference_policy":
        kl_N = -(log_q_NV.exp() * log_ratio_NV).sum(-1)
    elif direction == "policy_reference":
        kl_N = (log_p_NV.exp() * log_ratio_NV).sum(-1)
    logps_N, reference_logps_N = (
        log_NV.gather(1, target[:, None])[:, 0] for log_NV in (log_p_NV, log_q_NV)
    )
    return TokenScores(logps_N, reference_logps_N, kl_N)


def seed_loss(config: LossConfig, log_p: Tensor, log_q: Tensor, batch) -> Tensor:
    """The paper's formula, or the seeds' own composition, of masked sums over padded rows."""
    weighted = isinstance(config, TISDPOConfig) or getattr(config, "token_level", False)
    weights = batch.token_weights.double() if weighted else torch.ones(len(batch.target)).double()
    label_p, label_q = (x.gather(1, batch.target[:, None])[:, 0] for x in (log_p, log_q))

    def total(values: Tensor) -> Tensor:
        return torch.stack([(weights * values)[batch.sequence_ids == i].sum() for i in range(4)])

    M = total(label_p - label_q)
    M_w, M_l = M[:2], M[2:]
    if isinstance(config, SFTConfig):
        return -total(label_p)
    if isinstance(config, DPOConfig):
        P = total(label_p)
        h = P[:2] - P[2:] if config.reference_free else M_w - M_l
        eps = config.label_smoothing
        return -(1 - eps) * F.logsigmoid(config.beta * h) - eps * F.logsigmoid(-config.beta * h)
    if isinstance(config, IPOConfig):
        return (M_w - M_l - 1 / (2 * config.beta)) ** 2
    if isinstance(config, SimPOConfig):
        P = total(label_p) / torch.bincount(batch.sequence_ids)
        return -F.logsigmoid(config.beta * (P[:2] - P[2:]) - config.gamma)
    if isinstance(config, TDPOConfig):
        K = total((log_q.exp() * (log_q - log_p)).sum(-1))
        K_w, K_l = K[:2], K[2:]
        z = M_w - M_l - (K_l - K_w)
        if config.if_tdpo2:
            z = M_w - M_l - config.alpha * (K_l - K_w.detach())
        return -F.logsigmoid(config.beta * z)
    assert isinstance(config, TISDPOConfig)
    K = total((log_p.exp() * (log_p - log_q)).sum(-1))
    z = M_w - M_l
    if config.token_level:
        z = z - config.alpha * (K[:2] - K[2:])
    return -F.logsigmoid(config.beta * z)


def test_every_loss_is_held_to_its_formula():
    missing = set(LOSSES.values()) - {type(config) for config in CONFIGS.values()}
    assert not missing, "a loss has an entry in CONFIGS, and its formula in seed_loss"


@pytest.mark.parametrize("name", CONFIGS)
def test_values_and_gradients_are_the_seed_formulas(name):
    config = CONFIGS[name]
    objective = build_objective(config)
    batch = pad_rows(ROWS, pad_token_id=0)
    generator = torch.Generator().manual_seed(0)
    N = len(batch.target)
    logits = torch.randn(N, V, generator=generator, dtype=torch.float64, requires_grad=True)
    reference = torch.randn(N, V, generator=generator, dtype=torch.float64)
    log_p, log_q = logits.log_softmax(-1), reference.log_softmax(-1)

    expected = seed_loss(config, log_p, log_q, batch)
    (expected_grad,) = torch.autograd.grad(expected.sum(), logits, retain_graph=True)
    scores = token_scores(log_p, log_q, batch.target, objective.needs.kl)
    if not objective.needs.reference:
        scores = scores._replace(reference_logps=None)
    losses, metrics = objective.losses(
        TokenScores(*(None if x is None else x.float() for x in scores)), batch
    )
    (grad,) = torch.autograd.grad(losses.sum(), logits)

    torch.testing.assert_close(losses.double(), expected, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(grad, expected_grad, rtol=1e-5, atol=1e-6)
    assert not any(value.requires_grad for value in metrics.values())
    assert {len(value) for value in metrics.values()} == {len(losses)}
    for kind, margin in (("rewards", "margins"), ("kl", "margin")):
        if f"{kind}/{margin}" in metrics:
            difference = metrics[f"{kind}/chosen"] - metrics[f"{kind}/rejected"]
            assert torch.equal(metrics[f"{kind}/{margin}"], difference)
    weights = batch.token_weights.double() if objective.needs.weights else torch.ones(N)
    for side, first in (("chosen", 0), ("rejected", 2)):
        for key, of_tokens in (("", weights), ("_unweighted", torch.ones(N))):
            logps = metrics.get(f"logps/{side}{key}", torch.zeros(0))
            for i, value in enumerate(logps.tolist()):
                own = batch.sequence_ids == first + i
                values = log_p.gather(1, batch.target[:, None])[:, 0].detach()
                assert value == pytest.approx((of_tokens * values)[own].sum().item(), rel=1e-5)


def test_a_difference_of_models_is_not_lost_in_long_responses():
    batch = pad_rows([EncodedRow([3], [5] * 5, [6] * 5)], pad_token_id=0)
    # five of these are 1.25 units in the last place of the sum, -1280
    difference = 2.0**-15
    reference_logps_N = torch.full((10,), -256.0)
    scores = TokenScores(reference_logps_N + difference, reference_logps_N, None)
    for name in ("dpo", "ipo", "tisdpo"):
        _, metrics = build_objective(CONFIGS[name]).losses(scores, batch)
        expected = CONFIGS[name].beta * 5 * difference
        assert metrics["rewards/chosen"].item() == pytest.approx(expected, rel=1e-6), name


@pytest.mark.parametrize("name", [name for name in CONFIGS if name != "sft"])
def test_a_loss_that_starts_at_log_two_is_that_of_equal_models(name):
    objective = build_objective(CONFIGS[name])
    batch = pad_rows(ROWS, pad_token_id=0)
    logps_N = -torch.arange(1.0, 1 + len(batch.target))
    zeros_N = torch.zeros_like(logps_N)
    losses, _ = objective.losses(TokenScores(logps_N, logps_N, zeros_N), batch)
    log_two = torch.full_like(losses, 2.0).log()
    assert objective.starts_at_log_two == torch.allclose(losses, log_two)


def test_rewards_compare_with_the_reference_also_where_the_loss_does_not():
    batch = pad_rows(ROWS, pad_token_id=0)
    generator = torch.Generator().manual_seed(0)
    N = len(batch.target)
    scores = TokenScores(
        *(torch.randn(N, generator=generator) for _ in ("policy", "reference")), None
    )
    free, with_reference = (
        build_objective(CONFIGS[name]).losses(scores, batch)[1]
        for name in ("dpo reference_free", "dpo")
    )
    for name in ("rewards/chosen", "rewards/rejected", "rewards/margins"):
        torch.testing.assert_close(free[name], with_reference[name], rtol=1e-5, atol=1e-6)


def log_probabilities(model, rows) -> Tensor:
    """Of the scored tokens' positions (N, V), by transformers, one sequence after the other."""
    parts = []
    for side in ("chosen", "rejected"):
        for row in rows:
            ids, scored = getattr(row, f"{side}_ids"), getattr(row, f"{side}_scored")
            logits = model(torch.tensor([[*row.prompt_ids, *ids]])).logits[0]
            own = logits[len(row.prompt_ids) - 1 : -1].log_softmax(-1)
            parts.append(own if scored is None else own[torch.tensor(scored)])
    return torch.cat(parts)


@pytest.mark.parametrize("layout", [pad_rows, pack_rows])
@pytest.mark.parametrize("name", ["simpo", "tdpo1", "tdpo2", "tisdpo", "tisdpo token_level"])
def test_tokens_that_are_not_scored_have_no_part_in_a_loss(name, layout):
    config, rows = CONFIGS[name], list(ROWS)
    rows[0] = rows[0]._replace(chosen_scored=[True, False, True])
    rows[1] = rows[1]._replace(rejected_scored=[False, True, True, False])
    policy = build_model("llama")
    reference = deepcopy(policy)
    for parameter in reference.parameters():
        torch.nn.init.normal_(parameter, std=0.25)
    batch = layout(rows, pad_token_id=0)
    scored = batch.target >= 0
    learned = SimpleNamespace(
        target=batch.target[scored],
        sequence_ids=batch.sequence_ids[scored],
        token_weights=batch.token_weights[scored],
    )
    exact = deepcopy(policy).double()
    with torch.no_grad():
        log_q = log_probabilities(deepcopy(reference).double(), rows)
    expected = seed_loss(config, log_probabilities(exact, rows), log_q, learned)
    expected.sum().backward()

    objective = build_objective(config)
    scorers = [TokenScorer(model, build_attention("sdpa")) for model in (policy, reference)]
    step_loss = StepLoss(objective, *scorers)
    # without all metrics TDPO1 and TIS-DPO are computed in another way
    for step in (None, 1):
        policy.zero_grad()
        losses, _ = step_loss.compute(batch, step)
        losses.sum().backward()
        torch.testing.assert_close(losses.double(), expected, rtol=1e-4, atol=1e-5)
        for ours, theirs in zip(policy.parameters(), exact.parameters(), strict=True):
            torch.testing.assert_close(ours.grad.double(), theirs.grad, rtol=1e-3, atol=1e-3)


def test_metric_names_are_the_seeds():
    pairs = {"rewards/chosen", "rewards/rejected", "rewards/accuracies", "rewards/margins"}
    pairs |= {"logps/chosen", "logps/rejected", "loss"}
    kl = {"kl/chosen", "kl/rejected", "kl/margin"}
    expected = {"sft": {"logps/chosen", "loss"}, "dpo": pairs, "ipo": pairs, "simpo": pairs}
    expected |= {"tdpo2": pairs | kl}
    unweighted = {"logps/chosen_unweighted", "logps/rejected_unweighted"}
    expected |= {"tisdpo": pairs | unweighted, "dpo weighted": pairs | unweighted}
    expected |= {"tisdpo token_level": pairs | unweighted | kl}
    batch = pad_rows(ROWS, pad_token_id=0)
    ones_N = torch.ones(len(batch.target))
    for name, names in expected.items():
        _, metrics = build_objective(CONFIGS[name]).losses(
            TokenScores(ones_N, ones_N, ones_N if names >= kl else None), batch
        )
        assert set(metrics) == names, name
        held_out = {name_for_split(metric, "eval") for metric in metrics}
        assert set(CONFIGS[name].held_out_names) == held_out, name


def test_every_tenth_step_and_held_out_rows_tell_the_kl_that_tisdpo_trains_without():
    batch = pad_rows(ROWS, pad_token_id=0)
    models = [build_model(family, vocab_size=V) for family in ("llama", "qwen2")]
    scorers = [TokenScorer(model, build_attention("sdpa")) for model in models]
    plain, with_kl = (
        StepLoss(build_objective(TISDPOConfig(token_level=token_level)), *scorers)
        for token_level in (False, True)
    )
    assert "kl/margin" not in plain.compute(batch, 1)[1]
    for step in (None, 0, 10):
        metrics, expected = (step_loss.compute(batch, step)[1] for step_loss in (plain, with_kl))
        for name in ("kl/chosen", "kl/rejected", "kl/margin"):
            assert torch.equal(metrics[name], expected[name]) and metrics[name].abs().min() > 1e-3


def test_a_micro_batch_without_pairs_gives_no_losses_and_all_metric_names():
    objective = build_objective(TDPOConfig())
    batch = pad_rows([], pad_token_id=0)
    zeros_N = torch.zeros(0, requires_grad=True)
    losses, metrics = objective.losses(TokenScores(zeros_N, zeros_N, zeros_N), batch)
    assert losses.shape == (0,) and losses.requires_grad
    assert len(metrics) == 10


@pytest.mark.parametrize(
    ("family", "config", "without_kl"),
    [
        ("llama", TDPOConfig(if_tdpo2=False), True),
        # the mean of logits that a softcap bends is not that of hidden states
        ("gemma2", TDPOConfig(if_tdpo2=False), False),
        ("llama", TISDPOConfig(), True),
    ],
    ids=["tdpo1", "tdpo1 softcap", "tisdpo"],
)
def test_a_step_whose_metrics_need_no_kl_has_the_losses_of_one_whose_do(family, config, without_kl):
    policy, reference = (TokenScorer(build_model(family)) for _ in range(2))
    with torch.no_grad():
        for parameter in reference.parameters():
            parameter.mul_(1.05)
    step_loss = StepLoss(build_objective(config), policy, reference)
    batch = pad_rows(ROWS, pad_token_id=0)
    (losses, metrics), (expected, detailed) = (step_loss.compute(batch, step) for step in (11, 10))
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
    assert "kl/chosen" in detailed and ("kl/chosen" not in metrics) == without_kl
