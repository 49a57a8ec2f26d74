"""The Triton path in its modes, on a GPU or in Triton's interpreter (TRITON_INTERPRET=1)."""

import os

import pytest
import torch
from fastpref_kernels import naive, token_logps
from oracle import (
    ROUNDED_TWICE,
    TIMES_TORCH,
    cases,
    count_gemms,
    double,
    gradients,
    half_kept,
    random_head,
    random_target,
    workspace,
)

pytest.importorskip("triton", reason="Triton is for Linux")
if not (torch.cuda.is_available() or os.environ.get("TRITON_INTERPRET")):
    pytest.skip("needs a GPU or TRITON_INTERPRET=1", allow_module_level=True)

from fastpref_kernels import launch, token_logps_triton
from fastpref_kernels.gemm_tiles import FUSED_TILES
from fastpref_kernels.workspace import keeping_mode, kept_rows

# the whole file on a GPU, where it is what the kernels are
pytestmark = [pytest.mark.gpu] if torch.cuda.is_available() else []
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
# N, V, D: several blocks of rows and columns with ragged ends; rows that no tensor descriptor takes
SHAPES = {"fused": (150, 700, 136), "products": (60, 1100, 123)}
MODES = ["store", "partial", "lean", "frozen"]
TRANSFORMS = {
    "plain": {},
    "scale": {"logit_scale": 0.7},
    "softcap": {"logit_scale": 0.7, "logit_softcap": 20.0},
}


@pytest.fixture(autouse=True)
def partial_keeps_half(monkeypatch):
    monkeypatch.setattr(token_logps_triton, "kept_rows", half_kept)


@pytest.fixture
def route(request, monkeypatch):
    """Where logits come from; on a GPU float32 goes to the library's GEMM in any case."""
    tile = FUSED_TILES["sm_90"] if request.param == "fused" else None
    monkeypatch.setattr(launch, "fused_tile", lambda device, joint: tile)
    return request.param


def force(mode, monkeypatch):
    monkeypatch.setattr(token_logps_triton, "choose_mode", lambda head, needs_grad: mode)


def case(N, V, D, *, dtype=torch.float32, mode="store", bias=True):
    """Leaves of which a frozen head's want no gradient, targets, upstream gradients."""
    leaves = [leaf.detach().to(DEVICE) for leaf in random_head(N, V, D, dtype)]
    if not bias:
        leaves[2] = None
    wanted = [leaves[0]] if mode == "frozen" else [leaf for leaf in leaves if leaf is not None]
    for leaf in wanted:
        leaf.requires_grad_()
    grad_N = torch.randn(N, generator=torch.Generator().manual_seed(1)).to(DEVICE)
    return leaves, wanted, random_target(N, V).to(DEVICE), grad_N


def relative_error(actual, expected):
    return ((actual.double() - expected).norm() / expected.norm()).item()


def assert_exact(leaves, wanted, target_N, grad_N, *, logp_bound, gradient_bound, **options):
    """Values and gradients against float64."""

    def run(op, leaves, wanted):
        input, weight, bias = leaves
        return gradients(
            lambda *_: op(input, weight, target_N, linear_bias=bias, **options), wanted, grad_N
        )

    logps_N, grads = run(token_logps, leaves, wanted)
    of_torch_N, _ = run(naive.token_logps, leaves, wanted)
    true_leaves = double(leaves)
    true_wanted = [leaf for leaf in true_leaves if leaf is not None and leaf.requires_grad]
    true_logps_N, true_grads = run(naive.token_logps, true_leaves, true_wanted)
    if leaves[0].dtype == torch.float32:
        torch_error = (of_torch_N.double() - true_logps_N).abs().max().item()
        logp_bound = max(logp_bound, TIMES_TORCH * torch_error)
    assert (logps_N - true_logps_N).abs().max() <= logp_bound
    for leaf, grad, true in zip(wanted, grads, true_grads, strict=True):
        assert grad.dtype == leaf.dtype and grad.isfinite().all()
        assert relative_error(grad, true) <= gradient_bound


@cases(route=SHAPES, mode=MODES, transform=TRANSFORMS)
def test_every_mode_is_exact_in_float32(route, mode, transform, monkeypatch):
    force(mode, monkeypatch)
    assert_exact(
        *case(*SHAPES[route], mode=mode, bias=transform == "scale"),
        logp_bound=1e-5,
        gradient_bound=2e-6,
        **TRANSFORMS[transform],
    )


@cases(route=SHAPES, mode=MODES, transform=TRANSFORMS)
def test_every_mode_keeps_the_bounds_of_16_bits(route, mode, transform, monkeypatch):
    force(mode, monkeypatch)
    assert_exact(
        *case(*SHAPES[route], dtype=torch.bfloat16, mode=mode),
        logp_bound=5e-5,
        gradient_bound=ROUNDED_TWICE,
        **TRANSFORMS[transform],
    )


@pytest.mark.parametrize("route", ["fused", "products"], indirect=True)
def test_float16_gradients_do_not_underflow(route):
    leaves, wanted, target_N, grad_N = case(*SHAPES[route], dtype=torch.float16)
    # the gradient of a loss divided by the tokens of a large batch
    assert_exact(
        leaves, wanted, target_N, grad_N * 2.0**-10, logp_bound=5e-5, gradient_bound=ROUNDED_TWICE
    )


@cases(route=SHAPES, mode=MODES, margin=[60.0, -60.0, -200.0])
def test_certain_and_hopeless_tokens_are_exact(route, mode, margin, monkeypatch):
    force(mode, monkeypatch)
    N, V, D = SHAPES[route]
    leaves, wanted, target_N, grad_N = case(N, V, D, mode=mode, bias=False)
    with torch.no_grad():
        # column 7 leads by the margin, or trails by it, in every row
        leaves[0][:, 0] = 1.0
        leaves[1][:, 0] = 0.0
        leaves[1] *= 0.1
        leaves[1][7, 0] = margin
        target_N[5::40] = 7
    assert_exact(leaves, wanted, target_N, grad_N, logp_bound=1e-4, gradient_bound=1e-5)


@pytest.mark.parametrize("route", ["fused", "products"], indirect=True)
def test_gradients_of_certain_tokens_keep_their_digits(route, monkeypatch):
    N, V, D = SHAPES[route]
    for mode in MODES:
        force(mode, monkeypatch)
        leaves, wanted, _, grad_N = case(N, V, D, mode=mode, bias=False)
        with torch.no_grad():
            leaves[0][:, 0] = 1.0
            leaves[1] *= 0.1
            leaves[1][7, 0] = 45.0
        target_N = torch.full((N,), 7, device=DEVICE)
        # 1 - p is 1e-17: gradients would be 0 or noise if it were a difference
        assert_exact(leaves, wanted, target_N, grad_N, logp_bound=1e-15, gradient_bound=1e-4)


@pytest.mark.parametrize("route", ["fused", "products"], indirect=True)
def test_a_row_alone_is_the_same_row_among_2048(route, monkeypatch):
    N, V, D = 2048, 300, 64
    dtype = torch.bfloat16 if DEVICE == "cuda" else torch.float32
    (input, weight, bias), _, target_N, _ = case(N, V, D, dtype=dtype)
    with torch.no_grad():
        # quarters sum exactly in any order: NumPy's GEMM, the interpreter's, keeps to none
        for leaf in (input, weight):
            leaf.mul_(4).round_().div_(4)
    force("scores", monkeypatch)
    batch_N = token_logps(input, weight, target_N, linear_bias=bias)
    # where a next row of it would begin, the copy engine could not read
    of_wider = torch.cat([input, input[:, :1]], 1)[:1, :D]
    alone_1 = token_logps(of_wider, weight, target_N[:1], linear_bias=bias)
    assert torch.equal(alone_1, batch_N[:1])
    for mode in MODES:
        force(mode, monkeypatch)
        weight.requires_grad_(mode != "frozen")
        bias.requires_grad_(mode != "frozen")
        for rows in (slice(1, 2), slice(131, 150), slice(2000, 2048)):
            part_R = token_logps(input[rows], weight, target_N[rows], linear_bias=bias)
            assert torch.equal(part_R, batch_N[rows])


@pytest.mark.parametrize("route", ["fused", "products"], indirect=True)
@pytest.mark.parametrize("transform", ["plain", "softcap"])
def test_a_row_has_the_same_bits_in_every_mode(route, transform, monkeypatch):
    """A policy with gradients and its reference without begin at a log-ratio of exactly zero."""
    (input, weight, bias), _, target_N, _ = case(*SHAPES[route], dtype=torch.bfloat16)
    head = token_logps_triton.Head(
        input.detach(),
        weight.detach(),
        bias.detach(),
        TRANSFORMS[transform].get("logit_scale", 1.0),
        TRANSFORMS[transform].get("logit_softcap"),
    )
    targets = token_logps_triton.Targets.of(target_N, -100)
    scores_N = token_logps_triton.token_logps_fwd(head, targets, "scores").logps
    for mode in MODES:
        stats = token_logps_triton.token_logps_fwd(head, targets, mode)
        assert torch.equal(stats.logps, scores_N), mode


@pytest.mark.parametrize("route", ["fused", "products"], indirect=True)
def test_an_id_without_a_column_scores_nothing_finite(route):
    """A GPU does not check ids: what lies behind the head is not read for one."""
    N, V, D = SHAPES[route]
    (input, weight, _), _, target_N, _ = case(N, V + 64, D)
    target_N[1:4] = torch.tensor([V + 9, -5, -1])
    head = token_logps_triton.Head(input.detach(), weight.detach()[:V], None, 1.0, None)
    target_N[4:] = target_N[4:].clamp_max(V - 1)
    targets = token_logps_triton.Targets.of(target_N, -100)
    logps_N = token_logps_triton.token_logps_fwd(head, targets, "scores").logps
    assert logps_N[1] == float("-inf") and not logps_N[2:4].isfinite().any()
    assert logps_N[4:].isfinite().all() and not logps_N[0]


@pytest.mark.parametrize("transform", ["plain", "softcap"])
@pytest.mark.parametrize("mode", MODES)
def test_programs_that_go_over_several_tiles_leave_the_same_bits(mode, transform, monkeypatch):
    force(mode, monkeypatch)
    leaves, wanted, target_N, grad_N = case(*SHAPES["fused"], dtype=torch.bfloat16, mode=mode)

    def run(tile):
        monkeypatch.setattr(launch, "fused_tile", lambda device, joint: tile)
        return gradients(
            lambda *_: token_logps(
                *leaves[:2], target_N, linear_bias=leaves[2], **TRANSFORMS[transform]
            ),
            wanted,
            grad_N,
        )

    tile = FUSED_TILES["sm_90"]._replace(programs=0)
    (logps_N, grads), (looped_N, looped) = run(tile), run(tile._replace(programs=1))
    assert torch.equal(looped_N, logps_N) and all(map(torch.equal, looped, grads))


@pytest.mark.parametrize("programs", [0, 1])
@pytest.mark.parametrize("mode", MODES)
def test_sums_of_parts_of_d_are_as_exact(mode, programs, monkeypatch):
    # the last part is shorter
    tile = FUSED_TILES["sm_90"]._replace(promote_d=128, programs=programs)
    monkeypatch.setattr(launch, "fused_tile", lambda device, joint: tile)
    force(mode, monkeypatch)
    assert_exact(
        *case(
            *SHAPES["fused"], mode=mode, dtype=torch.bfloat16 if DEVICE == "cuda" else torch.float32
        ),
        logp_bound=5e-5 if DEVICE == "cuda" else 1e-5,
        gradient_bound=ROUNDED_TWICE if DEVICE == "cuda" else 2e-6,
    )


@pytest.mark.parametrize("mib", [0.1, 2, 64, 300, 1024, 16_384])
def test_exponentials_are_made_of_the_products_of_every_other_mode(mib):
    # a product of the library in another width may have other bits
    input, weight, _ = random_head(8, 16, 2304)
    head = token_logps_triton.Head(input, weight, None, 1.0, None)
    targets = token_logps_triton.Targets.of(random_target(8, 16), -100)
    operands = launch.Operands.of(head, targets)._replace(tile=None)
    with workspace(mib):
        _, cols = token_logps_triton._frozen_tile(operands)
        assert cols % launch.product_tile()[1] == 0


@pytest.mark.parametrize("route", ["fused", "products"], indirect=True)
@pytest.mark.parametrize("mode", MODES)
def test_two_runs_have_the_same_bits(route, mode, monkeypatch):
    force(mode, monkeypatch)
    leaves, wanted, target_N, grad_N = case(*SHAPES[route], dtype=torch.bfloat16, mode=mode)

    def run():
        return gradients(
            lambda *_: token_logps(leaves[0], leaves[1], target_N, linear_bias=leaves[2]),
            wanted,
            grad_N,
        )

    (first_N, first), (second_N, second) = run(), run()
    assert torch.equal(first_N, second_N) and all(map(torch.equal, first, second))


@pytest.mark.parametrize("route", ["fused", "products"], indirect=True)
@pytest.mark.parametrize("mode", MODES)
def test_a_small_workspace_changes_the_tiles_and_not_the_result(route, mode, monkeypatch):
    force(mode, monkeypatch)
    with workspace(0.1):
        assert_exact(*case(*SHAPES[route], mode=mode), logp_bound=1e-5, gradient_bound=2e-6)


def test_the_mode_follows_from_what_is_trained_and_what_fits():
    def mode(dtype=torch.bfloat16, needs_grad=(True, True, False), V=1000):
        input, weight, _ = random_head(64, V, 16, dtype)
        head = token_logps_triton.Head(input, weight, None, 1.0, None)
        return token_logps_triton.choose_mode(head, needs_grad)

    assert mode(needs_grad=(False, False, False)) == "scores"
    assert mode(needs_grad=(True, False, False)) == "frozen"
    assert mode() == mode(needs_grad=(False, True, False)) == "store"
    with workspace(64 * 1024 * 2 / 2**20):
        assert mode() == "store" and mode(torch.float32) == mode(V=1025) == "lean"


def test_what_the_workspace_holds_of_many_rows_is_kept():
    with workspace(8):
        assert [kept_rows(N, 2048) for N in (4096, 4097, 100_000)] == [4096, 2048, 2048]
        assert [kept_rows(N, 2049) for N in (4094, 4095, 100_000)] == [4094, 0, 0]
        assert kept_rows(10_000, 1000) == 4096
        assert [keeping_mode(N, 2048) for N in (4096, 4097)] == ["store", "partial"]
        assert keeping_mode(4095, 2049) == "lean"
    with workspace(1024):
        # the rest is for slices of the other rows
        assert kept_rows(5000, 2**18) == 3072


@pytest.mark.parametrize(
    ("mode", "passes"),
    [("scores", 1), ("store", 3), ("partial", 3.5), ("lean", 4), ("frozen", 2)],
)
@pytest.mark.parametrize("route", ["products"], indirect=True)
def test_a_mode_takes_as_many_gemms_as_it_says(route, mode, passes):
    # a GPU's products are padded to whole tiles of rows
    N, V, D = 2 * launch.product_tile()[0] if DEVICE == "cuda" else 64, 2048, 96
    input, weight, _ = (leaf.detach().to(DEVICE) for leaf in random_head(N, V, D))
    head = token_logps_triton.Head(input, weight, None, 1.0, None)
    targets = token_logps_triton.Targets.of(random_target(N, V).to(DEVICE), -100)
    needs_grad = (True, mode != "frozen", False)
    with count_gemms() as counter:
        stats = token_logps_triton.token_logps_fwd(head, targets, mode)
        if mode != "scores":
            token_logps_triton.token_logps_bwd(
                torch.ones(N, device=DEVICE), head, targets, stats, mode, needs_grad
            )
    assert counter.get_total_flops() == passes * 2 * N * V * D


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("mode", MODES)
def test_more_than_two_to_the_31_logits_and_65535_rows(mode, monkeypatch):
    force(mode, monkeypatch)
    N, V, D = 70_000, 32_768, 64
    input = torch.randn(N, D, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    weight = torch.randn(V, D, device="cuda", dtype=torch.bfloat16) * 3 / D**0.5
    weight.requires_grad_(mode != "frozen")
    target_N = torch.randint(V, (N,), device="cuda")
    logps_N = token_logps(input, weight, target_N)
    logps_N.sum().backward()
    last = slice(N - 256, N)
    leaves = double((input[last], weight))
    true_N = naive.token_logps(*leaves, target_N[last])
    (true_ND,) = torch.autograd.grad(true_N.sum(), leaves[:1])
    assert (logps_N[last] - true_N).abs().max() <= 5e-5
    assert relative_error(input.grad[last], true_ND) <= ROUNDED_TWICE
