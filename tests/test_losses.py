"""Golden numbers of the seed repositories' own loss functions, and what each loss pushes."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from fastpref.losses import (
    dpo_loss,
    implicit_accuracies,
    ipo_loss,
    sft_loss,
    simpo_loss,
    tdpo_loss,
    tisdpo_loss,
)

# beta 0.1, alpha 0.5; log-ratios 1.2 / -0.8, KL 0.3 / 0.9
POLICY, REFERENCE = (-10.8, -13.8), (-12.0, -13.0)
LOGPS = (*POLICY, *REFERENCE)
RATIOS_AND_KL = (1.2, -0.8, 0.3, 0.9)

GOLDEN = [
    # loss, its inputs, options, value, rewards, gradient (None: no gradient at all)
    (dpo_loss, LOGPS, {}, 0.598139, (0.12, -0.08), (-0.045017, 0.045017)),
    (dpo_loss, LOGPS, {"label_smoothing": 0.1}, 0.618139, (0.12, -0.08), (-0.035017, 0.035017)),
    (dpo_loss, LOGPS, {"reference_free": True}, 0.554355, (0.12, -0.08), (-0.042556, 0.042556)),
    (ipo_loss, LOGPS, {}, 9.0, (0.12, -0.08), (-6.0, 6.0)),
    (
        tdpo_loss,
        RATIOS_AND_KL,
        {"if_tdpo2": False},
        0.625595,
        (0.15, 0.01),
        (-0.046506, 0.046506, -0.046506, 0.046506),
    ),
    (
        tdpo_loss,
        RATIOS_AND_KL,
        {},
        0.611755,
        (0.15, 0.01),
        (-0.045760, 0.045760, None, 0.022880),
    ),
    (tisdpo_loss, RATIOS_AND_KL, {}, 0.598139, (0.12, -0.08), (-0.045017, 0.045017, None, None)),
    (
        tisdpo_loss,
        RATIOS_AND_KL,
        {"token_level": True},
        0.584745,
        (0.09, -0.17),
        (-0.044275, 0.044275, 0.022138, -0.022138),
    ),
]


@pytest.mark.parametrize(("loss", "inputs", "options", "value", "rewards", "gradient"), GOLDEN)
def test_golden_numbers_of_the_seed_losses(loss, inputs, options, value, rewards, gradient):
    leaves = [torch.tensor([x], dtype=torch.float64, requires_grad=True) for x in inputs]
    losses, chosen_rewards, rejected_rewards = loss(*leaves, beta=0.1, **options)
    losses.sum().backward()
    assert losses.item() == pytest.approx(value, abs=1e-6)
    assert (chosen_rewards.item(), rejected_rewards.item()) == pytest.approx(rewards, abs=1e-6)
    for leaf, expected in zip(leaves, gradient, strict=False):
        if expected is None:
            assert leaf.grad is None
        else:
            assert leaf.grad.item() == pytest.approx(expected, abs=1e-6)


@pytest.mark.parametrize("loss", [dpo_loss, tdpo_loss, tisdpo_loss])
def test_loss_is_log_two_when_policy_is_reference(loss):
    same_P = torch.randn(4) if loss is dpo_loss else torch.zeros(4)
    losses, chosen_rewards, rejected_rewards = loss(*[same_P] * 4, beta=0.1)
    torch.testing.assert_close(losses, torch.full((4,), 2.0).log())
    assert not chosen_rewards.any() and not rejected_rewards.any()


@pytest.mark.parametrize("margin", [-1e4, 1e4])
def test_losses_and_gradients_stay_finite_at_extreme_margins(margin):
    ratios_P = torch.tensor([margin], requires_grad=True)
    zeros_P = torch.zeros(1)
    for losses, *_ in (
        dpo_loss(ratios_P, zeros_P, zeros_P, zeros_P, beta=1.0, label_smoothing=0.1),
        tdpo_loss(ratios_P, zeros_P, zeros_P, zeros_P, beta=1.0),
    ):
        (grad,) = torch.autograd.grad(losses.sum(), ratios_P)
        assert losses.isfinite().all() and grad.isfinite().all()


def test_rewards_carry_no_gradient():
    leaves: list[Tensor] = [torch.randn(3, requires_grad=True) for _ in range(4)]
    for loss in (dpo_loss, ipo_loss, tdpo_loss, tisdpo_loss):
        _, *rewards = loss(*leaves, beta=0.1)
        assert not any(reward.requires_grad for reward in rewards)


def test_sft_loss_is_the_negative_log_likelihood():
    logps = torch.tensor([math.log(0.25), math.log(0.5)])
    torch.testing.assert_close(sft_loss(logps).exp(), torch.tensor([4.0, 2.0]))


def test_simpo_compares_means_over_tokens_and_asks_for_a_margin():
    # 2 (-6 / 3 + 8 / 2) - 1 = 3
    leaves = [torch.tensor([x], requires_grad=True) for x in (-6.0, -8.0)]
    lengths = [torch.tensor([n]) for n in (3.0, 2.0)]
    losses, *rewards = simpo_loss(*leaves, *lengths, beta=2.0, gamma=1.0)
    losses.sum().backward()
    assert losses.item() == pytest.approx(math.log1p(math.exp(-3.0)))
    assert [reward.item() for reward in rewards] == [-4.0, -8.0]
    slope = 1 / (1 + math.exp(3.0))
    assert [leaf.grad.item() for leaf in leaves] == pytest.approx([-slope * 2 / 3, slope])
    assert not any(reward.requires_grad for reward in rewards)


def test_simpo_without_a_margin_is_ln_2_at_a_tie():
    losses, *_ = simpo_loss(*[torch.ones(1)] * 4, beta=2.0, gamma=0.0)
    assert losses.item() == pytest.approx(math.log(2.0))


def test_a_tie_is_not_an_accuracy():
    accuracies = implicit_accuracies(torch.tensor([1.0, 0.0, -1.0]), torch.zeros(3))
    assert accuracies.tolist() == [1.0, 0.0, 0.0]
    with pytest.raises(ValueError, match="rejected_rewards must have the shape of chosen_rewards"):
        implicit_accuracies(torch.zeros(2), torch.zeros(2, 1))


PAIR_LOSSES = [dpo_loss, ipo_loss, simpo_loss, tdpo_loss, tisdpo_loss]


def options_of(loss):
    return {"beta": 0.1} | ({"gamma": 1.0} if loss is simpo_loss else {})


@pytest.mark.parametrize("loss", PAIR_LOSSES)
@pytest.mark.parametrize("place", [1, 2, 3])
def test_tensors_of_other_shapes_are_refused_by_name(loss, place):
    inputs = [torch.ones(3)] * 4
    inputs[place] = torch.ones(3, 1)
    with pytest.raises(ValueError, match=r"must have the shape of \w+, \(3,\), got \(3, 1\)"):
        loss(*inputs, **options_of(loss))


@pytest.mark.parametrize("loss", PAIR_LOSSES)
@pytest.mark.parametrize("value", [[1.0] * 3, 1.0, None])
def test_what_is_no_tensor_is_refused_by_name(loss, value):
    inputs = [value, *[torch.ones(3)] * 3]
    with pytest.raises(ValueError, match=r"chosen_\w+ must be a tensor, got"):
        loss(*inputs, **options_of(loss))
    with pytest.raises(ValueError, match="logps must be a tensor, got"):
        sft_loss(value)


@pytest.mark.parametrize("loss", PAIR_LOSSES)
@pytest.mark.parametrize("beta", [0.0, -0.1, math.nan, math.inf])
def test_a_beta_out_of_its_range_is_refused(loss, beta):
    with pytest.raises(ValueError, match="beta must be > 0"):
        loss(*[torch.ones(3)] * 4, **options_of(loss) | {"beta": beta})


@pytest.mark.parametrize(
    ("loss", "option", "value"),
    [
        (dpo_loss, "label_smoothing", 0.5),
        (dpo_loss, "label_smoothing", -0.1),
        (simpo_loss, "gamma", -1.0),
        (tdpo_loss, "alpha", -1.0),
        (tisdpo_loss, "alpha", math.nan),
        (tisdpo_loss, "alpha", -1.0),
        (dpo_loss, "label_smoothing", None),
        (ipo_loss, "beta", None),
        (simpo_loss, "gamma", "1"),
        (tdpo_loss, "alpha", None),
        (tisdpo_loss, "beta", torch.tensor([0.1, 0.2])),
        (tdpo_loss, "alpha", np.array([0.1, 0.2])),
    ],
)
def test_other_options_too(loss, option, value):
    with pytest.raises(ValueError, match=f"{option} must be"):
        loss(*[torch.ones(3)] * 4, **options_of(loss) | {option: value})


@pytest.mark.parametrize("loss", PAIR_LOSSES)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_what_comes_in_16_bits_is_computed_in_float32(loss, dtype):
    inputs = [torch.tensor([100.0, 3.0, 1.0]) * factor for factor in (1.01, 0.97, 1.0, 0.9)]
    inputs = [x.to(dtype) for x in inputs]
    ours = loss(*inputs, **options_of(loss))
    expected = loss(*[x.double() for x in inputs], **options_of(loss))
    for value, exact in zip(ours, expected, strict=True):
        assert value.dtype == torch.float32
        torch.testing.assert_close(value.double(), exact, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("loss", [dpo_loss, ipo_loss])
def test_the_reference_gets_no_gradient(loss):
    leaves = [torch.randn(4, requires_grad=True) for _ in range(4)]
    loss(*leaves, beta=0.1)[0].sum().backward()
    assert leaves[0].grad is not None and leaves[1].grad is not None
    assert leaves[2].grad is None and leaves[3].grad is None


@pytest.mark.parametrize("loss", [tdpo_loss, tisdpo_loss])
def test_a_kl_without_weight_may_be_infinite(loss):
    leaves = [torch.tensor([x], requires_grad=True) for x in (1.2, -0.8, 0.3, math.inf)]
    options = {"token_level": True} if loss is tisdpo_loss else {}
    losses, *_ = loss(*leaves, beta=0.1, alpha=0.0, **options)
    losses.sum().backward()
    expected = dpo_loss(*[torch.tensor([x]) for x in LOGPS], beta=0.1)[0]
    torch.testing.assert_close(losses, expected)
    assert leaves[0].grad.isfinite() and leaves[3].grad == 0


@pytest.mark.parametrize("loss", [tdpo_loss, tisdpo_loss])
def test_an_infinite_kl_with_a_weight_is_not_hidden(loss):
    # the KL that each loss pushes down: of the rejected response, of the chosen one
    kl = (0.3, math.inf) if loss is tdpo_loss else (math.inf, 0.3)
    options = {"token_level": True} if loss is tisdpo_loss else {}
    losses, *_ = loss(*[torch.tensor([x]) for x in (1.2, -0.8, *kl)], beta=0.1, **options)
    assert losses.item() == math.inf


def test_an_infinite_margin_is_a_loss_of_zero():
    inputs = [torch.tensor([x], requires_grad=i < 2) for i, x in enumerate((0.0, -math.inf, 0, 0))]
    losses, *_ = dpo_loss(*[x.float() for x in inputs], beta=0.1)
    assert losses.item() == 0


@pytest.mark.parametrize("loss", PAIR_LOSSES)
def test_whole_numbers_are_computed_in_float32(loss):
    whole = [torch.tensor([n, n + 1]) for n in (-3, -5, 1, 2)]
    expected = loss(*[x.float() for x in whole], **options_of(loss))
    for result, same in zip(loss(*whole, **options_of(loss)), expected, strict=True):
        assert torch.equal(result, same) and result.dtype == torch.float32
