"""Float32 arithmetic for checks of a model, whatever dtype its weights are stored in.

Float32 holds every bfloat16 and float16 number exactly, so a model whose parameters are widened
while they are used gives the same results as one that was loaded in float32.
"""

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from fastpref.model.blocks import find_blocks


@contextmanager
def exact_arithmetic(model: Any, block_name: str | None = None) -> Iterator[None]:
    """Run a model's forwards in float32, widening one block at a time; restored on exit.

    Args:
        model: A causal LM of transformers, on a CPU.
    """
    with computing_in(model, torch.float32, block_name), exact_products():
        yield


@contextmanager
def computing_in(model: Any, dtype: torch.dtype, block_name: str | None = None) -> Iterator[None]:
    """Run a model's forwards in a dtype, as FSDP2's mixed precision does: each block's parameters
    are cast while it runs, all others while any module that contains them runs.

    Args:
        model: A causal LM of transformers.
        dtype: Compute dtype.
    """
    hooks = cast_in_forward(model, dtype, block_name, tables_at_once=True)
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


@contextmanager
def exact_products() -> Iterator[None]:
    """Compute float32 matrix products on the CPU in full float32, whatever torch's settings."""
    mkldnn: Any = torch.backends.mkldnn
    matmul = mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def cast_in_forward(
    model: Any,
    dtype: torch.dtype,
    block_name: str | None = None,
    *,
    tables_at_once: bool = False,
    kept: Collection[nn.Parameter] = (),
) -> list[RemovableHandle]:
    """Cast each block's parameters while it runs, and all others while any module that contains
    them runs: some families read the dtype of a norm or a head before it runs. This is FSDP2's
    mixed precision without its copies; under FSDP2 parameters have the dtype already: a no-op.

    Args:
        model: A causal LM of transformers.
        dtype: Compute dtype.
        tables_at_once: Treat embeddings and head like the others, at the cost of their memory;
            else each of them is cast only while it runs itself.
        kept: Parameters that are not cast.

    Returns:
        Handles of the hooks, to remove them.
    """
    blocks = find_blocks(model, block_name)
    as_they_are = set(kept)
    hooks = []
    for block in blocks:
        own = [p for p in block.parameters() if p not in as_they_are]
        hooks += cast_during(block, own, dtype)
    inside = {module for block in blocks for module in block.modules()}
    apart = {parameter for block in blocks for parameter in block.parameters()}
    apart |= as_they_are
    tables = [model.get_output_embeddings()]
    tables += [module for module in model.modules() if isinstance(module, nn.Embedding)]
    if not tables_at_once:
        apart |= {table.weight for table in tables}
    for module in model.modules():
        if module in inside:
            continue
        own = list(module.parameters(recurse=False)) if module in tables else []
        own += [p for p in module.parameters() if p not in apart]
        if own:
            hooks += cast_during(module, own, dtype)
    return hooks


def cast_during(
    module: nn.Module, parameters: Sequence[nn.Parameter], dtype: torch.dtype
) -> list[RemovableHandle]:
    """Cast parameters while a module's forward runs; returns the handles of the hooks."""
    stored: list[tuple[nn.Parameter, Tensor]] = []

    def widen(*_: object) -> None:
        stored.extend((p, p.data) for p in parameters if p.dtype != dtype)
        for parameter, narrow in stored:
            parameter.data = narrow.to(dtype)

    def restore(*_: object) -> None:
        for parameter, narrow in stored:
            parameter.data = narrow
        stored.clear()

    return [
        module.register_forward_pre_hook(widen),
        module.register_forward_hook(restore, always_call=True),
    ]
