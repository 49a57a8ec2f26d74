"""What the registered ops share. A registered op takes flat arguments and returns tensors.

Registered, so that torch.compile sees one call and never the tiles behind it. The version in an
op's name is raised with its meaning: compiled code is cached under it.
"""

from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager

import torch
from torch import Tensor


@contextmanager
def inside_op(device: torch.device) -> Iterator[None]:
    """Where an op's tensors are: kernels launch there, and autocast keeps out of its products."""
    with ExitStack() as stack:
        stack.enter_context(torch.autocast(device.type, enabled=False))
        if device.type == "cuda":
            stack.enter_context(torch.cuda.device(device))
        yield


def needed_like(leaves: Sequence[Tensor | None], needs_grad: Sequence[bool]) -> list[Tensor]:
    """Uninitialised gradients of those leaves that want one."""
    pairs = zip(leaves, needs_grad, strict=True)
    return [leaf.new_empty(leaf.shape) for leaf, needed in pairs if needed and leaf is not None]


def present(gradients: Sequence[Tensor | None]) -> list[Tensor]:
    """The gradients that exist."""
    return [gradient for gradient in gradients if gradient is not None]


def spread(gradients: list[Tensor], needs_grad: Sequence[bool]) -> list[Tensor | None]:
    """One entry a leaf: the gradients of those that want one, None for the others."""
    remaining = iter(gradients)
    return [next(remaining) if needed else None for needed in needs_grad]
