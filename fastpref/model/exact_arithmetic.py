"""Arithmetic that checks can trust: float32 whatever the weights are stored in, exact products.

Float32 holds every bfloat16 and float16 number, so a model whose parameters are widened while they
are used computes what it would if it had been loaded in float32.
"""

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.model.blocks import find_blocks


@contextmanager
def exact_arithmetic(model: Any, block_name: str | None = None) -> Iterator[None]:
    """A model's forward passes in float32, a block widened at a time; everything as it was after.

    Args:
        model: A causal LM of transformers, on a CPU.
        block_name: Class of the transformer blocks, None: found from the model.
    """
    remove = cast_in_forward(model, torch.float32, block_name)
    # some families round what enters the head to the dtype its weight has by then
    remove.append(cast_during(model, _outside_of_blocks(model, block_name), torch.float32))
    try:
        with exact_products():
            yield
    finally:
        for undo in remove:
            undo()


@contextmanager
def exact_products() -> Iterator[None]:
    """Float32 matrix products of a CPU in float32, whatever has been allowed elsewhere."""
    mkldnn: Any = torch.backends.mkldnn
    matmul = mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def cast_in_forward(
    model: Any, dtype: torch.dtype, block_name: str | None
) -> list[Callable[[], None]]:
    """Cast each block's parameters while it runs, and every other module's own while that one does.

    Args:
        model: A causal LM of transformers.
        dtype: That of the arithmetic.
        block_name: Class of the transformer blocks, None: found from the model.

    Returns:
        What undoes it, one function a module.
    """
    blocks = find_blocks(model, block_name)
    undo = [cast_during(block, list(block.parameters()), dtype) for block in blocks]
    inside = {module for block in blocks for module in block.modules()}
    for module in model.modules():
        if module not in inside and any(True for _ in module.parameters(recurse=False)):
            in_blocks = {p for block in blocks for p in block.parameters()}
            own = [p for p in module.parameters() if p not in in_blocks]
            undo.append(cast_during(module, own, dtype))
    return undo


def _outside_of_blocks(model: Any, block_name: str | None) -> list[nn.Parameter]:
    in_blocks = {p for block in find_blocks(model, block_name) for p in block.parameters()}
    return [parameter for parameter in model.parameters() if parameter not in in_blocks]


def cast_during(
    module: nn.Module, parameters: Iterable[nn.Parameter], dtype: torch.dtype
) -> Callable[[], None]:
    """Let parameters have a dtype while a module's forward runs.

    Returns:
        What undoes it.
    """
    parameters = list(parameters)
    stored: list[tuple[nn.Parameter, Tensor]] = []

    def widen(*_: object) -> None:
        stored.extend((p, p.data) for p in parameters if p.dtype != dtype)
        for parameter, narrow in stored:
            parameter.data = narrow.to(dtype)

    def restore(*_: object) -> None:
        for parameter, narrow in stored:
            parameter.data = narrow
        stored.clear()

    hooks = [
        module.register_forward_pre_hook(widen),
        module.register_forward_hook(restore, always_call=True),
    ]

    def undo() -> None:
        for hook in hooks:
            hook.remove()

    return undo
