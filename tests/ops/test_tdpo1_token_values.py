import math
import os

import pytest
import torch
from fastpref_kernels import naive, tdpo1_token_values, tdpo1_token_values_torch, token_logps_and_kl
from fastpref_kernels.head import Head, Targets
from oracle import (
    ROUNDED_TWICE,
    SHAPES,
    WORKSPACES_MIB,
    assert_no_worse_than_torch,
    cases,
    count_gemms,
    double,
    nearby,
    random_head,
    random_target,
    values_and_gradients,
    workspace,
)
from torch import Tensor
from torch.nn import functional as F

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def torch_tdpo1_token_values(
    input,
    weight,
    target,
    reference_input,
    reference_weight,
    *,
    linear_bias,
    reference_linear_bias,
    logit_scale=1.0,
):
    """As a user writes it, in the dtypes of the models."""
    logits_NV = logit_scale * F.linear(input, weight, linear_bias).float()
    reference_NV = F.linear(reference_input, reference_weight, reference_linear_bias).float()
    reference_NV = logit_scale * reference_NV
    ratios_NV = logits_NV.log_softmax(-1) - reference_NV.log_softmax(-1)
    mean_N = (reference_NV.softmax(-1) * ratios_NV).sum(-1)
    index_N1 = target.clamp_min(0)[:, None]
    return (ratios_NV.gather(1, index_N1)[:, 0] - mean_N).masked_fill(target == -100, 0)


def assert_matches_float64(policy, reference, target, **options):
    ours = values_and_gradients(tdpo1_token_values, policy, reference, target, **options)
    same_dtype = values_and_gradients(
        torch_tdpo1_token_values, policy, reference, target, **options
    )
    truth = values_and_gradients(
        naive.tdpo1_token_values, double(policy), double(reference), target, **options
    )
    assert ours[0].dtype == torch.float32
    # a value is the difference of two means over the vocabulary, each a sum in float32
    for our, same, true, floor in zip(ours, same_dtype, truth, (5e-5, *[1e-5] * 3), strict=True):
        assert_no_worse_than_torch(our, same, true, floor=floor)


@cases(shape=SHAPES, dtype=[torch.float32, torch.bfloat16, torch.float16], mib=WORKSPACES_MIB)
def test_values_and_gradients_match_float64(shape, dtype, mib):
    N, V, D = shape
    policy = random_head(N, V, D, dtype)
    with workspace(mib):
        assert_matches_float64(policy, nearby(policy), random_target(N, V))


@pytest.mark.parametrize("mib", WORKSPACES_MIB)
def test_the_models_may_differ_in_width_and_dtype(mib):
    policy = random_head(252, 507, 123)
    reference = tuple(leaf.detach() for leaf in random_head(252, 507, 61, torch.bfloat16, seed=1))
    with workspace(mib):
        assert_matches_float64(policy, reference, random_target(252, 507), logit_scale=0.7)


@pytest.mark.parametrize("wanted", [(0,), (1,), (2,), (0, 2), (1, 2)])
def test_only_what_wants_a_gradient_gets_one(wanted):
    policy = random_head(60, 61, 17)
    all_grads = values_and_gradients(
        tdpo1_token_values, policy, nearby(policy), random_target(60, 61)
    )[1:]
    some = tuple(leaf.detach().requires_grad_(i in wanted) for i, leaf in enumerate(policy))
    grads = values_and_gradients(tdpo1_token_values, some, nearby(policy), random_target(60, 61))[
        1:
    ]
    assert all(torch.equal(grad, all_grads[i]) for i, grad in zip(wanted, grads, strict=True))


def test_values_may_be_changed_in_place():
    policy, target_N = random_head(60, 61, 17), random_target(60, 61)
    reference = nearby(policy)
    values_N = tdpo1_token_values(*policy[:2], target_N, *reference[:2])
    (expected,) = torch.autograd.grad(2 * values_N.sum(), policy[0], retain_graph=True)
    (grad,) = torch.autograd.grad(values_N.mul_(2).sum(), policy[0])
    assert torch.equal(grad, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_models_that_share_a_head_and_are_equal_have_values_of_exactly_nothing(dtype):
    input, weight, bias = random_head(252, 507, 123, dtype)
    with workspace(0.25):
        values_N = tdpo1_token_values(
            input,
            weight,
            random_target(252, 507),
            input.detach().clone(),
            weight,
            linear_bias=bias,
            reference_linear_bias=bias,
        )
    assert not values_N.any()


def test_equal_models_with_heads_of_their_own_differ_by_no_more_than_rounding():
    policy = random_head(252, 507, 123, torch.bfloat16)
    reference = tuple(leaf.detach().clone() for leaf in policy)
    values_N, grad_ND, grad_VD, _ = values_and_gradients(
        tdpo1_token_values, policy, reference, random_target(252, 507)
    )
    assert values_N.abs().max() <= 5e-5
    # the KL of equal models has no gradient: what is left is the log-probability's
    true = values_and_gradients(
        naive.tdpo1_token_values, double(policy), double(reference), random_target(252, 507)
    )
    for ours, truth in ((grad_ND, true[1]), (grad_VD, true[2])):
        assert (ours.double() - truth).norm() / truth.norm() <= ROUNDED_TWICE


def test_the_joint_sweep_gives_the_same_values():
    policy = random_head(252, 507, 123)
    reference, target_N = nearby(policy), random_target(252, 507)
    values_N = values_and_gradients(tdpo1_token_values, policy, reference, target_N)[0]
    logps_N, reference_logps_N, kl_N = token_logps_and_kl(
        policy[0],
        policy[1],
        target_N,
        *reference[:2],
        linear_bias=policy[2],
        reference_linear_bias=reference[2],
    )
    expected_N = logps_N - reference_logps_N + kl_N
    torch.testing.assert_close(values_N, expected_N.detach(), rtol=1e-5, atol=2e-5)


@pytest.mark.parametrize("margin", [14.0, 30.0, 60.0, 80.0, -60.0, -100.0])
def test_confident_and_hopeless_tokens_keep_their_gradient(margin):
    """The reference puts its probability on the target, or e^-margin of it."""
    N, V, D = 4, 300, 16
    input, weight = torch.randn(N, D), torch.randn(V, D) / D**0.5
    target_N = torch.tensor([0, 7, 299, 150])
    reference_input, reference_weight = torch.eye(N), torch.zeros(V, N)
    reference_weight[target_N, torch.arange(N)] = margin
    policy = (input.requires_grad_(), weight.requires_grad_(), None)
    reference = (reference_input, reference_weight, None)
    ours = values_and_gradients(tdpo1_token_values, policy, reference, target_N)
    # not as a difference from 1, which float64 loses at 37 nats
    leaves = double(policy[:2])
    logits_NV = leaves[0] @ leaves[1].t()
    other = math.exp(-margin) / (1 + (V - 1) * math.exp(-margin))
    q_NV = torch.full((N, V), other, dtype=torch.float64).scatter(1, target_N[:, None], 0.0)
    over_NV = logits_NV.gather(1, target_N[:, None]) - margin - logits_NV
    values_N = (q_NV * over_NV).sum(1)
    grad_N = torch.randn(N, generator=torch.Generator().manual_seed(1)).double()
    truth = [values_N.detach(), *torch.autograd.grad(values_N, leaves, grad_N)]
    for our, true in zip(ours, truth, strict=True):
        assert (our - true).norm() <= 1e-4 * true.norm()


def test_columns_of_minus_infinity_in_both_models_do_not_count():
    policy = random_head(252, 507, 123)
    reference = nearby(policy)
    with torch.no_grad():
        for bias in (policy[2], reference[2]):
            bias[:90] = bias[-7:] = float("-inf")
    target_N = 90 + random_target(252, 410, ignore=None)
    with workspace(0.25):
        ours = values_and_gradients(tdpo1_token_values, policy, reference, target_N)
    kept = slice(90, 500)
    truncated = [
        (head[0].detach(), head[1][kept].detach(), head[2][kept].detach())
        for head in (policy, reference)
    ]
    for leaf in truncated[0]:
        leaf.requires_grad_()
    expected = values_and_gradients(tdpo1_token_values, *truncated, target_N - 90)
    torch.testing.assert_close(ours[0], expected[0], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(ours[1], expected[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(ours[2][kept], expected[2], rtol=1e-4, atol=1e-5)
    assert not ours[2][:90].any() and not ours[3][-7:].any()


def test_a_column_that_only_the_reference_has_leaves_no_finite_value():
    policy, target_N = random_head(20, 61, 17), torch.arange(20) % 5
    reference = nearby(policy)
    with torch.no_grad():
        # the second is a column of neither, the third of the policy's alone
        policy[2][[7, 8]] = float("-inf")
        reference[2][[8, 9]] = float("-inf")

    def values(of_policy):
        biases = {"linear_bias": of_policy, "reference_linear_bias": reference[2]}
        return tdpo1_token_values(*policy[:2], target_N, *reference[:2], **biases)

    assert values(policy[2]).eq(float("inf")).all()
    assert values(reference[2]).isfinite().all()


def test_ignored_rows_score_zero_whatever_they_hold():
    policy = random_head(252, 507, 123)
    reference = nearby(policy)
    target_N = random_target(252, 507)
    clean = values_and_gradients(tdpo1_token_values, policy, reference, target_N)
    ignored_N = target_N == -100
    with torch.no_grad():
        policy[0][ignored_N] = float("nan")
        reference[0][ignored_N] = float("inf")
    dirty = values_and_gradients(tdpo1_token_values, policy, reference, target_N)
    assert all(map(torch.equal, clean, dirty))
    assert not dirty[0][ignored_N].any() and not dirty[1][ignored_N].any()


@pytest.mark.parametrize("N", [0, 20])
def test_without_a_scored_row_gradients_are_zero(N):
    policy = random_head(N, 61, 17)
    results = values_and_gradients(
        tdpo1_token_values, policy, nearby(policy), torch.full((N,), -100)
    )
    assert not any(values.any() for values in results)


# a product of 7 columns is another one of MKL's
@pytest.mark.parametrize("D", [123, 7])
def test_the_same_inputs_give_the_same_bits_and_a_row_the_same_in_any_batch(D):
    policy = random_head(252, 507, D)
    reference, target_N = nearby(policy), random_target(252, 507, ignore=None)
    first, second = (
        values_and_gradients(tdpo1_token_values, policy, reference, target_N) for _ in range(2)
    )
    assert all(map(torch.equal, first, second))
    for rows in (slice(0, 1), slice(17, 20), slice(100, 233)):
        values_R = tdpo1_token_values(
            policy[0][rows],
            policy[1],
            target_N[rows],
            reference[0][rows],
            reference[1],
            linear_bias=policy[2],
            reference_linear_bias=reference[2],
        )
        if INTERPRETED:
            # a GPU's library chooses the order of its sums by the number of rows
            torch.testing.assert_close(values_R, first[0][rows], rtol=1e-6, atol=2e-6)
        else:
            assert torch.equal(values_R, first[0][rows])


def test_torch_compile_traces_it_with_its_backward():
    policy = random_head(60, 61, 17)
    reference, target_N = nearby(policy), random_target(60, 61)
    torch.compiler.reset()

    def loss(input: Tensor, weight: Tensor) -> Tensor:
        return tdpo1_token_values(input, weight, target_N, *reference[:2]).square().sum()

    compiled = torch.compile(loss, fullgraph=True, backend="aot_eager")
    leaves = policy[:2]
    expected = torch.autograd.grad(loss(*leaves), leaves)
    assert all(map(torch.equal, torch.autograd.grad(compiled(*leaves), leaves), expected))


def test_hidden_states_of_any_strides_give_gradients_of_those_that_are_traced():
    policy, reference = random_head(60, 61, 17), random_head(60, 61, 17, seed=1)
    input_ND = policy[0].detach().t().contiguous().t().requires_grad_()
    values_N = tdpo1_token_values(input_ND, policy[1], random_target(60, 61), *reference[:2])
    (grad_ND,) = torch.autograd.grad(values_N.sum(), input_ND)
    # a compiled graph takes them for what a new tensor of that shape is
    assert not input_ND.is_contiguous() and grad_ND.is_contiguous()


def test_a_certain_token_keeps_its_gradient_in_float16_under_the_scale_of_a_loss():
    input, weight, _ = (leaf.detach().half() for leaf in random_head(4, 61, 16))
    input[:, 0], weight[:, 0] = 1.0, 0.0
    # all others together have a probability near 1e-6 in the reference
    reference_weight = weight.clone()
    reference_weight[7, 0] = 24.0
    target_N = torch.full((4,), 7)
    input.requires_grad_()

    def gradient(op, *tensors):
        hidden, *others = tensors
        values_N = op(hidden, others[0], target_N, hidden.detach(), others[1])
        return torch.autograd.grad(values_N.sum() * 2.0**16, hidden)[0]

    exact = double([input, weight, reference_weight])
    true = gradient(naive.tdpo1_token_values, exact[0].requires_grad_(), *exact[1:])
    ours = gradient(tdpo1_token_values, input, weight, reference_weight)
    assert ours.dtype == torch.float16
    # one rounding, to float16
    assert ((ours.double() - true).norm() / true.norm()).item() <= 2.0**-11


def test_the_reference_gets_no_gradient():
    policy = random_head(60, 61, 17)
    reference = tuple(leaf.requires_grad_() for leaf in nearby(policy))
    values_and_gradients(tdpo1_token_values, policy, reference, random_target(60, 61))
    assert all(leaf.grad is None for leaf in reference)


@pytest.mark.parametrize(
    ("name", "reference_rows", "reference_vocab", "message"),
    [
        ("rows", 5, 61, "reference_input must have input's 6 rows"),
        ("vocabulary", 6, 60, "reference_linear_weight must have linear_weight's vocabulary of 61"),
    ],
)
def test_models_that_do_not_fit_are_refused(name, reference_rows, reference_vocab, message):
    input, weight, _ = random_head(6, 61, 17)
    reference_input, reference_weight, _ = random_head(reference_rows, reference_vocab, 17)
    with pytest.raises(ValueError, match=message):
        tdpo1_token_values(input, weight, random_target(6, 61), reference_input, reference_weight)


@pytest.mark.parametrize(("mode", "passes"), [("scores", 2), ("lean", 4), ("frozen", 2)])
def test_a_mode_of_plain_torch_takes_as_many_gemms_as_it_says(mode, passes):
    N, V, D = 64, 2048, 96
    input, weight, _ = (leaf.detach() for leaf in random_head(N, V, D))
    heads = (Head(input, weight, None, 1.0, None), Head(input.clone(), weight, None, 1.0, None))
    targets = Targets.of(random_target(N, V), -100)
    with count_gemms() as counter:
        stats = tdpo1_token_values_torch.tdpo1_token_values_fwd(heads, targets, mode)
        if mode != "scores":
            tdpo1_token_values_torch.tdpo1_token_values_bwd(
                torch.ones(N), heads, targets, stats,
                mode=mode, needs_grad=(True, mode != "frozen", False),
            )  # fmt: skip
    assert counter.get_total_flops() == passes * 2 * N * V * D
