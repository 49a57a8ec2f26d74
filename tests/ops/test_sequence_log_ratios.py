import pytest
import torch
from fastpref_kernels import naive, sequence_log_ratios
from fastpref_kernels.sequence_log_ratios_torch import (
    sequence_log_ratios_bwd,
    sequence_log_ratios_fwd,
)
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

FLOATS = [torch.float32, torch.bfloat16, torch.float16]


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


@st.composite
def tokens(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor, int, Tensor | None]:
    """Log-probabilities of two models, sequence ids in any order, S >= 1, weights or None."""
    num_sequences = draw(st.integers(1, 9))
    N = draw(st.integers(0, 200))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**31)))
    logps_N, reference_logps_N = -torch.rand(2, N, generator=generator) * 20
    ids_N = torch.randint(num_sequences, (N,), generator=generator)
    weights_N = torch.randn(N, generator=generator) if draw(st.booleans()) else None
    return logps_N, reference_logps_N, ids_N, num_sequences, weights_N


@settings(max_examples=60, deadline=None)
@given(tokens())
def test_sums_and_gradient_match_float64_for_any_order_and_empty_sequences(case):
    logps_N, reference_logps_N, ids_N, S, weights_N = case
    leaf_N, true_leaf_N = logps_N.requires_grad_(), logps_N.detach().double().requires_grad_()
    ours_S = sequence_log_ratios(leaf_N, reference_logps_N, ids_N, S, token_weights=weights_N)
    truth_S = naive.sequence_log_ratios(
        true_leaf_N,
        reference_logps_N.double(),
        ids_N,
        S,
        token_weights=None if weights_N is None else weights_N.double(),
    )
    assert ours_S.dtype == torch.float32 and ours_S.shape == (S,)
    torch.testing.assert_close(ours_S, truth_S.float(), rtol=1e-6, atol=1e-6)
    grad_S = torch.arange(1.0, S + 1)
    (ours_N,) = torch.autograd.grad(ours_S, leaf_N, grad_S)
    (truth_N,) = torch.autograd.grad(truth_S, true_leaf_N, grad_S.double())
    torch.testing.assert_close(ours_N, truth_N.float())


def test_without_triton_a_gpu_skips_tokens_of_no_sequence_as_its_kernels_do():
    # ids are checked on a CPU alone: on a GPU the check would wait for it
    ids_N, weights_N = torch.tensor([0, -1, 1, 2]), torch.tensor([1.0, 2.0, 3.0, 4.0])
    sums_S = sequence_log_ratios_fwd(torch.ones(4), torch.zeros(4), weights_N, ids_N, 2)
    grad_N = sequence_log_ratios_bwd(torch.tensor([5.0, 7.0]), weights_N, ids_N, torch.float32)
    assert (sums_S.tolist(), grad_N.tolist()) == ([1, 3], [5, 0, 21, 0])


@settings(max_examples=30, deadline=None)
@given(tokens(), st.randoms(use_true_random=False))
def test_the_order_of_the_tokens_does_not_show(case, random):
    logps_N, reference_logps_N, ids_N, S, weights_N = case
    order = list(range(len(ids_N)))
    random.shuffle(order)
    shuffled = [t if t is None else t[order] for t in (logps_N, reference_logps_N, weights_N)]
    straight_S = sequence_log_ratios(logps_N, reference_logps_N, ids_N, S, token_weights=weights_N)
    shuffled_S = sequence_log_ratios(*shuffled[:2], ids_N[order], S, token_weights=shuffled[2])
    torch.testing.assert_close(straight_S, shuffled_S, rtol=1.3e-7, atol=1e-9)


def test_equal_models_have_log_ratios_of_exactly_zero():
    logps_N = -torch.rand(500) * 20
    ids_N = torch.randint(7, (500,))
    assert not sequence_log_ratios(
        logps_N, logps_N.clone(), ids_N, 7, token_weights=torch.randn(500)
    ).any()


def test_two_close_models_do_not_round_apart_over_a_long_sequence():
    """A float32 sum of 4096 log-probabilities near -10 is off by more than this log-ratio."""
    logps_N = -torch.rand(4096) * 20
    reference_logps_N = torch.nextafter(logps_N, torch.tensor(0.0))
    (log_ratio,) = sequence_log_ratios(
        logps_N, reference_logps_N, torch.zeros(4096, dtype=torch.int64), 1
    )
    truth = (logps_N.double() - reference_logps_N.double()).sum()
    assert truth != 0
    torch.testing.assert_close(log_ratio.double(), truth, rtol=1e-6, atol=0)


def test_only_the_policys_log_probabilities_receive_a_gradient():
    logps_N, reference_logps_N, weights_N = (torch.randn(9, requires_grad=True) for _ in range(3))
    sequence_log_ratios(
        logps_N, reference_logps_N, torch.arange(9) // 3, 3, token_weights=weights_N
    ).sum().backward()
    assert torch.equal(logps_N.grad, weights_N.detach())
    assert reference_logps_N.grad is None and weights_N.grad is None


def test_log_probabilities_may_be_changed_in_place_afterwards():
    leaf_N = torch.randn(9, requires_grad=True)
    logps_N = leaf_N * 1
    ratios_S = sequence_log_ratios(logps_N, torch.zeros(9), torch.arange(9) // 3, 3)
    logps_N.zero_()
    ratios_S.mul_(2).sum().backward()
    assert torch.equal(leaf_N.grad, torch.full((9,), 2.0))


@pytest.mark.parametrize("dtype", FLOATS)
def test_gradients_come_in_the_dtype_of_the_log_probabilities(dtype):
    logps_N = torch.randn(9).to(dtype).requires_grad_()
    ratios_S = sequence_log_ratios(logps_N, torch.zeros(9), torch.arange(9).int() // 3, 3)
    ratios_S.sum().backward()
    assert ratios_S.dtype == torch.float32 and logps_N.grad.dtype == dtype


def test_gradients_of_gradients_are_refused():
    logps_N = torch.randn(9, requires_grad=True)
    loss = sequence_log_ratios(logps_N, torch.zeros(9), torch.arange(9) % 3, 3).square().sum()
    (grad_N,) = torch.autograd.grad(loss, logps_N, create_graph=True)
    with pytest.raises(RuntimeError, match=r"sequence_log_ratios is differentiable once"):
        grad_N.sum().backward()


def test_a_gradient_of_torch_func_is_refused():
    def total(logps_N):
        return sequence_log_ratios(logps_N, torch.zeros(9), torch.arange(9) % 3, 3).sum()

    with pytest.raises(ValueError, match=r"sequence_log_ratios must be called outside of torch.fu"):
        torch.func.grad(total)(torch.randn(9))


def test_an_upstream_gradient_may_be_expanded():
    logps_N = torch.randn(9, requires_grad=True)
    sequence_log_ratios(logps_N, torch.zeros(9), torch.arange(9) % 3, 3).backward(
        torch.tensor(2.0).expand(3)
    )
    assert torch.equal(logps_N.grad, torch.full((9,), 2.0))


def test_no_sequences_and_no_tokens_keep_the_graph_connected():
    logps_N = torch.empty(0, requires_grad=True)
    ids_N = torch.empty(0, dtype=torch.int64)
    for S in (0, 3):
        ratios_S = sequence_log_ratios(logps_N, torch.empty(0), ids_N, S)
        assert ratios_S.tolist() == [0.0] * S
        (grad_N,) = torch.autograd.grad(ratios_S.sum(), logps_N)
        assert grad_N.shape == (0,)


@pytest.mark.parametrize("strict", [False, True])
def test_an_exported_graph_serves_any_number_of_sequences(strict):
    class Sums(torch.nn.Module):
        def forward(self, logps_N, ids_N, lengths_S):
            reference_N, S = torch.zeros_like(logps_N), lengths_S.shape[0]
            return sequence_log_ratios(logps_N, reference_N, ids_N, S)

    any_N, any_S = torch.export.Dim.DYNAMIC, torch.export.Dim("S")
    exported = torch.export.export(
        Sums(),
        (torch.ones(9), torch.arange(9) // 3, torch.ones(3)),
        dynamic_shapes=({0: any_N}, {0: any_N}, {0: any_S}),
        strict=strict,
    )
    sums_S = exported.module()(torch.ones(4), torch.tensor([0, 4, 4, 4]), torch.ones(5))
    assert sums_S.tolist() == [1.0, 0.0, 0.0, 0.0, 3.0]


def test_arguments_that_do_not_fit_are_named():
    logps_N, ids_N = torch.zeros(4), torch.tensor([0, 0, 1, 1])
    for arguments, options, message in [
        ((logps_N, logps_N[:3], ids_N, 2), {}, r"reference_logps must be \(N,\) like logps, got"),
        ((logps_N, logps_N, ids_N[:3], 2), {}, r"sequence_ids must be \(N,\) like logps"),
        ((logps_N[None], logps_N, ids_N, 2), {}, r"logps must be \(N,\)"),
        ((logps_N, logps_N, ids_N.float(), 2), {}, "sequence_ids must be one of int64, int32"),
        ((logps_N, logps_N, ids_N, 1), {}, r"sequence_ids must be in \[0, 1\), got 1"),
        ((logps_N, logps_N, ids_N - 1, 2), {}, r"sequence_ids must be in \[0, 2\), got -1"),
        ((logps_N, logps_N, ids_N, -1), {}, "num_sequences must be a whole number >= 0, got -1"),
        ((logps_N, logps_N, ids_N, 3.0), {}, "num_sequences must be a whole number >= 0, got 3.0"),
        ((logps_N, logps_N, ids_N, "3"), {}, "num_sequences must be a whole number >= 0, got '3'"),
        ((logps_N, logps_N, ids_N, None), {}, "num_sequences must be a whole number .* got None"),
        ((logps_N, logps_N, ids_N, torch.tensor(2.5)), {}, r"num_sequences .* got tensor\(2.5"),
        ((logps_N, logps_N, ids_N, torch.tensor(-1)), {}, r"num_sequences .* >= 0, got tensor\(-1"),
        (
            (logps_N.to_sparse(), logps_N, ids_N, 2),
            {},
            "logps must be a dense tensor, got a sparse",
        ),
        ((logps_N.double(), logps_N, ids_N, 2), {}, "logps must be one of bfloat16"),
        (
            (logps_N, logps_N, ids_N, 2),
            {"token_weights": logps_N[:2]},
            r"token_weights must be \(N,\) like logps, got \(2,\)",
        ),
    ]:
        with pytest.raises(ValueError, match=message):
            sequence_log_ratios(*arguments, **options)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_sums_on_a_gpu_repeat_their_bits_and_match_float64():
    logps_N, reference_logps_N, weights_N = torch.randn(3, 10_000, device="cuda")
    ids_N = torch.randint(97, (10_000,), device="cuda")
    sums = [
        sequence_log_ratios(logps_N, reference_logps_N, ids_N, 99, token_weights=weights_N)
        for _ in range(2)
    ]
    truth_S = naive.sequence_log_ratios(
        *(t.double() for t in (logps_N, reference_logps_N)),
        ids_N,
        99,
        token_weights=weights_N.double(),
    )
    assert torch.equal(*sums)
    torch.testing.assert_close(sums[0].double(), truth_S, rtol=1e-6, atol=1e-6)
