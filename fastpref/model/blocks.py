"""The transformer blocks of a model: what is sharded, compiled, recomputed and widened at once."""

from collections import defaultdict
from typing import Any

from torch import nn

from fastpref.errors import ConfigError


def find_blocks(model: Any, block_name: str | None) -> list[nn.Module]:
    """The transformer blocks: by class name, or else what the model itself names, or else the
    elements of its lists of layers.

    A block within a block is left out, and so is one that shares a parameter with what lies outside
    of it (Zamba's attention layers are one layer in several places): a parameter has one owner.

    Args:
        model: A causal LM of transformers.
        block_name: Class of the blocks; None: found from the model.

    Raises:
        ConfigError: no module of the model is of that class.
    """
    layers = [
        layer
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        for layer in module
        if any(True for _ in layer.parameters())
    ]
    names = {block_name} if block_name else set(model._no_split_modules or ())
    named = [module for module in model.modules() if type(module).__name__ in names]
    if block_name and not named:
        repeated = sorted({type(layer).__name__ for layer in layers})
        raise ConfigError(
            f"model.block_name: {type(model).__name__} has no module of class {block_name}; its "
            f"repeated blocks are {', '.join(repeated) or 'unknown'}"
        )
    owners = _owners(model)
    return _outermost([m for m in named or layers if _owns_its_parameters(m, owners)])


def _owners(model: nn.Module) -> dict[nn.Parameter, set[nn.Module]]:
    owners = defaultdict(set)
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            owners[parameter].add(module)
    return owners


def _owns_its_parameters(block: nn.Module, owners: dict[nn.Parameter, set[nn.Module]]) -> bool:
    inside = set(block.modules())
    return all(owners[parameter] <= inside for parameter in block.parameters())


def _outermost(modules: list[nn.Module]) -> list[nn.Module]:
    within = {inner for module in modules for inner in module.modules() if inner is not module}
    return [module for module in dict.fromkeys(modules) if module not in within]
