"""The kernels behind TDPO1's values in their modes, on a GPU or in Triton's interpreter."""

import os

import pytest
import torch
from fastpref_kernels import naive, tdpo1_token_values, tdpo1_token_values_torch
from fastpref_kernels.gemm import matmul
from fastpref_kernels.head import Head, Targets
from oracle import (
    ROUNDED_TWICE,
    count_gemms,
    double,
    half_kept,
    nearby,
    random_head,
    random_target,
    values_and_gradients,
    workspace,
)

pytest.importorskip("triton", reason="Triton is for Linux")
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET")):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from fastpref_kernels import launch, tdpo1_token_values_triton, token_logps_backward
from fastpref_kernels.gemm_tiles import FUSED_TILES

# the whole file on a GPU, where it is what the kernels are
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# N, V, D: several blocks of rows and columns with ragged ends; rows that no tensor descriptor takes
SHAPES = {"fused": (150, 700, 136), "products": (60, 1100, 123)}
both_routes = pytest.mark.parametrize("route", SHAPES, indirect=True)


@pytest.fixture(autouse=True)
def partial_keeps_half(monkeypatch):
    monkeypatch.setattr(tdpo1_token_values_triton, "kept_rows", half_kept)


@pytest.fixture
def route(request, monkeypatch):
    tile = FUSED_TILES["sm_90"] if request.param == "fused" else None
    monkeypatch.setattr(launch, "fused_tile", lambda device, joint: tile)
    return request.param


@pytest.mark.parametrize("route", ["products"], indirect=True)
@pytest.mark.parametrize(
    ("mode", "passes"),
    [("scores", 2), ("store", 3), ("partial", 3.5), ("lean", 4), ("frozen", 2)],
)
def test_a_mode_takes_as_many_gemms_as_it_says(route, mode, passes):
    # a GPU's products are padded to whole tiles of rows
    N, V, D = 2 * launch.product_tile()[0] if DEVICE == "cuda" else 64, 2048, 96
    input, weight, _ = (leaf.detach().to(DEVICE) for leaf in random_head(N, V, D))
    heads = (Head(input, weight, None, 1.0, None), Head(input.clone(), weight, None, 1.0, None))
    targets = Targets.of(random_target(N, V).to(DEVICE), -100)
    needs_grad = (True, mode != "frozen", False)
    with count_gemms() as counter:
        stats = tdpo1_token_values_triton.tdpo1_token_values_fwd(heads, targets, mode)
        if mode != "scores":
            grad_N = torch.ones(N, device=DEVICE)
            tdpo1_token_values_triton.tdpo1_token_values_bwd(
                grad_N, heads, targets, stats, mode=mode, needs_grad=needs_grad
            )
    assert counter.get_total_flops() == passes * 2 * N * V * D


@both_routes
@pytest.mark.parametrize("mode", ["store", "partial", "lean", "frozen"])
def test_every_mode_matches_float64(route, mode, monkeypatch):
    N, V, D = SHAPES[route]
    monkeypatch.setattr(tdpo1_token_values_triton, "choose_mode", lambda heads, needs_grad: mode)
    policy = tuple(leaf.detach().to(DEVICE) for leaf in random_head(N, V, D))
    for leaf in policy[: 1 if mode == "frozen" else 3]:
        leaf.requires_grad_()
    reference = tuple(leaf.to(DEVICE) for leaf in nearby(tuple(leaf.cpu() for leaf in policy)))
    target_N = random_target(N, V).to(DEVICE)
    ours = values_and_gradients(tdpo1_token_values, policy, reference, target_N, logit_scale=0.7)
    truth = values_and_gradients(
        naive.tdpo1_token_values, double(policy), double(reference), target_N, logit_scale=0.7
    )
    assert (ours[0] - truth[0]).abs().max() <= 5e-5
    for our, true in zip(ours[1:], truth[1:], strict=True):
        assert (our - true).norm() / true.norm() <= 1e-5


@pytest.mark.parametrize("mode", ["store", "frozen"])
def test_a_reference_of_16_bits_rounds_nothing_of_a_policy_in_float32(mode, monkeypatch):
    N, V, D = SHAPES["products"]
    monkeypatch.setattr(tdpo1_token_values_triton, "choose_mode", lambda heads, needs_grad: mode)
    policy = tuple(leaf.detach().to(DEVICE) for leaf in random_head(N, V, D))
    for leaf in policy[: 1 if mode == "frozen" else 3]:
        leaf.requires_grad_()
    reference = [leaf.detach().to(DEVICE) for leaf in random_head(N, V, D, torch.bfloat16, seed=1)]
    target_N = random_target(N, V).to(DEVICE)
    ours = values_and_gradients(tdpo1_token_values, policy, reference, target_N)
    truth = values_and_gradients(
        naive.tdpo1_token_values, double(policy), double(tuple(reference)), target_N
    )
    for our, true in zip(ours, truth, strict=True):
        assert (our - true).norm() / true.norm() <= 1e-5


@pytest.mark.parametrize("mode", ["partial", "lean"])
def test_gradients_in_float32_come_from_no_fused_gemm_of_16_bits(mode, monkeypatch):
    """On Hopper a tile of them beside the GEMM's operands takes more shared memory than there is:
    262,176 of 232,448 bytes."""
    N, V, D = SHAPES["fused"]
    stored = []
    descriptor_of = token_logps_backward.result_descriptor

    def spy(tile, result_RC, **options):
        stored.append(result_RC.dtype)
        return descriptor_of(tile, result_RC, **options)

    monkeypatch.setattr(token_logps_backward, "result_descriptor", spy)
    if DEVICE == "cpu":
        # as on a Hopper GPU; the interpreter multiplies float16 right, and bfloat16 not
        monkeypatch.setattr(launch, "fused_tile", lambda device, joint: FUSED_TILES["sm_90"])
        monkeypatch.setattr(Head, "gemm_dtype", property(lambda head: head.input.dtype))
    monkeypatch.setattr(tdpo1_token_values_triton, "choose_mode", lambda heads, needs_grad: mode)
    policy = tuple(leaf.detach().to(DEVICE).requires_grad_() for leaf in random_head(N, V, D))
    reference = [leaf.detach().to(DEVICE) for leaf in random_head(N, V, D, torch.float16, seed=1)]
    target_N = random_target(N, V).to(DEVICE)
    ours = values_and_gradients(tdpo1_token_values, policy, reference, target_N)
    truth = values_and_gradients(
        naive.tdpo1_token_values, double(policy), double(tuple(reference)), target_N
    )
    assert torch.float32 not in stored
    for our, true in zip(ours, truth, strict=True):
        assert (our - true).norm() / true.norm() <= 1e-5


def test_gradients_in_float32_beside_a_reference_of_16_bits_keep_to_the_workspace(monkeypatch):
    N, V, D = SHAPES["products"]
    tiles = []
    head_gradients = token_logps_backward.head_gradients

    def spy(head, needs_grad, tile, *arguments, **options):
        tiles.append(tile)
        return head_gradients(head, needs_grad, tile, *arguments, **options)

    monkeypatch.setattr(token_logps_backward, "head_gradients", spy)
    # as on a GPU; the interpreter multiplies float16 right
    monkeypatch.setattr(Head, "gemm_dtype", property(lambda head: head.input.dtype))
    monkeypatch.setattr(tdpo1_token_values_triton, "choose_mode", lambda *_: "lean")
    policy = tuple(leaf.detach().to(DEVICE).requires_grad_() for leaf in random_head(N, V, D))
    reference = [leaf.detach().to(DEVICE) for leaf in random_head(N, V, D, torch.float16)]
    with workspace(1):
        values_and_gradients(tdpo1_token_values, policy, reference, random_target(N, V).to(DEVICE))
    ((_, columns),) = tiles
    assert N * columns * 4 <= 2**20 / 2


@both_routes
@pytest.mark.parametrize("heads", ["one", "two"])
def test_a_row_has_the_same_bits_in_every_mode(route, heads):
    N, V, D = SHAPES[route]
    policy = tuple(leaf.detach() for leaf in random_head(N, V, D, torch.bfloat16))
    reference = nearby(policy)
    if heads == "one":
        reference = (reference[0], *policy[1:])
    # moved once, so that a shared head stays one
    on_device = {t: t.to(DEVICE) for t in (*policy, *reference)}
    models = tuple(Head(*map(on_device.get, model), 0.7, None) for model in (policy, reference))
    targets = Targets.of(random_target(N, V).to(DEVICE), -100)
    scores, *others = (
        tdpo1_token_values_triton.tdpo1_token_values_fwd(models, targets, mode)
        for mode in ("scores", "store", "partial", "lean", "frozen")
    )
    for stats in others:
        assert torch.equal(stats.values, scores.values)
        assert torch.equal(stats.reference_logps, scores.reference_logps)


def values_of_rounded(policy, reference, target_N):
    """Values from the reference's other probabilities rounded to bfloat16 once and the library's
    product of them with the policy's head; float64 in all else."""
    (input, weight, bias), (reference_input, reference_weight, reference_bias) = (
        [t.detach().double() for t in model] for model in (policy, reference)
    )
    index_N1 = target_N.clamp_min(0)[:, None]
    reference_NV = reference_input @ reference_weight.t() + reference_bias
    over_NV = reference_NV - reference_NV.gather(1, index_N1)
    kept_NV = over_NV.exp().scatter(1, index_N1, 0.0).bfloat16()
    total_N1 = kept_NV.sum(1, keepdim=True, dtype=torch.float64)
    # 1 - q_y, of which each kept number has its share
    share_N = over_NV.exp().sum(1).reciprocal().neg_().add_(1) / total_N1[:, 0]
    mean_ND = matmul(kept_NV, policy[1].detach()).double()
    slopes_ND = total_N1 * weight[index_N1[:, 0]] - mean_ND
    of_policy_N = (slopes_ND * input).sum(1) + (kept_NV * (bias[index_N1] - bias)).sum(1)
    values_N = share_N * (of_policy_N + (kept_NV * over_NV).sum(1))
    return values_N.masked_fill(target_N == -100, 0)


@pytest.mark.parametrize("mib", [64, 4096])
def test_values_from_16_bits_are_as_exact_as_their_rounding_allows(mib):
    N, V, D = (2048, 50_257, 1024) if torch.cuda.is_available() else (96, 4099, 64)
    policy = [leaf.detach().to(DEVICE) for leaf in random_head(N, V, D, torch.bfloat16)]
    reference = [t.to(DEVICE) for t in nearby(tuple(leaf.cpu() for leaf in policy), by=0.02)]
    for leaf in policy:
        leaf.requires_grad_()
    target_N = random_target(N, V).to(DEVICE)
    with workspace(mib):
        ours = values_and_gradients(tdpo1_token_values, policy, reference, target_N)
    truth = values_and_gradients(
        naive.tdpo1_token_values, double(policy), double(reference), target_N
    )
    rounded_N = values_of_rounded(policy, reference, target_N)
    # as many roundings, of other numbers: the mean over the rows is the same but for chance
    bound = 1.5 * (rounded_N - truth[0]).abs().mean() + 1e-5
    assert (ours[0] - truth[0]).abs().mean() <= bound
    # the interpreter cuts bfloat16 off where a GPU rounds
    gradient_bound = ROUNDED_TWICE if DEVICE == "cuda" else 5e-3
    for our, true in zip(ours[1:], truth[1:], strict=True):
        assert (our.double() - true).norm() / true.norm() <= gradient_bound


@both_routes
def test_a_negative_id_has_no_finite_value(route):
    """A GPU does not check ids."""
    N, V, D = SHAPES[route]
    input, weight, _ = (leaf.detach().to(DEVICE) for leaf in random_head(N, V, D))
    heads = (Head(input, weight, None, 1.0, None), Head(input.flip(0), weight, None, 1.0, None))
    target_N = random_target(N, V).to(DEVICE)
    target_N[1:3] = torch.tensor([-5, -1])
    targets = Targets.of(target_N, -100)
    for implementation in (tdpo1_token_values_triton, tdpo1_token_values_torch):
        values_N = implementation.tdpo1_token_values_fwd(heads, targets, "scores").values
        assert values_N[1:3].isnan().all()
        assert values_N[3:].isfinite().all()
