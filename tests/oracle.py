"""What the tests of the ops share: cases, torch's own composite, and the yardstick."""

import itertools
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import pytest
import torch
from fastpref_kernels import get_workspace_mib, set_workspace_mib
from torch import Tensor
from torch.nn import functional as F
from torch.utils.flop_counter import FlopCounterMode

# N, V, D: aligned, ragged, one token
SHAPES = [(256, 512, 128), (252, 507, 123), (1, 32000, 64)]
# several tiles of rows and of columns at every shape above, and the default
WORKSPACES_MIB = [0.25, 1024]
ROUNDED_TWICE = 2.0**-8
"""Relative error of a gradient in bfloat16: that of stored exponentials and that of the gradient
itself, each rounded to 8 bits, by 2^-9 at most."""
TIMES_TORCH = 2.0
"""What a float32 result may be off by, in errors of torch's own: column blocks are as many
roundings in another order, and no two orders have the same error."""


def cases(*, together: int = 2, **axes: Sequence[Any]) -> pytest.MarkDecorator:
    """Every combination of the axes' values; in Triton's interpreter, where one takes seconds, as
    many as it takes for any values of `together` axes to come together."""
    grid = list(itertools.product(*(enumerate(values) for values in axes.values())))
    if os.environ.get("TRITON_INTERPRET"):
        grid = _covering(grid, together)
    values = [[value for _, value in case] for case in grid]
    indirect = [name for name in axes if name == "route"]
    return pytest.mark.parametrize(tuple(axes), values, indirect=indirect)


def _covering(grid: list[tuple[Any, ...]], together: int) -> list[tuple[Any, ...]]:
    """Of cases of numbered values the one with most that is new, until nothing is."""
    combinations = [
        set(itertools.combinations(enumerate(i for i, _ in case), together)) for case in grid
    ]
    missing, chosen = set[Any]().union(*combinations), []
    while missing:
        best = max(range(len(grid)), key=lambda i: len(combinations[i] & missing))
        missing -= combinations[best]
        chosen.append(grid[best])
    return chosen


def assert_no_worse_than_torch(
    ours: Tensor, same_dtype: Tensor, float64: Tensor, *, factor: float = 2.0, floor: float = 1e-5
) -> None:
    """Largest errors: torch's own times a factor, and the rounding of the result, which both have
    and which can be next to nothing in torch's where there are few numbers."""
    ours_error = (ours.double() - float64).abs().max().item()
    torch_error = (same_dtype.double() - float64).abs().max().item()
    rounding = torch.finfo(ours.dtype).eps / 2 * float64.abs().max().item()
    bound = factor * torch_error + floor + rounding
    shown = f"{factor} x torch + {floor:.0e} + {rounding:.0e}"
    assert ours_error <= bound, f"{ours_error:.2e} > {bound:.2e} = {shown}"


def random_head(
    N: int, V: int, D: int, dtype: torch.dtype = torch.float32, *, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor]:
    """Hidden states, weight and bias whose logits have a standard deviation of three nats."""
    generator = torch.Generator().manual_seed(seed)
    tensors = (
        torch.randn(N, D, generator=generator),
        torch.randn(V, D, generator=generator) * 3 / D**0.5,
        torch.randn(V, generator=generator),
    )
    return tuple(tensor.to(dtype).requires_grad_() for tensor in tensors)


def random_target(N: int, V: int, *, ignore: int | None = -100) -> Tensor:
    """Targets, every fifth of them ignored."""
    target_N = torch.randint(V, (N,), generator=torch.Generator().manual_seed(7))
    if ignore is not None and N > 1:
        target_N[::5] = ignore
    return target_N


def torch_logits(
    input: Tensor, weight: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Full logits the usual way: in the inputs' dtype, then float32."""
    dtype = torch.promote_types(input.dtype, weight.dtype)
    bias = None if bias is None else bias.to(dtype)
    logits_NV = scale * F.linear(input.to(dtype), weight.to(dtype), bias)
    if softcap is not None:
        logits_NV = softcap * torch.tanh(logits_NV / softcap)
    return logits_NV.float()


def double(tensors: tuple[Tensor | None, ...]) -> tuple[Any, ...]:
    """Float64 copies that are leaves of their own."""
    return tuple(
        None if t is None else t.detach().double().requires_grad_(t.requires_grad) for t in tensors
    )


def gradients(
    op: Callable[..., Tensor], leaves: tuple[Tensor, ...], grad: Tensor, *constants: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Value of `op(*leaves, *constants)` and the leaves' gradients under an upstream gradient."""
    value = op(*leaves, *constants)
    return value.detach(), torch.autograd.grad(value, leaves, grad.to(value))


def values_and_gradients(
    op: Callable[..., Tensor], policy: Any, reference: Any, target: Tensor, **options: Any
) -> list[Tensor]:
    """TDPO1's values, and gradients of the leaves that want one; upstream's differ per token."""
    input, weight, bias = policy
    values_N = op(
        input,
        weight,
        target,
        reference[0],
        reference[1],
        linear_bias=bias,
        reference_linear_bias=reference[2],
        **options,
    )
    grad_N = torch.randn(len(target), generator=torch.Generator().manual_seed(1))
    leaves = [leaf for leaf in policy if leaf is not None and leaf.requires_grad]
    grads = torch.autograd.grad(values_N, leaves, grad_N.to(values_N))
    return [values_N.detach(), *grads]


def half_kept(num_rows, row_bytes):
    """Of a call in the partial mode: about half of its rows, in whole blocks of 128 as on a GPU,
    without which NumPy's product of a row has other last bits; of fewer rows in blocks of 32."""
    multiple = 128 if num_rows > 128 else 32
    return min(num_rows, -(-num_rows // (2 * multiple)) * multiple)


@contextmanager
def workspace(mib: float) -> Iterator[None]:
    before = get_workspace_mib()
    set_workspace_mib(mib)
    try:
        yield
    finally:
        set_workspace_mib(before)


def peak_bytes(run: Callable[[], Any]) -> int:
    """Peak of what `run` allocates on the CPU beyond what was there before.

    From the allocator's own record: a registered op hides its tensors from dispatch modes.
    """
    with torch.profiler.profile(profile_memory=True) as profiler:
        run()
    events = profiler.profiler.kineto_results.events()
    held = peak = 0
    for event in sorted(events, key=lambda event: event.start_ns()):
        if event.name() == "[memory]":
            held += event.nbytes()
            peak = max(peak, held)
    return peak


def count_gemms() -> FlopCounterMode:
    """Counts the floating-point operations of torch's GEMMs, the accumulating ones too."""

    def flops(total: Any, a: torch.Size, b: torch.Size, **_: Any) -> int:
        return 2 * a[0] * a[1] * b[1]

    return FlopCounterMode(display=False, custom_mapping={torch.ops.aten.addmm_: flops})


def nearby(head, *, by: float = 0.1) -> tuple[Tensor, ...]:
    """A reference that has drifted from `head`."""
    generator = torch.Generator().manual_seed(3)
    return tuple(
        (leaf.detach().float() + by * torch.randn(leaf.shape, generator=generator)).to(leaf.dtype)
        for leaf in head
    )
