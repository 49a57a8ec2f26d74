import os
from functools import partial

import pytest
import torch
from fastpref_kernels import (
    TokenScores,
    naive,
    sequence_log_ratios,
    token_logps,
    token_logps_and_kl,
)
from fastpref_kernels.row_sums import RowSums
from oracle import (
    SHAPES,
    WORKSPACES_MIB,
    assert_no_worse_than_torch,
    cases,
    double,
    nearby,
    peak_bytes,
    random_head,
    random_target,
    torch_logits,
    workspace,
)
from torch import Tensor
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from fastpref.losses import tdpo_loss

FLOATS = [torch.float32, torch.bfloat16, torch.float16]
DIRECTIONS = ["reference_policy", "policy_reference"]
both_directions = pytest.mark.parametrize("direction", DIRECTIONS)


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def torch_token_logps_and_kl(
    input, weight, target, reference_input, reference_weight, **options
) -> TokenScores:
    """The usual composite: two full log-softmaxes in float32."""
    scale, softcap = options.get("logit_scale", 1.0), options.get("logit_softcap")
    logps_NV, reference_NV = (
        torch_logits(h, w, options.get(f"{prefix}linear_bias"), scale, softcap).log_softmax(-1)
        for h, w, prefix in [
            (input, weight, ""),
            (reference_input.detach(), reference_weight.detach(), "reference_"),
        ]
    )
    first_NV, second_NV = logps_NV, reference_NV
    if options["direction"] == "reference_policy":
        first_NV, second_NV = second_NV, first_NV
    # padded columns of -inf, which the composite cannot do without
    log_ratios_NV = (first_NV - second_NV).masked_fill(first_NV.isinf(), 0)
    kl_N = (first_NV.exp() * log_ratios_NV).sum(-1)
    ignored_N = target == -100
    index_N1 = target.masked_fill(ignored_N, 0)[:, None]
    scores = logps_NV.gather(1, index_N1)[:, 0], reference_NV.gather(1, index_N1)[:, 0], kl_N
    return TokenScores(*(score_N.masked_fill(ignored_N, 0) for score_N in scores))


def run(op, policy, reference, target, grads, **options) -> list[Tensor]:
    """Scores and the policy's gradients of Σ g_l · logps + g_k · kl."""
    input, weight, bias = policy
    reference_input, reference_weight, reference_bias = reference
    scores = op(
        input,
        weight,
        target,
        reference_input,
        reference_weight,
        linear_bias=bias,
        reference_linear_bias=reference_bias,
        **options,
    )
    grad_logps_N, grad_kl_N = (grad_N.to(scores.logps) for grad_N in grads)
    loss = (grad_logps_N * scores.logps + grad_kl_N * scores.kl).sum()
    leaves = [leaf for leaf in policy if leaf is not None]
    return [*(score_N.detach() for score_N in scores), *torch.autograd.grad(loss, leaves)]


def assert_matches_float64(policy, reference, target, **options):
    grads = torch.randn(2, len(target), generator=torch.Generator().manual_seed(1))
    ours = run(token_logps_and_kl, policy, reference, target, grads, **options)
    same_dtype = run(torch_token_logps_and_kl, policy, reference, target, grads, **options)
    truth = run(
        naive.token_logps_and_kl, double(policy), double(reference), target, grads, **options
    )
    assert all(score_N.dtype == torch.float32 for score_N in ours[:3])
    assert [grad.dtype for grad in ours[3:]] == [leaf.dtype for leaf in policy]
    for our, same, true in zip(ours, same_dtype, truth, strict=True):
        assert_no_worse_than_torch(our, same, true)


@cases(shape=SHAPES, dtype=FLOATS, mib=WORKSPACES_MIB, direction=DIRECTIONS)
def test_scores_and_gradients_match_float64(shape, dtype, mib, direction):
    N, V, D = shape
    policy = random_head(N, V, D, dtype)
    with workspace(mib):
        assert_matches_float64(policy, nearby(policy), random_target(N, V), direction=direction)


@cases(softcap=[None, 5.0], mib=WORKSPACES_MIB, direction=DIRECTIONS)
def test_the_models_may_differ_in_width_and_dtype(softcap, mib, direction):
    policy = random_head(252, 507, 123)
    reference = tuple(leaf.detach() for leaf in random_head(252, 507, 61, torch.bfloat16, seed=1))
    with workspace(mib):
        assert_matches_float64(
            policy,
            reference,
            random_target(252, 507),
            direction=direction,
            logit_scale=0.7,
            logit_softcap=softcap,
        )


@both_directions
@pytest.mark.parametrize("softcap", [1e-3, 1e5])
def test_a_softcap_may_be_small_or_large(softcap, direction):
    policy, target_N = random_head(20, 37, 16), random_target(20, 37)
    options = {"direction": direction, "logit_softcap": softcap}
    assert_matches_float64(policy, nearby(policy), target_N, **options)


@cases(rows=[1, 3, 252], dtype=FLOATS[:2], softcap=[None, 5.0], direction=DIRECTIONS)
def test_identical_models_differ_by_exactly_nothing(rows, dtype, softcap, direction):
    policy = random_head(rows, 507, 123, dtype)
    # a copy that lies at another alignment in memory
    weight_VD = torch.empty(507 * 123 + 3, dtype=dtype)[3:].view(507, 123).copy_(policy[1].detach())
    reference = (policy[0].detach().clone(), weight_VD, policy[2].detach().clone())
    target_N = random_target(rows, 507)
    grads = torch.zeros(rows), torch.randn(rows)
    with workspace(0.25):
        logps_N, reference_logps_N, kl_N, *leaf_grads = run(
            token_logps_and_kl,
            policy,
            reference,
            target_N,
            grads,
            direction=direction,
            logit_softcap=softcap,
        )
    assert torch.equal(logps_N, reference_logps_N)
    assert not kl_N.any()
    assert not any(grad.any() for grad in leaf_grads)


def test_sums_that_are_equal_have_equal_logarithms_wherever_a_row_lies():
    """A processor's vector instructions and what computes the rest differ in float64's last bit."""
    for rows in range(1, 90):
        max_R, sum_exp_R = torch.randn(rows), torch.rand(rows) * 9 + 1
        sums = RowSums(max_R, sum_exp_R, max_R + torch.randn(rows))
        both = RowSums.of_both(sums, sums)
        for value in (both.surprisal, both.lse, both.lse_over_max):
            assert torch.equal(*value)


@both_directions
def test_the_kl_of_models_a_hair_apart_keeps_its_gradient(direction):
    """Probabilities rounded apart to 16 bits before p - q are off by more than the difference."""
    policy = random_head(252, 507, 123)
    reference = nearby(policy, by=1e-3)
    grads = torch.zeros(252), torch.rand(252) + 0.5
    target_N = random_target(252, 507, ignore=None)
    options = {"direction": direction}
    ours = run(token_logps_and_kl, policy, reference, target_N, grads, **options)
    truth = run(
        naive.token_logps_and_kl, double(policy), double(reference), target_N, grads, **options
    )
    assert (ours[2] - truth[2]).abs().max() < 5e-6
    for our, true in zip(ours[3:], truth[3:], strict=True):
        assert (our - true).norm() / true.norm() < 2e-3


@both_directions
def test_columns_of_minus_infinity_in_both_models_do_not_count(direction):
    policy = random_head(252, 507, 123)
    reference = nearby(policy)
    with torch.no_grad():
        for bias in (policy[2], reference[2]):
            bias[:90] = bias[-7:] = float("-inf")
    target_N = 90 + random_target(252, 410, ignore=None)
    with workspace(0.25):
        assert_matches_float64(policy, reference, target_N, direction=direction)


@pytest.mark.parametrize(
    "direction, reference_has_it",
    [
        ("reference_policy", False),
        ("policy_reference", True),
    ],
)
def test_a_column_only_the_second_model_has_leaves_the_kl_finite(direction, reference_has_it):
    policy = random_head(60, 61, 17)
    reference = nearby(policy)
    with torch.no_grad():
        (policy if reference_has_it else reference)[2][5] = float("-inf")
    target_N = torch.arange(60) % 5
    assert_matches_float64(policy, reference, target_N, direction=direction)


@both_directions
@pytest.mark.parametrize("lacking", ["both", "policy", "reference"])
def test_a_target_that_a_model_lacks_adds_what_its_column_does(lacking, direction):
    policy, target_N = random_head(30, 61, 17), torch.arange(30) % 3
    with torch.no_grad():
        # the first row's likeliest word is the one that is taken out
        policy[0][0] = 3 * policy[1][0]
        reference = nearby(policy)
        for model, head in (("policy", policy), ("reference", reference)):
            if lacking in (model, "both"):
                head[2][0] = float("-inf")

    def scores(op, policy, reference, rows):
        of_both = (policy[0][rows], policy[1], target_N[rows], reference[0][rows], reference[1])
        biases = {"linear_bias": policy[2], "reference_linear_bias": reference[2]}
        return op(*of_both, **biases, direction=direction)

    exact = double(policy), double(reference)
    rows = torch.arange(30)
    true = scores(naive.token_logps_and_kl, *exact, rows)
    ours = scores(token_logps_and_kl, policy, reference, rows)
    for our_N, true_N in zip(ours, true, strict=True):
        torch.testing.assert_close(our_N.double(), true_N, rtol=1e-5, atol=1e-6)
    # a model that gives a word nothing is infinitely far from one that has it
    rows = rows[true.kl.isfinite()]
    assert (lacking, direction) in (
        ("policy", "reference_policy"),
        ("reference", "policy_reference"),
    ) or len(rows) == 30
    for ours, true in zip(
        torch.autograd.grad(scores(token_logps_and_kl, policy, reference, rows).kl.sum(), policy),
        torch.autograd.grad(scores(naive.token_logps_and_kl, *exact, rows).kl.sum(), exact[0]),
        strict=True,
    ):
        torch.testing.assert_close(ours.double(), true, rtol=1e-4, atol=1e-5)


@both_directions
@pytest.mark.parametrize("offset", [100.0, -1000.0])
def test_what_all_logits_of_a_model_have_more_is_not_in_the_kl(offset, direction):
    input, weight, _ = random_head(60, 507, 64)
    policy = (input, weight, torch.zeros(507).requires_grad_())
    reference = (*nearby(policy, by=0.01)[:2], torch.full((507,), offset))
    target_N, grads = random_target(60, 507), torch.zeros(2, 60)
    ours, same_dtype, true = (
        run(op, *models, target_N, grads, direction=direction)[2]
        for op, models in (
            (token_logps_and_kl, (policy, reference)),
            (torch_token_logps_and_kl, (policy, reference)),
            (naive.token_logps_and_kl, (double(policy), double(reference))),
        )
    )
    # a gap of that size is rounded before the targets' is taken off
    rounding = abs(offset) * torch.finfo(torch.float32).eps / 2
    assert_no_worse_than_torch(ours, same_dtype, true, floor=1e-6 + rounding)


@both_directions
def test_logits_two_hundred_nats_below_the_maximum_are_finite(direction):
    """softmax().log() of such a logit is -inf, and 0 · -inf is not a number."""
    logits_ND = torch.randn(64, 64)
    logits_ND[:, 9] = 200.0
    reference_ND = logits_ND + torch.randn(64, 64) * 0.1
    seed_style_N = (reference_ND.softmax(-1) * logits_ND.softmax(-1).log()).sum(-1)
    assert not seed_style_N.isfinite().any()
    weight_VD = torch.eye(64).requires_grad_()
    policy = (logits_ND.requires_grad_(), weight_VD, torch.zeros(64).requires_grad_())
    reference = (reference_ND, torch.eye(64), torch.zeros(64))
    target_N = torch.arange(64)
    grads = torch.randn(2, 64)
    ours = run(token_logps_and_kl, policy, reference, target_N, grads, direction=direction)
    truth = run(
        naive.token_logps_and_kl,
        double(policy),
        double(reference),
        target_N,
        grads,
        direction=direction,
    )
    torch.testing.assert_close([our.double() for our in ours], truth, rtol=1e-5, atol=1e-5)


@both_directions
@pytest.mark.parametrize("margin", [14.0, 30.0, 60.0])
def test_the_kl_of_two_confident_models_keeps_its_digits(margin, direction):
    target_N = torch.tensor([3, 63])
    peak_ND = torch.nn.functional.one_hot(target_N, 64).float()
    eye_VD, zeros_V = torch.eye(64), torch.zeros(64)
    policy = ((margin * peak_ND).requires_grad_(), eye_VD, zeros_V)
    reference = ((margin + 1) * peak_ND, eye_VD, zeros_V)
    grads = torch.tensor([[0.0, 0.0], [1.0, -2.0]])
    options = {"direction": direction}

    def run_frozen(op, policy, reference):
        frozen = policy[0], policy[1].detach(), policy[2].detach()
        scores = op(frozen[0], frozen[1], target_N, reference[0].detach(), reference[1], **options)
        return scores.kl.detach(), *torch.autograd.grad(
            scores.kl, frozen[0], grads[1].to(scores.kl)
        )

    ours = run_frozen(token_logps_and_kl, policy, reference)
    # the sum over the other tokens, in closed form, where float64's own differences round
    others = [torch.tensor(63.0).double().log() - m for m in (margin, margin + 1)]
    log_p, log_q = (-torch.nn.functional.softplus(lse, threshold=40) for lse in others)
    if direction == "reference_policy":
        log_p, log_q = log_q, log_p
    log_not_p, log_not_q = ((-log.expm1()).log() for log in (log_p, log_q))
    kl = log_p.exp() * (log_p - log_q) + log_not_p.exp() * (log_not_p - log_not_q)
    torch.testing.assert_close(ours[0].double(), kl.expand(2), rtol=1e-4, atol=0)
    truth = run_frozen(naive.token_logps_and_kl, double(policy), double(reference))
    torch.testing.assert_close(ours[1].double(), truth[1], rtol=1e-4, atol=1e-12)


@both_directions
def test_log_probabilities_are_those_of_token_logps(direction):
    policy = random_head(252, 507, 123)
    reference = nearby(policy)
    target_N = random_target(252, 507)
    scores = token_logps_and_kl(
        *policy[:2], target_N, *reference[:2], linear_bias=policy[2], direction=direction
    )
    assert torch.equal(scores.logps, token_logps(*policy[:2], target_N, linear_bias=policy[2]))
    assert torch.equal(scores.reference_logps, token_logps(*reference[:2], target_N))


def test_a_kl_that_is_only_looked_at_costs_no_gradient():
    policy = random_head(252, 507, 123)
    target_N, grad_N = random_target(252, 507), torch.randn(252)
    scores = token_logps_and_kl(*policy[:2], target_N, *nearby(policy)[:2])
    joint = torch.autograd.grad(scores.logps, policy[:2], grad_N)
    alone = torch.autograd.grad(token_logps(*policy[:2], target_N), policy[:2], grad_N)
    # not the same bits: the op that has no KL may keep what this one makes again
    torch.testing.assert_close(joint, alone, rtol=1e-4, atol=1e-6)


@both_directions
def test_the_reference_never_receives_a_gradient(direction):
    policy, reference = random_head(60, 61, 17), random_head(60, 61, 17, seed=1)
    scores = token_logps_and_kl(
        *policy[:2], random_target(60, 61), *reference[:2], direction=direction
    )
    assert not scores.reference_logps.requires_grad
    (scores.logps + scores.kl).sum().backward()
    assert policy[0].grad.any() and policy[1].grad.any()
    assert all(leaf.grad is None for leaf in reference)


@both_directions
def test_scores_may_be_changed_in_place(direction):
    input, weight, _ = random_head(60, 61, 17)
    reference, target_N = random_head(60, 61, 17, seed=1)[:2], random_target(60, 61)

    def scores():
        return token_logps_and_kl(input, weight, target_N, *reference, direction=direction)

    expected = torch.autograd.grad(sum(2 * score.sum() for score in scores()), (input, weight))
    doubled = [score.mul_(2) for score in scores()]
    grads = torch.autograd.grad(sum(score.sum() for score in doubled), (input, weight))
    assert all(map(torch.equal, grads, expected))


@both_directions
def test_a_shared_head_receives_the_policys_gradient_only(direction):
    input, weight, _ = random_head(60, 61, 17)
    reference_ND = nearby((input,))[0]
    target_N, grads = random_target(60, 61), torch.randn(2, 60)

    def gradient(reference_weight: Tensor) -> Tensor:
        scores = token_logps_and_kl(
            input, weight, target_N, reference_ND, reference_weight, direction=direction
        )
        loss = (grads[0] * scores.logps + grads[1] * scores.kl).sum()
        return torch.autograd.grad(loss, weight)[0]

    assert torch.equal(gradient(weight), gradient(weight.detach().clone()))


@cases(together=1, direction=DIRECTIONS, softcap=[None, 30.0])
def test_ignored_rows_score_zero_whatever_they_hold(direction, softcap):
    policy = random_head(252, 507, 123)
    reference = nearby(policy)
    target_N, grads = random_target(252, 507), torch.randn(2, 252)
    options = {"direction": direction, "logit_softcap": softcap}
    clean = run(token_logps_and_kl, policy, reference, target_N, grads, **options)
    with torch.no_grad():
        policy[0][::5] = float("nan")
        reference[0][::5] = float("inf")
    dirty = run(token_logps_and_kl, policy, reference, target_N, grads, **options)
    assert all(map(torch.equal, clean, dirty))
    assert not any(values[::5].any() for values in dirty[:4])


@both_directions
@pytest.mark.parametrize("N", [0, 20])
def test_without_a_scored_row_gradients_are_zero(N, direction):
    policy = random_head(N, 61, 17)
    target_N = torch.full((N,), -100)
    *scores, grad_ND, grad_VD, grad_V = run(
        token_logps_and_kl,
        policy,
        nearby(policy),
        target_N,
        torch.ones(2, N),
        direction=direction,
    )
    assert not any(values.any() for values in (*scores, grad_ND, grad_VD, grad_V))
    assert grad_VD.shape == (61, 17)


@both_directions
def test_a_kl_of_large_logits_is_no_worse_than_torchs(direction):
    """A bias that all words share moves no probability, and takes digits of every logit."""
    policy, target_N = random_head(60, 61, 17), random_target(60, 61, ignore=None)
    reference = random_head(60, 61, 17, seed=1)
    options = {"direction": direction}
    exact = [[leaf.detach().double() for leaf in model] for model in (policy, reference)]
    with torch.no_grad():
        for bias_V in (policy[2], reference[2], exact[0][2], exact[1][2]):
            bias_V += 1024
        for (*_, ours_V), (*_, exact_V) in zip((policy, reference), exact, strict=True):
            exact_V.copy_(ours_V)

    def kl(op, policy, reference):
        biases = {"linear_bias": policy[2], "reference_linear_bias": reference[2]}
        return op(*policy[:2], target_N, *reference[:2], **biases, **options).kl.detach()

    true_N = kl(naive.token_logps_and_kl, *exact)
    ours_N, torchs_N = (
        kl(op, policy, reference) for op in (token_logps_and_kl, torch_token_logps_and_kl)
    )
    error, of_torch = ((kl_N.double() - true_N).abs().max() for kl_N in (ours_N, torchs_N))
    assert error <= 2 * of_torch < 1e-2


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="seen with MKL only")
@cases(together=1, width=[(507, 123), (2049, 64), (7, 31)], direction=DIRECTIONS)
def test_a_row_has_the_same_bits_in_any_batch(width, direction):
    V, D = width
    if os.environ.get("TRITON_INTERPRET") and V < 16:
        pytest.skip("narrow products are a GPU library's there")
    policy = random_head(252, V, D)
    reference, target_N = nearby(policy), random_target(252, V, ignore=None)

    def scores(rows):
        return token_logps_and_kl(
            policy[0][rows],
            policy[1],
            target_N[rows],
            reference[0][rows],
            reference[1],
            direction=direction,
        )

    whole = scores(slice(0, 252))
    for rows in (slice(0, 1), slice(17, 20), slice(100, 233)):
        for part_R, whole_N in zip(scores(rows), whole, strict=True):
            assert torch.equal(part_R, whole_N[rows])


@both_directions
def test_the_same_inputs_give_the_same_bits(direction):
    policy = random_head(252, 507, 123, torch.bfloat16)
    arguments = (policy, nearby(policy), random_target(252, 507), torch.randn(2, 252))
    with workspace(0.25):
        first, second = (run(token_logps_and_kl, *arguments, direction=direction) for _ in range(2))
    assert all(map(torch.equal, first, second))


@both_directions
def test_a_frozen_head_allocates_nothing_for_its_gradient(direction):
    N, V, D = 8, 4096, 64
    input, weight, _ = random_head(N, V, D)
    weight.requires_grad_(False)
    with workspace(0.25):
        scores = token_logps_and_kl(
            input, weight, random_target(N, V), *nearby((input, weight)), direction=direction
        )
        peak = peak_bytes(lambda: (scores.logps + scores.kl).sum().backward())
    assert weight.grad is None
    assert peak < 2**18 < V * D * 4


@both_directions
def test_autocast_changes_nothing(direction):
    policy = random_head(60, 61, 17)
    arguments = (policy, nearby(policy), random_target(60, 61), torch.randn(2, 60))
    expected = run(token_logps_and_kl, *arguments, direction=direction)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = run(token_logps_and_kl, *arguments, direction=direction)
    assert all(map(torch.equal, expected, actual))


def test_activation_checkpointing_recomputes_the_same_gradients():
    policy = random_head(60, 61, 17)
    reference, target_N = nearby(policy), random_target(60, 61)

    def loss(h: Tensor, w: Tensor) -> Tensor:
        scores = token_logps_and_kl(h * 1.5, w, target_N, *reference[:2])
        return (scores.logps + 2 * scores.kl).sum()

    # what it keeps is said by its op, and torch hands a policy that op by name
    keep = torch.ops.fastpref.head_v7.default
    selective = partial(create_selective_checkpoint_contexts, [keep])
    recomputed = partial(checkpoint, loss, use_reentrant=False)
    expected = torch.autograd.grad(loss(*policy[:2]), policy[:2])
    for run in (
        recomputed,
        partial(recomputed, context_fn=selective),
        torch.compile(recomputed, backend="aot_eager", fullgraph=True),
    ):
        actual = torch.autograd.grad(run(*policy[:2]), policy[:2])
        assert all(map(torch.equal, expected, actual))


def test_torch_compile_sees_a_head_and_its_loss_whole():
    policy = random_head(60, 61, 17)
    reference, target_N = nearby(policy), random_target(60, 61)
    ids_N = torch.arange(60) // 15

    def loss(h: Tensor, w: Tensor) -> Tensor:
        scores = token_logps_and_kl(h * 1.5, w, target_N, *reference[:2])
        ratios_S, kl_S = (
            sequence_log_ratios(values_N, base_N, ids_N, 4)
            for values_N, base_N in [
                (scores.logps, scores.reference_logps),
                (scores.kl, torch.zeros_like(scores.kl)),
            ]
        )
        losses, _, _ = tdpo_loss(*ratios_S.split(2), *kl_S.split(2), beta=0.1)
        return losses.sum()

    expected, actual = (
        torch.autograd.grad(f(*policy[:2]), policy[:2])
        for f in (loss, torch.compile(loss, backend="aot_eager", fullgraph=True))
    )
    torch.testing.assert_close(actual, expected, rtol=1e-6, atol=1e-7)


def test_arguments_that_do_not_fit_are_named():
    (input, weight, bias), target_N = random_head(6, 61, 17), random_target(6, 61)
    for reference, options, message in [
        ((input, weight), {"direction": "forward"}, "direction must be one of reference_policy"),
        ((input[:5], weight), {}, "reference_input must have input's 6 rows"),
        ((input, weight[:60]), {}, "reference_linear_weight must have linear_weight's vocabulary"),
        ((input, weight[:, :9]), {}, r"reference_linear_weight must be \(V, D\)"),
        ((input.to("meta"), weight.to("meta")), {}, "reference_input must be on input's cpu"),
        ((input.to("meta"), weight), {}, "reference_input must be on input's cpu, got meta"),
        ((input.double(), weight), {}, "reference_input must be one of bfloat16"),
        (
            (input, weight),
            {"reference_linear_bias": bias[:9]},
            r"reference_linear_bias must be \(61,\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            token_logps_and_kl(input, weight, target_N, *reference, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@both_directions
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize(("N", "V", "D"), SHAPES)
def test_scores_on_a_gpu_match_float64(N, V, D, dtype, direction):
    policy = tuple(t.detach().cuda().requires_grad_() for t in random_head(N, V, D, dtype))
    reference = tuple(t.cuda() for t in nearby(random_head(N, V, D, dtype)))
    with workspace(0.25):
        assert_matches_float64(
            policy, reference, random_target(N, V).cuda(), direction=direction, logit_softcap=20.0
        )
