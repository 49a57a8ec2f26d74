"""The transformer blocks of a model: the unit of sharding, compilation, recomputation and casts."""

from collections import defaultdict
from typing import Any

from torch import nn

from fastpref.errors import ConfigError


def find_blocks(model: Any, block_name: str | None) -> list[nn.Module]:
    """The transformer blocks: by class name, or else by the model's `_no_split_modules`, or else
    the elements of its ModuleLists.

    A block inside another one is left out, and so is one that shares a parameter with a module
    outside of it (Zamba reuses one attention layer in several places): a parameter has one owner.

    Args:
        model: A causal LM of transformers.
        block_name: Class of the blocks; None: found from the model.

    Raises:
        ConfigError: no module of the model is of that class.
    """
    layers = {
        layer
        for module in model.modules()
        if isinstance(module, nn.ModuleList)
        for layer in module
        if any(True for _ in layer.parameters())
    }
    names = {block_name} if block_name else set(model._no_split_modules or ())
    modules = dict(model.named_modules())
    named = {name: module for name, module in modules.items() if type(module).__name__ in names}
    if block_name and not named:
        repeated = sorted({type(layer).__name__ for layer in layers})
        raise ConfigError(
            f"model.block_name: {type(model).__name__} has no module of class {block_name}; its "
            f"repeated blocks are {', '.join(repeated) or 'unknown'}"
        )
    candidates = named or {name: module for name, module in modules.items() if module in layers}
    places = _places(model)
    return _outermost(
        [block for name, block in candidates.items() if _is_alone(block, f"{name}.", places)]
    )


def _places(model: nn.Module) -> dict[nn.Parameter, list[str]]:
    """All names under which a model has each parameter."""
    places = defaultdict(list)
    for name, parameter in model.named_parameters(remove_duplicate=False):
        places[parameter].append(name)
    return places


def _is_alone(block: nn.Module, prefix: str, places: dict[nn.Parameter, list[str]]) -> bool:
    return all(
        name.startswith(prefix) for parameter in block.parameters() for name in places[parameter]
    )


def _outermost(modules: list[nn.Module]) -> list[nn.Module]:
    within = {inner for module in modules for inner in module.modules() if inner is not module}
    return [module for module in modules if module not in within]
