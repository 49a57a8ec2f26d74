"""What the registered ops share. A registered op takes flat arguments and returns tensors.

Registered, so that torch.compile sees one call and never the tiles behind it. The version in an
op's name is raised with its meaning: compiled code is cached under it.
"""

from collections.abc import Sequence

from torch import Tensor


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
