"""Models of identical blocks: memory of a deep model, extrapolated from two shallow ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from fastpref.model.positions import config_value

SHALLOW = (2, 4)
"""Numbers of blocks of the two shallow models; at least two, so that first and last differ."""


class Stack(NamedTuple):
    """A model's list of identical blocks."""

    holder: nn.Module
    """Module that owns the list."""
    name: str
    """Attribute of `holder` that is the list."""
    blocks: nn.ModuleList

    @contextmanager
    def cut_to(self, num_blocks: int) -> Iterator[None]:
        """Within the context, the model has only its first `num_blocks` blocks."""
        setattr(self.holder, self.name, self.blocks[:num_blocks])
        try:
            yield
        finally:
            setattr(self.holder, self.name, self.blocks)

    @property
    def steps_beyond(self) -> float:
        """Factor of linear extrapolation: missing blocks per step between the shallow models."""
        few, more = SHALLOW
        return (len(self.blocks) - more) / (more - few)


def find_stack(model: Any, blocks: Sequence[nn.Module]) -> Stack | None:
    """The list of a model's blocks, if they are identical and more than `SHALLOW[1]`; else None."""
    types = config_value(model.config.get_text_config(), "layer_types") or ()
    if len(blocks) <= SHALLOW[1] or len(set(types)) > 1 or len(set(map(_kind, blocks))) > 1:
        return None
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and list(child) == list(blocks):
                return Stack(module, name, child)
    return None


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """Key that is equal for blocks which differ at most in the values of their weights."""
    parameters = block.named_parameters()
    return str(block), *((name, p.shape, p.dtype, p.requires_grad) for name, p in parameters)
