"""Blocks that are all alike: what a deep model takes follows from two shallow ones."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from fastpref.model.positions import config_value

SHALLOW = (2, 4)
"""Blocks that are counted in place of all: enough that first and last ones are not the same."""


class Stack(NamedTuple):
    """A list of a model's modules that are alike."""

    holder: nn.Module
    """The module that has it."""
    name: str
    """Under which name."""
    blocks: nn.ModuleList

    @contextmanager
    def cut_to(self, num_blocks: int) -> Iterator[None]:
        """While entered, the model has its first blocks alone."""
        setattr(self.holder, self.name, self.blocks[:num_blocks])
        try:
            yield
        finally:
            setattr(self.holder, self.name, self.blocks)

    @property
    def steps_beyond(self) -> float:
        """How often the difference of the two shallow models comes on top of the deeper one."""
        few, more = SHALLOW
        return (len(self.blocks) - more) / (more - few)


def find_stack(model: Any, blocks: Sequence[nn.Module]) -> Stack | None:
    """The list that a model's blocks are, if there are many and each takes what the others do."""
    types = config_value(model.config.get_text_config(), "layer_types") or ()
    if len(blocks) <= SHALLOW[1] or len(set(types)) > 1 or len(set(map(_kind, blocks))) > 1:
        return None
    for module in model.modules():
        for name, child in module.named_children():
            if isinstance(child, nn.ModuleList) and list(child) == list(blocks):
                return Stack(module, name, child)
    return None


def _kind(block: nn.Module) -> tuple[Any, ...]:
    """What a block computes and keeps, but for the values of its weights."""
    parameters = block.named_parameters()
    return str(block), *((name, p.shape, p.dtype, p.requires_grad) for name, p in parameters)
