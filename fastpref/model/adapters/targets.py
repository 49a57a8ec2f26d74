"""Chooses which matrices of a model get adapters."""

from collections.abc import Iterable, Sequence
from typing import Any

from torch import nn
from transformers.pytorch_utils import Conv1D

from fastpref.checks import hint
from fastpref.config import AdapterConfig
from fastpref.errors import ConfigError
from fastpref.model.adapters.tied_head import ends_so
from fastpref.model.blocks import find_blocks
from fastpref.model.files.families import other_parts

LINEAR = (nn.Linear, Conv1D)
LIKE_LINEAR = ("FalconLinear", "Linear4bit")
"""Classes of transformers and bitsandbytes that compute the same as torch's."""
STATE_SPACE = ("mamba", "mamba2", "falcon_mamba", "falcon_h1", "nemotron_h")


def choose_targets(
    model: Any, options: AdapterConfig, block_name: str | None
) -> tuple[list[str], list[str]]:
    """Name suffixes of layers, and of single parameters such as stacked experts, to adapt.

    For the layers of a multimodal wrapper, full names: where the adapter is used, the wrapper's
    other parts are present too and may have layers with the same suffix.

    Args:
        model: A causal LM of transformers.
        options: Requested options.
        block_name: Class of the transformer blocks, None: found from the model.

    Raises:
        ConfigError: nothing in the model has a requested suffix.
    """
    if options.target_modules is None and options.target_parameters is None:
        return linear_ends(model, block_name), expert_ends(model, block_name)
    modules = list(options.target_modules or ())
    parameters = list(options.target_parameters or ())
    _check_ends("target_modules", modules, [name for name, _ in model.named_modules()])
    modules = whole_names(model, modules)
    _check_ends("target_parameters", parameters, [name for name, _ in model.named_parameters()])
    return modules, parameters


def whole_names(model: Any, ends: Iterable[str]) -> list[str]:
    """Full names of a wrapper's layers with these suffixes; for other models, the suffixes."""
    if not other_parts(model):
        return list(ends)
    names = [name for name, _ in model.named_modules()]
    return [name for name in names if any(ends_so(name, end) for end in ends)]


def linear_ends(model: Any, block_name: str | None) -> list[str]:
    """Name suffixes that match the linear layers of the transformer blocks, and nothing else."""
    inside = {module for block in find_blocks(model, block_name) for module in block.modules()}
    names = {
        name
        for name, module in model.named_modules()
        if module in inside and is_linear(module) and not _is_read_past(model, name)
    }
    if not names:
        raise ConfigError(
            f"adapter=lora: {type(model).__name__} has no linear layers in its blocks; "
            "adapter.target_modules names others"
        )
    ends = {name.rpartition(".")[2] for name in names}
    meant = {name for name, _ in model.named_modules() if name.rpartition(".")[2] in ends}
    # full names if a layer outside of the blocks, or another kind of module, has such a suffix
    return sorted(ends if meant == names and not other_parts(model) else names)


def expert_ends(model: Any, block_name: str | None) -> list[str]:
    """Name suffixes of a mixture's stacked expert weights, which hold one matrix per expert."""
    ends = set()
    for block in find_blocks(model, block_name):
        for name, parameter in block.named_parameters():
            owner = type(block.get_submodule(name.rpartition(".")[0])).__name__
            if parameter.ndim == 3 and "expert" in f"{name} {owner}".lower():
                ends.add(".".join(name.split(".")[-2:]))
    return sorted(ends)


def is_linear(module: nn.Module) -> bool:
    """Whether a module is a plain linear layer: routers and grouped layers are subclasses that
    return something else."""
    kind = type(module)
    forwards = [linear.forward for linear in LINEAR]
    return isinstance(module, LINEAR) and (kind.forward in forwards or kind.__name__ in LIKE_LINEAR)


def _is_read_past(model: Any, name: str) -> bool:
    """Whether a layer's weight is used without calling the layer, as kernels of state-space layers
    do; or peft refuses the layer for its model type."""
    path, _, end = name.rpartition(".")
    is_state_space = hasattr(model.get_submodule(path), "A_log")
    return (end == "dt_proj" and is_state_space) or (
        end == "out_proj" and model.config.get_text_config().model_type in STATE_SPACE
    )


def _check_ends(option: str, ends: Sequence[str], names: Sequence[str]) -> None:
    for end in ends:
        if not any(ends_so(name, end) for name in names):
            known = sorted({name.rpartition(".")[2] for name in names})
            raise ConfigError(
                f"adapter.{option}: nothing of the model is named {end}{hint(end, known)}"
            )
