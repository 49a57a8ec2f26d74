import math
import os
import re

import numpy as np
import pytest
import torch
from fastpref_kernels import (
    naive,
    set_workspace_mib,
    tdpo1_token_values,
    token_logps,
    token_logps_and_kl,
)
from oracle import (
    SHAPES,
    WORKSPACES_MIB,
    assert_no_worse_than_torch,
    cases,
    double,
    gradients,
    peak_bytes,
    random_head,
    random_target,
    torch_logits,
    workspace,
)
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch.nn import functional as F

INTERPRETED = bool(os.environ.get("TRITON_INTERPRET"))
FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


def torch_token_logps(input, weight, target, *, linear_bias, scale=1.0, softcap=None, ignore=-100):
    logits_NV = torch_logits(input, weight, linear_bias, scale, softcap)
    return -F.cross_entropy(logits_NV, target, reduction="none", ignore_index=ignore)


def assert_matches_float64(leaves, target, *, scale=1.0, softcap=None, ignore=-100):
    """Values and every gradient, under an upstream gradient that differs per token."""
    options = {"logit_scale": scale, "logit_softcap": softcap, "ignore_index": ignore}

    def ours(input, weight, bias):
        return token_logps(input, weight, target, linear_bias=bias, **options)

    def same_dtype(input, weight, bias):
        return torch_token_logps(
            input, weight, target, linear_bias=bias, scale=scale, softcap=softcap, ignore=ignore
        )

    def truth(input, weight, bias):
        return naive.token_logps(input, weight, target, linear_bias=bias, **options)

    grad_N = torch.randn(len(target), generator=torch.Generator().manual_seed(1))
    our_logps_N, our_grads = gradients(ours, leaves, grad_N)
    torch_logps_N, torch_grads = gradients(same_dtype, leaves, grad_N)
    true_logps_N, true_grads = gradients(truth, double(leaves), grad_N)
    assert our_logps_N.dtype == torch.float32
    assert_no_worse_than_torch(our_logps_N, torch_logps_N, true_logps_N)
    for leaf, our, same, true in zip(leaves, our_grads, torch_grads, true_grads, strict=True):
        assert our.dtype == leaf.dtype
        assert_no_worse_than_torch(our, same, true)


@cases(shape=SHAPES, dtype=FLOATS, mib=WORKSPACES_MIB)
def test_token_logps_and_gradients_match_float64(shape, dtype, mib):
    N, V, D = shape
    with workspace(mib):
        assert_matches_float64(random_head(N, V, D, dtype), random_target(N, V))


@pytest.mark.parametrize("mib", WORKSPACES_MIB)
@pytest.mark.parametrize("softcap", [None, 5.0])
def test_scale_comes_before_the_softcap(softcap, mib):
    with workspace(mib):
        assert_matches_float64(
            random_head(252, 507, 123), random_target(252, 507), scale=0.7, softcap=softcap
        )


# logits that are all at the cap, and logits to which it is nothing
@pytest.mark.parametrize("softcap", [1e-3, 1e5])
def test_a_softcap_may_be_small_or_large(softcap):
    assert_matches_float64(random_head(20, 37, 16), random_target(20, 37), softcap=softcap)


@pytest.mark.parametrize(
    ("input_dtype", "weight_dtype"),
    [(torch.bfloat16, torch.float32), (torch.float32, torch.bfloat16), (torch.float16,) * 2],
)
def test_dtypes_may_be_mixed(input_dtype, weight_dtype):
    input, weight, bias = random_head(252, 507, 123)
    leaves = tuple(
        leaf.detach().to(dtype).requires_grad_()
        for leaf, dtype in [(input, input_dtype), (weight, weight_dtype), (bias, torch.float32)]
    )
    assert_matches_float64(leaves, random_target(252, 507))


def test_naive_float64_is_log_softmax_at_the_target():
    input, weight, bias = double(random_head(50, 61, 17))
    target_N = random_target(50, 61)
    grad_N = torch.randn(50, dtype=torch.float64)
    ours = gradients(
        lambda h, w, b: naive.token_logps(h, w, target_N, linear_bias=b),
        (input, weight, bias),
        grad_N,
    )
    theirs = gradients(
        lambda h, w, b: -F.cross_entropy(F.linear(h, w, b), target_N, reduction="none"),
        (input, weight, bias),
        grad_N,
    )
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)


def test_columns_of_minus_infinity_have_no_probability_and_no_gradient():
    input, weight, bias = random_head(252, 507, 123)
    with torch.no_grad():
        # the first columns, so that the online sums start from -inf, and a padded tail
        bias[:90] = bias[-7:] = float("-inf")
    target_N = 90 + random_target(252, 410, ignore=None)
    with workspace(0.25):
        assert_matches_float64((input, weight, bias), target_N)
        token_logps(input, weight, target_N, linear_bias=bias).sum().backward()
    assert not bias.grad[:90].any() and not bias.grad[-7:].any()
    assert not weight.grad[:90].any() and not weight.grad[-7:].any()


def test_a_logit_two_hundred_nats_below_the_maximum_is_finite():
    input_ND = torch.zeros(1, 64)
    input_ND[0, 3] = 200.0
    target_N = torch.tensor([5])
    assert input_ND.softmax(-1).log()[0, 5].isinf()
    logps_N, (grad_ND,) = gradients(
        lambda h: token_logps(h, torch.eye(64), target_N),
        (input_ND.requires_grad_(),),
        torch.ones(1),
    )
    torch.testing.assert_close(logps_N, torch.tensor([-200.0]))
    torch.testing.assert_close(grad_ND[0, [3, 5]], torch.tensor([-1.0, 1.0]))


@pytest.mark.parametrize("margin", [5.0, 14.0, 30.0, 60.0])
def test_confident_tokens_keep_their_digits(margin):
    """In float32 log-sum-exp minus the target's logit is zero from 16 nats on."""
    target_N = torch.tensor([3, 63])
    input_ND = margin * F.one_hot(target_N, 64).float() + torch.randn(2, 64) * 1e-3
    grad_N = torch.tensor([1.0, -2.5])
    logps_N, (grad_ND,) = gradients(
        lambda h: token_logps(h, torch.eye(64), target_N), (input_ND.requires_grad_(),), grad_N
    )
    true_logps_N, (true_grad_ND,) = gradients(
        lambda h: naive.token_logps(h, torch.eye(64).double(), target_N),
        double((input_ND,)),
        grad_N,
    )
    torch.testing.assert_close(logps_N.double(), true_logps_N, rtol=2e-5, atol=0)
    torch.testing.assert_close(grad_ND.double(), true_grad_ND, rtol=2e-5, atol=0)


def test_slopes_of_float16_hidden_states_are_not_rounded_to_float16():
    """A certain token's are below its smallest number, those of a large head above its largest."""
    input, weight, _ = random_head(2, 61, 16)
    input_ND = input.detach().half().requires_grad_()
    with torch.no_grad():
        input_ND[:, 0] = 1.0
        weight *= torch.tensor([[0.0] + [2.0**18] * 15])
        input_ND[1, 1:], weight[7, 0] = 0.0, 24.0
    target_N = torch.tensor([3, 7])
    grad_N = torch.tensor([2.0**-18, 2.0**-2])

    def op(hidden_ND, weight_VD, op=token_logps):
        return op(hidden_ND, weight_VD, target_N)

    _, (ours,) = gradients(op, (input_ND,), grad_N, weight.detach())
    exact = double((input_ND, weight))
    _, (true,) = gradients(op, exact[:1], grad_N, exact[1].detach(), naive.token_logps)
    for our_D, true_D in zip(ours.double(), true, strict=True):
        assert ((our_D - true_D).norm() / true_D.norm()).item() <= 2.0**-11


@pytest.mark.parametrize("offset", [-1000.0, 1000.0])
def test_a_common_offset_of_all_logits_changes_nothing(offset):
    input, weight, _ = random_head(60, 61, 17)
    target_N = random_target(60, 61)
    expected_N = token_logps(input, weight, target_N)
    shifted_N = token_logps(input, weight, target_N, linear_bias=torch.full((61,), offset))
    torch.testing.assert_close(shifted_N, expected_N, rtol=0, atol=5e-4)


# kept exponentials, and logits that are made again
@pytest.mark.parametrize("mib", [1024, 0.001])
def test_an_offset_of_all_logits_does_not_round_their_gradients(mib):
    # of a head for one number, whose weight's gradient is the logits'; in float32 without rounding
    weight_VD, reference_VD = torch.randint(-1024, 1024, (2, 40, 1)) / 512
    target_N, ones_ND = torch.tensor([0, 3, -100, 39]), torch.ones(4, 1)

    def of(offset):
        weight = (weight_VD + offset).requires_grad_()
        models = weight, target_N, ones_ND, reference_VD + offset
        for values_N in (
            token_logps(ones_ND, *models[:2]),
            token_logps_and_kl(ones_ND, *models).kl,
            token_logps_and_kl(ones_ND, *models, direction="policy_reference").kl,
            tdpo1_token_values(ones_ND, *models),
        ):
            yield torch.autograd.grad(values_N, weight, torch.tensor([1.0, -2, 1, 0.5]))[0]

    with workspace(mib):
        for gradient_VD, expected_VD in zip(of(-4000.0), of(0.0), strict=True):
            torch.testing.assert_close(gradient_VD, expected_VD, rtol=0, atol=1e-6)


def test_an_offset_of_two_to_the_24_leaves_log_two():
    # float32 has no numbers between 2^24 and 2^24 + 2: lse is the offset itself
    input, weight = torch.zeros(3, 8), torch.zeros(2, 8)
    logps_N = token_logps(
        input, weight, torch.tensor([0, 1, 0]), linear_bias=torch.full((2,), 2.0**24)
    )
    torch.testing.assert_close(logps_N, torch.full((3,), -math.log(2)))


def test_a_vocabulary_that_no_block_divides_is_whole():
    assert_matches_float64(random_head(5, 129_920, 8), torch.tensor([0, 129_919, 64, 128_000, 7]))


@cases(together=1, ignore=[-100, 3, 0, -1], softcap=[None, 30.0])
def test_ignored_rows_score_zero_whatever_they_hold(ignore, softcap):
    input, weight, bias = random_head(252, 507, 123)
    target_N = random_target(252, 507, ignore=ignore)
    options = {"ignore_index": ignore, "logit_softcap": softcap}
    with torch.no_grad():
        clean = input.clone().requires_grad_()
        input[::5] = float("nan")
    grad_N = torch.randn(252)
    logps_N, (grad_ND, grad_VD, grad_V) = gradients(
        lambda h, w, b: token_logps(h, w, target_N, linear_bias=b, **options),
        (input, weight, bias),
        grad_N,
    )
    assert not logps_N[target_N == ignore].any() and not grad_ND[target_N == ignore].any()
    assert grad_VD.isfinite().all() and grad_V.isfinite().all()
    # in the mode of a frozen head too
    frozen_N = token_logps(input, weight.detach(), target_N, linear_bias=bias.detach(), **options)
    (frozen_ND,) = torch.autograd.grad(frozen_N, input, grad_N)
    assert torch.equal(frozen_N, logps_N) and not frozen_ND[target_N == ignore].any()
    torch.testing.assert_close(frozen_ND, grad_ND, rtol=1e-4, atol=1e-5)
    assert_matches_float64((clean, weight, bias), target_N, ignore=ignore, softcap=softcap)


def test_a_batch_of_ignored_rows_keeps_the_graph_connected():
    leaves = random_head(20, 61, 17)
    target_N = torch.full((20,), -100)
    logps_N, grads = gradients(
        lambda h, w, b: token_logps(h, w, target_N, linear_bias=b), leaves, torch.ones(20)
    )
    assert not logps_N.any() and not any(grad.any() for grad in grads)


def test_no_rows_at_all_give_zero_gradients():
    leaves = random_head(0, 61, 17)
    target_N = torch.empty(0, dtype=torch.int64)
    logps_N, grads = gradients(
        lambda h, w, b: token_logps(h, w, target_N, linear_bias=b), leaves, torch.ones(0)
    )
    assert logps_N.shape == (0,)
    for leaf, grad in zip(leaves, grads, strict=True):
        assert grad.shape == leaf.shape and not grad.any()


def test_a_vocabulary_of_one_word_is_certain():
    leaves = random_head(4, 1, 17)
    logps_N, grads = gradients(
        lambda h, w, b: token_logps(h, w, torch.zeros(4).long(), linear_bias=b),
        leaves,
        torch.ones(4),
    )
    assert not logps_N.any() and not any(grad.any() for grad in grads)


def test_strides_of_inputs_and_of_the_upstream_gradient_do_not_matter():
    input, weight, bias = (leaf.detach() for leaf in random_head(60, 61, 17))
    target_N = random_target(60, 61)
    strided = (
        torch.stack([input, input], -1)[..., 0],
        weight.t().contiguous().t(),
        torch.stack([bias, bias], -1)[:, 1],
    )
    assert not any(tensor.is_contiguous() for tensor in strided)
    strided_target_N = torch.stack([target_N, target_N], -1)[:, 0]
    expanded_N = torch.tensor([0.3]).expand(60)
    expected = gradients(
        lambda h, w, b: token_logps(h, w, target_N, linear_bias=b),
        tuple(tensor.requires_grad_() for tensor in (input, weight, bias)),
        expanded_N.contiguous(),
    )
    actual = gradients(
        lambda h, w, b: token_logps(h, w, strided_target_N, linear_bias=b),
        tuple(tensor.requires_grad_() for tensor in strided),
        expanded_N,
    )
    torch.testing.assert_close(actual, expected)


def test_an_ignored_index_beyond_32_bits_ignores_no_target_of_32():
    input, weight, _ = random_head(6, 61, 17)
    target_N = torch.arange(6)
    expected = token_logps(input, weight, target_N)
    for op in (token_logps, naive.token_logps):
        logps_N = op(input, weight, target_N.int(), ignore_index=2**32)
        torch.testing.assert_close(logps_N, expected)
    with pytest.raises(ValueError, match=r"target must be in \[0, 61\), got -1"):
        token_logps(input, weight, target_N.int() - 1, ignore_index=2**32 - 1)


def test_int32_targets_are_targets():
    input, weight, _ = random_head(60, 61, 17)
    target_N = random_target(60, 61)
    assert torch.equal(
        token_logps(input, weight, target_N.int()), token_logps(input, weight, target_N)
    )


def test_the_same_inputs_give_the_same_bits():
    leaves = random_head(252, 507, 123, torch.bfloat16)
    target_N, grad_N = random_target(252, 507), torch.randn(252)

    def run() -> list[Tensor]:
        value, grads = gradients(
            lambda h, w, b: token_logps(h, w, target_N, linear_bias=b), leaves, grad_N
        )
        return [value, *grads]

    with workspace(0.25):
        assert all(map(torch.equal, run(), run()))


@pytest.mark.skipif(not torch.backends.mkl.is_available(), reason="seen with MKL only")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("V", "D"), [(507, 123), (2049, 64), (7, 31), (2, 64)])
def test_a_row_has_the_same_bits_in_any_batch(V, D, dtype):
    if INTERPRETED and V < 16:
        pytest.skip("narrow products are a GPU library's there")
    input, weight, _ = random_head(252, V, D, dtype)
    target_N = random_target(252, V, ignore=None)
    batch_N = token_logps(input, weight, target_N)
    for rows in (slice(0, 1), slice(17, 20), slice(100, 233)):
        assert torch.equal(token_logps(input[rows], weight, target_N[rows]), batch_N[rows])


def test_a_frozen_head_allocates_nothing_for_its_gradient():
    N, V, D = 8, 4096, 64
    input, weight, bias = random_head(N, V, D)
    weight.requires_grad_(False)
    bias.requires_grad_(False)
    with workspace(0.25):
        logps_N = token_logps(input, weight, random_target(N, V), linear_bias=bias)
        peak = peak_bytes(lambda: logps_N.sum().backward())
    assert weight.grad is None and bias.grad is None
    assert peak < 2**18 < V * D * 4


def test_frozen_hidden_states_leave_the_head_its_gradient():
    input, weight, bias = random_head(60, 61, 17)
    target_N = random_target(60, 61)
    token_logps(input, weight, target_N, linear_bias=bias).sum().backward()
    frozen = [leaf.detach().requires_grad_() for leaf in (weight, bias)]
    token_logps(input.detach(), frozen[0], target_N, linear_bias=frozen[1]).sum().backward()
    assert torch.equal(frozen[0].grad, weight.grad) and torch.equal(frozen[1].grad, bias.grad)


@pytest.mark.skipif(INTERPRETED, reason="Triton's interpreter holds on to a kernel's tensors")
@pytest.mark.parametrize(("N", "V"), [(2048, 64), (64, 2048), (512, 512)])
def test_the_workspace_bounds_every_tensor(N, V):
    mib, D = 0.25, 16
    input, weight, bias = random_head(N, V, D)

    def run():
        token_logps(
            input, weight, random_target(N, V), linear_bias=bias, logit_softcap=30.0
        ).sum().backward()

    with workspace(mib):
        peak = peak_bytes(run)
    # not workspace: the gradients and the float32 sum that the hidden states' is rounded from,
    # and a dozen numbers a row, half of them float64
    assert peak <= mib * 2**20 + 4 * D * (2 * N + V) + 8 * 12 * N < N * V * 4 * 2


def test_without_gradients_nothing_is_saved():
    input, weight, _ = random_head(60, 61, 17)
    saved = []

    def keep(tensor: Tensor) -> Tensor:
        saved.append(tensor)
        return tensor

    with torch.no_grad(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        logps_N = token_logps(input, weight, random_target(60, 61))
    assert logps_N.grad_fn is None and not saved


def test_a_second_backward_over_a_retained_graph_repeats_the_first():
    input, weight, _ = random_head(60, 61, 17)
    loss = token_logps(input, weight, random_target(60, 61)).square().sum()
    first = torch.autograd.grad(loss, (input, weight), retain_graph=True)
    assert all(map(torch.equal, first, torch.autograd.grad(loss, (input, weight))))


def test_log_probabilities_may_be_changed_in_place():
    input, weight, _ = random_head(60, 61, 17)
    target_N, mask_N = random_target(60, 61), torch.arange(60) % 3 > 0
    expected = torch.autograd.grad(
        token_logps(input, weight, target_N).masked_fill(~mask_N, 0).sum(), (input, weight)
    )
    logps_N = token_logps(input, weight, target_N)
    logps_N[~mask_N] = 0
    assert all(map(torch.equal, torch.autograd.grad(logps_N.sum(), (input, weight)), expected))


def test_gradients_of_gradients_are_refused():
    input, weight, _ = random_head(6, 61, 17)
    loss = token_logps(input, weight, random_target(6, 61)).square().sum()
    (grad_ND,) = torch.autograd.grad(loss, input, create_graph=True)
    with pytest.raises(RuntimeError, match=r"token_logps is differentiable once.*create_graph"):
        grad_ND.sum().backward()
    scores = token_logps_and_kl(input, weight, random_target(6, 61), input, weight)
    (grad_ND,) = torch.autograd.grad(scores.kl.sum(), input, create_graph=True)
    with pytest.raises(RuntimeError, match=r"token_logps_and_kl is differentiable once"):
        grad_ND.sum().backward()


def test_autocast_changes_nothing():
    leaves = random_head(60, 61, 17)
    target_N, grad_N = random_target(60, 61), torch.randn(60)

    def op(h, w, b):
        return token_logps(h, w, target_N, linear_bias=b)

    expected = gradients(op, leaves, grad_N)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        actual = gradients(op, leaves, grad_N)
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("dynamic", [False, True])
def test_torch_compile_sees_one_call_and_no_tiles(dynamic):
    def loss(h: Tensor, w: Tensor, target_N: Tensor) -> Tensor:
        return (2 * token_logps(h * 1.5, w, target_N, logit_softcap=20.0)).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    for N in (60, 84):
        input, weight, _ = random_head(N, 61, 17)
        target_N = random_target(N, 61)
        expected = gradients(loss, (input, weight), torch.ones(()), target_N)
        actual = gradients(compiled, (input, weight), torch.ones(()), target_N)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_a_compiled_graph_serves_every_number_of_tokens():
    def loss(h: Tensor, w: Tensor, target_N: Tensor) -> Tensor:
        of_both = (h, w, target_N, 2 * h.detach(), w)
        kl_N = token_logps_and_kl(*of_both).kl
        return (token_logps(h, w, target_N) + kl_N + tdpo1_token_values(*of_both)).sum()

    graphs = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(loss, backend=graphs, fullgraph=True)
    # with a ninth graph torch.compile gives up
    for N in range(20, 21 if INTERPRETED else 30):
        input, weight, _ = random_head(N, 61, 17)
        target_N = random_target(N, 61)
        if N == 20:
            # refuses a forward that makes a constant of the number
            torch._dynamo.mark_dynamic(input, 0)
            torch._dynamo.mark_dynamic(target_N, 0)
        expected = gradients(loss, (input, weight), torch.ones(()), target_N)
        actual = gradients(compiled, (input, weight), torch.ones(()), target_N)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)
    assert graphs.frame_count == 1


@pytest.mark.parametrize("dynamic", [False, True])
def test_another_workspace_after_compilation_is_that_of_the_calls_that_follow(dynamic):
    def loss(h: Tensor, w: Tensor, target_N: Tensor) -> Tensor:
        return token_logps(h, w, target_N).sum()

    compiled = torch.compile(loss, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    input, weight, _ = random_head(60, 61, 17)
    target_N = random_target(60, 61)
    # what is kept of a call fits in the first one alone
    for mib in (1024.0, 0.001, 1024.0):
        with workspace(mib):
            expected = gradients(loss, (input, weight), torch.ones(()), target_N)
            actual = gradients(compiled, (input, weight), torch.ones(()), target_N)
        torch.testing.assert_close(actual, expected, rtol=0, atol=0)


def test_another_workspace_between_forward_and_backward_is_that_of_the_next_call():
    input, weight, _ = random_head(60, 61, 17)
    target_N = random_target(60, 61)
    _, expected = gradients(token_logps, (input, weight), torch.ones(60), target_N)
    logps_N = token_logps(input, weight, target_N)
    with workspace(0.001):
        actual = torch.autograd.grad(logps_N, (input, weight), torch.ones(60))
    torch.testing.assert_close(actual, expected, rtol=0, atol=0)


@pytest.mark.parametrize("op", ["token_logps", "token_logps_kl"])
def test_the_registered_ops_keep_the_dispatchers_rules(op):
    policy = list(random_head(60, 61, 17))
    # without a bias
    reference = [x.detach() for x in random_head(60, 61, 9)[:2]] if op == "token_logps_kl" else []
    arguments = (policy, reference, random_target(60, 61))
    options = {
        "sweep": op,
        "direction": "reference_policy",
        "scale": 0.7,
        "softcap": 20.0,
        "ignore_index": -100,
        "needs_grad": [True] * 3,
        "workspace": 2**20,
    }
    torch.library.opcheck(torch.ops.fastpref.head_v7.default, arguments, options)


def test_arguments_that_do_not_fit_are_named():
    input, weight, bias = random_head(6, 61, 17)
    target_N = random_target(6, 61)
    for call, message in [
        (lambda: token_logps(input[0], weight, target_N), r"input must be \(N, D\), got \(17,\)"),
        (lambda: token_logps(input, weight[:, :16], target_N), r"linear_weight must be \(V, D\)"),
        (lambda: token_logps(input, weight[:0], target_N), r"linear_weight must be .* V >= 1"),
        (lambda: token_logps(input.double(), weight, target_N), "input must be one of bfloat16"),
        (lambda: token_logps(input, weight.to("meta"), target_N), "linear_weight must be on cpu"),
        (lambda: token_logps(input, weight, target_N[:5]), r"target must be \(6,\), got \(5,\)"),
        (lambda: token_logps(input, weight, target_N.float()), "target must be one of int64"),
        (lambda: token_logps(input, weight, target_N + 61), r"target must be in \[0, 61\), got"),
        (lambda: token_logps(input, weight, target_N - 99), r"target must be in \[0, 61\), got"),
        (
            lambda: token_logps(input, weight, target_N, linear_bias=bias[:60]),
            r"linear_bias must be \(61,\), got \(60,\)",
        ),
        (lambda: token_logps(input, weight, target_N, logit_scale=0.0), "logit_scale must be > 0"),
        (
            lambda: token_logps(input, weight, target_N, logit_softcap=-30.0),
            "logit_softcap must be None or > 0",
        ),
        (
            lambda: token_logps(input, weight, target_N, logit_scale=torch.tensor(2.0)),
            "logit_scale must be a number, got a tensor",
        ),
        (lambda: token_logps([[1.0]], weight, target_N), "input must be a tensor, got list"),
        (lambda: token_logps(input, None, target_N), "linear_weight must be a tensor, got None"),
        (lambda: token_logps(input, weight, [1] * 6), "target must be a tensor, got list"),
        (
            lambda: torch.func.jvp(
                lambda h: token_logps(h, weight, target_N), (input,), (torch.ones_like(input),)
            ),
            "input has a forward-mode gradient",
        ),
        *(
            (
                lambda transform=transform: transform(lambda h: token_logps(h, weight, target_N)),
                "fastpref_kernels.token_logps must be called outside of torch.func's transforms",
            )
            for transform in (
                lambda function: torch.func.grad(lambda h: function(h).sum())(input),
                lambda function: torch.func.vmap(function)(input[None].detach()),
            )
        ),
        (lambda: set_workspace_mib(0), "workspace_mib must be > 0 and finite, got 0"),
        (lambda: set_workspace_mib(float("nan")), "workspace_mib must be > 0"),
        (lambda: set_workspace_mib("a"), "workspace_mib must be > 0 and finite, got 'a'"),
        (lambda: set_workspace_mib(None), "workspace_mib must be > 0 and finite, got None"),
        (lambda: set_workspace_mib(torch.tensor([1, 2])), r"workspace_mib must be .* got tensor\("),
        (lambda: set_workspace_mib(2**43), r"workspace_mib must be <= 2\^42, got 8796093022208"),
        *(
            (
                lambda name=name, value=value: token_logps(
                    input, weight, target_N, **{name: value}
                ),
                f"{name} must be .*, got {re.escape(repr(value))}",
            )
            for name, values in {
                "logit_scale": (None, "2", [1.0], np.ones(1), 10**400, 1e300, 1e-50),
                "logit_softcap": ("2", np.ones(2), 10**400, 1e300, 1e-50),
                "ignore_index": (None, 1.5, 2**63, torch.tensor(1.5), torch.tensor([1, 2])),
            }.items()
            for value in values
        ),
        (
            lambda: token_logps(input.detach().to_sparse(), weight, target_N),
            "input must be a dense tensor, got a sparse_coo one",
        ),
        (
            lambda: token_logps(torch.nested.nested_tensor([input, input]), weight, target_N),
            "input must be a dense tensor, got a nested one",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            call()


def test_a_sharded_weight_is_refused_with_advice():
    from torch import distributed as dist
    from torch.distributed.tensor import distribute_tensor

    input, weight, _ = random_head(6, 61, 17)
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    try:
        mesh = dist.device_mesh.init_device_mesh("cpu", (1,))
        sharded = distribute_tensor(weight.detach(), mesh)
        with pytest.raises(ValueError, match="linear_weight is a DTensor"):
            token_logps(input, sharded, random_target(6, 61))
    finally:
        dist.destroy_process_group()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize(("N", "V", "D"), SHAPES)
def test_token_logps_on_a_gpu_match_float64(N, V, D, dtype):
    leaves = tuple(t.detach().cuda().requires_grad_() for t in random_head(N, V, D, dtype))
    with workspace(0.25):
        assert_matches_float64(leaves, random_target(N, V).cuda(), scale=0.7, softcap=20.0)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
@pytest.mark.parametrize("frozen", [False, True])
def test_the_workspace_bounds_what_a_gpu_allocates(frozen):
    N, V, D, mib = 8192, 50_000, 1024, 256
    options = {"device": "cuda", "dtype": torch.bfloat16}
    input = torch.randn(N, D, requires_grad=True, **options)
    weight = torch.randn(V, D, **options).mul_(3 / D**0.5).requires_grad_(not frozen)
    target_N = torch.randint(V, (N,), device="cuda")
    with workspace(mib):
        token_logps(input[:256], weight, target_N[:256]).sum().backward()
        input.grad = weight.grad = None
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        token_logps(input, weight, target_N).sum().backward()
    extra_mib = (torch.cuda.max_memory_allocated() - before) / 2**20
    results_mib = (input.nbytes + (0 if frozen else weight.nbytes)) / 2**20
    # hidden states: the float32 sum of their gradient, and a copy of them without ignored rows
    assert extra_mib <= mib + results_mib + N * D * 6 / 2**20
    assert weight.grad is None or not frozen
