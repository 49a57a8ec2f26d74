"""The Triton path of the joint sweep in its modes, on a GPU or in Triton's interpreter."""

import os

import pytest
import torch
from fastpref_kernels import naive, token_logps_and_kl
from oracle import (
    ROUNDED_TWICE,
    TIMES_TORCH,
    cases,
    count_gemms,
    double,
    half_kept,
    random_head,
    random_target,
    workspace,
)

pytest.importorskip("triton", reason="Triton is for Linux")
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET")):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from fastpref_kernels import launch, token_logps_kl_triton
from fastpref_kernels.gemm_tiles import JOINT_TILES
from fastpref_kernels.head import Head

# the whole file on a GPU, where it is what the kernels are
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# N, V, D, D of the reference: ragged blocks of rows and columns; rows no tensor descriptor takes
SHAPES = {"fused": (150, 400, 136, 72), "products": (60, 1100, 123, 61)}
DIRECTIONS = ["reference_policy", "policy_reference"]
MODES = ["store", "partial", "lean"]
TRANSFORMS = {"plain": {}, "softcap": {"logit_scale": 0.7, "logit_softcap": 20.0}}

# the interpreter cuts bfloat16 off where a GPU rounds: twice the error of what is kept
GRADIENT_BOUND = ROUNDED_TWICE if torch.cuda.is_available() else 4.5e-3

both_routes = pytest.mark.parametrize("route", ["fused", "products"], indirect=True)
all_modes = pytest.mark.parametrize("mode", MODES)


@pytest.fixture(autouse=True)
def partial_keeps_half(monkeypatch):
    monkeypatch.setattr(token_logps_kl_triton, "kept_rows", half_kept)


@pytest.fixture
def route(request, monkeypatch):
    tile = JOINT_TILES["sm_90"] if request.param == "fused" else None
    monkeypatch.setattr(launch, "fused_tile", lambda device, joint: tile)
    return request.param


def force(mode, monkeypatch):
    monkeypatch.setattr(token_logps_kl_triton, "choose_mode", lambda heads, needs_grad: mode)


def models(route, *, dtype=torch.float32, near=None, bias=True):
    """Leaves of the policy, tensors of the reference, targets."""
    N, V, D, D_reference = SHAPES[route]
    policy = [leaf.detach().to(DEVICE) for leaf in random_head(N, V, D, dtype)]
    if near is None:
        reference = [t.detach().to(DEVICE) for t in random_head(N, V, D_reference, dtype, seed=1)]
    else:
        noise = random_head(N, V, D, dtype, seed=1)
        reference = [
            (leaf.float() + near * other.detach().to(DEVICE).float()).to(dtype)
            for leaf, other in zip(policy, noise, strict=True)
        ]
    if not bias:
        policy, reference = policy[:2], reference[:2]
    for leaf in policy:
        leaf.requires_grad_()
    return policy, reference, random_target(N, V).to(DEVICE)


def run(op, policy, reference, target_N, grads, **options):
    """Scores, and the policy's gradients under per-token upstream gradients of logps and KL."""
    biases = {}
    if len(policy) == 3:
        biases = {"linear_bias": policy[2], "reference_linear_bias": reference[2]}
    scores = op(*policy[:2], target_N, *reference[:2], **biases, **options)
    total = sum(
        (grad_N.to(score_N) * score_N).sum()
        for grad_N, score_N in zip(grads, (scores.logps, scores.kl), strict=True)
    )
    return scores, torch.autograd.grad(total, policy)


def upstream(N, *, logps=1.0, kl=1.0):
    generator = torch.Generator().manual_seed(1)
    grads = torch.randn(2, N, generator=generator).to(DEVICE)
    return grads[0] * logps, grads[1] * kl


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def assert_exact(policy, reference, target_N, grads, *, bounds, **options):
    """Values and gradients against float64; bounds of logps, KL and gradients."""
    logp_bound, kl_bound, gradient_bound = bounds
    scores, gradients = run(token_logps_and_kl, policy, reference, target_N, grads, **options)
    true_scores, true_gradients = run(
        naive.token_logps_and_kl, double(policy), double(reference), target_N, grads, **options
    )
    if policy[0].dtype == torch.float32:
        of_torch, _ = run(naive.token_logps_and_kl, policy, reference, target_N, grads, **options)
        errors = [
            (ours.double() - true).abs().max().item()
            for ours, true in zip(of_torch, true_scores, strict=True)
        ]
        logp_bound = max(logp_bound, TIMES_TORCH * max(errors[:2]))
        kl_bound = max(kl_bound, TIMES_TORCH * errors[2])
    assert (scores.logps - true_scores.logps).abs().max() <= logp_bound
    assert (scores.reference_logps - true_scores.reference_logps).abs().max() <= logp_bound
    assert (scores.kl - true_scores.kl).abs().max() <= kl_bound
    for leaf, gradient, true in zip(policy, gradients, true_gradients, strict=True):
        assert gradient.dtype == leaf.dtype and gradient.isfinite().all()
        assert relative_error(gradient, true) <= gradient_bound


@cases(together=3, route=SHAPES, mode=MODES, direction=DIRECTIONS, transform=TRANSFORMS)
def test_every_mode_is_exact_in_float32(route, mode, direction, transform, monkeypatch):
    force(mode, monkeypatch)
    policy, reference, target_N = models(route, bias=transform == "softcap")
    assert_exact(
        policy, reference, target_N, upstream(len(target_N)),
        bounds=(1e-5, 1e-5, 3e-6), direction=direction, **TRANSFORMS[transform],
    )  # fmt: skip


@cases(route=SHAPES, mode=MODES, direction=DIRECTIONS, transform=TRANSFORMS)
def test_every_mode_keeps_the_bounds_of_16_bits(route, mode, direction, transform, monkeypatch):
    force(mode, monkeypatch)
    near = 0.02 if transform == "softcap" else None
    policy, reference, target_N = models(route, dtype=torch.bfloat16, near=near)
    assert_exact(
        policy, reference, target_N, upstream(len(target_N)),
        bounds=(5e-5, 1e-5 if near else 2e-5, GRADIENT_BOUND),
        direction=direction,
        **TRANSFORMS[transform],
    )  # fmt: skip


@cases(route=SHAPES, mode=MODES, direction=DIRECTIONS)
def test_the_kl_alone_keeps_its_gradient_where_the_models_are_close(
    route, mode, direction, monkeypatch
):
    force(mode, monkeypatch)
    policy, reference, target_N = models(route, dtype=torch.bfloat16, near=0.02)
    # p - q is small here: two probabilities rounded apart would be off by several percent
    assert_exact(
        policy, reference, target_N, upstream(len(target_N), logps=0.0),
        bounds=(5e-5, 1e-5, GRADIENT_BOUND), direction=direction,
    )  # fmt: skip


@cases(route=SHAPES, mode=MODES, direction=DIRECTIONS, dtype=[torch.float32, torch.bfloat16])
def test_identical_models_differ_by_exactly_nothing(route, mode, direction, dtype, monkeypatch):
    force(mode, monkeypatch)
    transform = "softcap" if dtype == torch.float32 else "plain"
    policy, _, target_N = models(route, dtype=dtype)
    reference = [leaf.detach().clone() for leaf in policy]
    scores, gradients = run(
        token_logps_and_kl, policy, reference, target_N,
        upstream(len(target_N), logps=0.0), direction=direction, **TRANSFORMS[transform],
    )  # fmt: skip
    assert torch.equal(scores.logps, scores.reference_logps)
    assert not scores.kl.any() and not any(gradient.any() for gradient in gradients)


@cases(route=SHAPES, mode=MODES, direction=DIRECTIONS, margin=[60.0, -200.0])
def test_certain_and_hopeless_tokens_are_exact(route, mode, direction, margin, monkeypatch):
    force(mode, monkeypatch)
    policy, reference, target_N = models(route, bias=False)
    with torch.no_grad():
        # column 7 leads by the margin in the policy, or trails by it, and by less in the reference
        for (hidden, weight), lead in [(policy, margin), (reference, margin / 2)]:
            hidden[:, 0] = 1.0
            weight[:, 0] = 0.0
            weight *= 0.1
            weight[7, 0] = lead
        target_N[5::40] = 7
    assert_exact(
        policy, reference, target_N, upstream(len(target_N)),
        bounds=(1e-4, 5e-5, 1e-5), direction=direction,
    )  # fmt: skip


@both_routes
@all_modes
def test_a_frozen_head_has_the_same_gradient_of_the_hidden_states(route, mode, monkeypatch):
    force(mode, monkeypatch)
    policy, reference, target_N = models(route, bias=False)
    grads = upstream(len(target_N))
    _, (expected_ND, _) = run(token_logps_and_kl, policy, reference, target_N, grads)
    frozen = [policy[0], policy[1].detach()]
    scores = token_logps_and_kl(*frozen, target_N, *reference)
    (actual_ND,) = torch.autograd.grad((scores.logps, scores.kl), policy[:1], grads)
    torch.testing.assert_close(actual_ND, expected_ND)


@both_routes
@all_modes
def test_a_small_workspace_changes_the_tiles_and_not_the_result(route, mode, monkeypatch):
    force(mode, monkeypatch)
    policy, reference, target_N = models(route)
    with workspace(0.1):
        assert_exact(
            policy, reference, target_N, upstream(len(target_N)), bounds=(1e-5, 1e-5, 3e-6)
        )


@cases(route=SHAPES, direction=DIRECTIONS, transform=TRANSFORMS)
def test_a_row_has_the_same_bits_in_every_mode(route, direction, transform):
    policy, reference, target_N = models(route, dtype=torch.bfloat16, near=0.02)
    options = TRANSFORMS[transform]
    transform = options.get("logit_scale", 1.0), options.get("logit_softcap")
    heads = tuple(
        Head(input.detach(), weight.detach(), bias.detach(), *transform)
        for input, weight, bias in (policy, reference)
    )
    targets = token_logps_kl_triton.Targets.of(target_N, -100)
    scores, *others = (
        token_logps_kl_triton.token_logps_kl_fwd(heads, targets, direction, mode)[:5]
        for mode in ("scores", "store", "partial", "lean")
    )
    for stats in others:
        assert all(map(torch.equal, stats, scores))


@both_routes
@all_modes
def test_two_runs_have_the_same_bits(route, mode, monkeypatch):
    force(mode, monkeypatch)
    direction = "policy_reference"
    policy, reference, target_N = models(route, dtype=torch.bfloat16)
    first, second = (
        run(
            token_logps_and_kl, policy, reference, target_N,
            upstream(len(target_N)), direction=direction,
        )
        for _ in range(2)
    )  # fmt: skip
    assert all(map(torch.equal, first[0], second[0])) and all(map(torch.equal, first[1], second[1]))


def test_the_mode_follows_from_what_is_trained_and_what_fits():
    def mode(dtype=torch.bfloat16, needs_grad=(True, True, False)):
        input, weight, _ = random_head(64, 1000, 16, dtype)
        head = Head(input, weight, None, 1.0, None)
        return token_logps_kl_triton.choose_mode((head, head), needs_grad)

    assert mode(needs_grad=(False, False, False)) == "scores"
    assert mode() == mode(needs_grad=(True, False, False)) == "store"
    with workspace(2 * 64 * 1024 * 2 / 2**20):
        assert mode() == "store" and mode(torch.float32) == "lean"


@pytest.mark.parametrize(
    ("mode", "frozen", "passes"),
    [
        ("store", False, 4),
        ("store", True, 3),
        ("partial", False, 5),
        ("partial", True, 4),
        ("lean", False, 6),
        ("lean", True, 5),
    ],
)
@pytest.mark.parametrize("route", ["products"], indirect=True)
def test_a_mode_takes_as_many_gemms_as_it_says(route, mode, frozen, passes):
    # a GPU's products are padded to whole tiles of rows
    N, V, D = 2 * launch.product_tile()[0] if DEVICE == "cuda" else 64, 2048, 96
    heads = tuple(
        Head(input.to(DEVICE), weight.to(DEVICE), None, 1.0, None)
        for input, weight, _ in (random_head(N, V, D, seed=seed) for seed in range(2))
    )
    targets = token_logps_kl_triton.Targets.of(random_target(N, V).to(DEVICE), -100)
    with torch.no_grad(), count_gemms() as counter:
        stats = token_logps_kl_triton.token_logps_kl_fwd(heads, targets, DIRECTIONS[0], mode)
        token_logps_kl_triton.token_logps_kl_bwd(
            upstream(N), heads, targets, stats,
            direction=DIRECTIONS[0], mode=mode, needs_grad=(True, not frozen, False),
        )  # fmt: skip
    assert counter.get_total_flops() == passes * 2 * N * V * D
