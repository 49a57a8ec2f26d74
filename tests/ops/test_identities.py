"""What the ops rest on, in float64: two identities of softmax over a linear head."""

import torch
from fastpref_kernels import naive
from oracle import double, nearby, random_head, random_target


def test_the_kl_over_one_head_is_the_bregman_divergence_of_its_log_sum_exp():
    """KL(q ‖ p) = lse - lse' - Σ_j q_j W_j · (h - h'), and the same with the models' parts swapped.

    The ops do not take this way. With 16-bit weights in the mean it is off by 2e-5 to 8e-5 nats,
    where the joint sweep over both models is off by 5e-6 at most; and it saves a pass only where
    the mean is known from before, which no reference cache keeps.
    """
    input_ND, weight_VD, _ = double(random_head(60, 61, 17))
    reference_ND = nearby((input_ND,))[0].double()
    target_N = random_target(60, 61, ignore=None)
    logits_NV, reference_NV = input_ND @ weight_VD.t(), reference_ND @ weight_VD.t()
    lse_N, reference_lse_N = logits_NV.logsumexp(1), reference_NV.logsumexp(1)
    apart_ND = input_ND - reference_ND
    for direction, mean_ND, bregman in (
        ("reference_policy", reference_NV.softmax(1) @ weight_VD, lse_N - reference_lse_N),
        ("policy_reference", logits_NV.softmax(1) @ weight_VD, lse_N - reference_lse_N),
    ):
        sign = 1 if direction == "reference_policy" else -1
        expected = naive.token_logps_and_kl(
            input_ND, weight_VD, target_N, reference_ND, weight_VD, direction=direction
        )
        kl_N = sign * (bregman - (mean_ND * apart_ND).sum(1))
        torch.testing.assert_close(kl_N, expected.kl, rtol=1e-9, atol=1e-12)


def test_tdpo1_over_one_head_needs_no_logits_of_the_policy():
    """log p_y - log q_y + KL(q ‖ p) = (W_y - Σ_j q_j W_j) · (h - h')."""
    input_ND, weight_VD, _ = double(random_head(60, 61, 17))
    reference_ND = nearby((input_ND,))[0].double()
    target_N = random_target(60, 61, ignore=None)
    mean_ND = (reference_ND @ weight_VD.t()).softmax(1) @ weight_VD
    values_N = ((weight_VD[target_N] - mean_ND) * (input_ND - reference_ND)).sum(1)
    expected_N = naive.tdpo1_token_values(input_ND, weight_VD, target_N, reference_ND, weight_VD)
    torch.testing.assert_close(values_N, expected_N, rtol=1e-9, atol=1e-12)


def test_the_gradient_of_a_mix_is_a_positive_mix_of_probabilities():
    """∂(log p_y + κ KL(q ‖ p))/∂z = e_y - (1 - κ) p - κ q: TDPO2 at κ = α, TDPO1 at κ = 1."""
    logits_NV = torch.randn(20, 31, dtype=torch.float64, requires_grad=True)
    reference_NV = torch.randn(20, 31, dtype=torch.float64)
    target_N = random_target(20, 31, ignore=None)
    eye_VV = torch.eye(31, dtype=torch.float64)
    for kappa in (0.0, 0.5, 1.0):
        scores = naive.token_logps_and_kl(logits_NV, eye_VV, target_N, reference_NV, eye_VV)
        (dlogits_NV,) = torch.autograd.grad((scores.logps + kappa * scores.kl).sum(), logits_NV)
        p_NV, q_NV = logits_NV.softmax(1), reference_NV.softmax(1)
        expected_NV = eye_VV[target_N] - (1 - kappa) * p_NV - kappa * q_NV
        torch.testing.assert_close(dlogits_NV, expected_NV.detach(), rtol=1e-9, atol=1e-12)
