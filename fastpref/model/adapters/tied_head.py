"""One adapter for an embedding and the head that is tied to it.

peft gives the head matrices of its own that look at the embedding's memory: two parameters of an
optimizer on the same numbers, each with moments of its own. Here the head has no adapter; it
computes with the embedding's weight as it is adapted.
"""

import re
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

TIED = "_fastpref_tied_to"


def is_tied(model: Any) -> bool:
    """Whether a model's embedding and head have one weight."""
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def without_head(model: Any, targets: Collection[str] | str) -> list[str]:
    """Ends of names of layers, with the embedding in the place of the head that is tied to it.

    Args:
        model: Whose embedding and head are tied.
        targets: Ends of names, or an expression that whole names match, as peft takes them.
    """
    embedding, head = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: name for name, module in model.named_modules()}
    if isinstance(targets, str):
        targets = [name for name in names.values() if re.fullmatch(targets, name)]
    others = [end for end in targets if not ends_so(names[head], end)]
    if not any(ends_so(names[embedding], end) for end in others):
        others.append(names[embedding])
    return sorted(others)


def ends_so(name: str, end: str) -> bool:
    """Whether a module's name is what an end means."""
    return name == end or name.endswith(f".{end}")


def tie_head(model: Any) -> None:
    """Let the head compute with the adapted weight of the embedding, in place."""
    head = model.get_output_embeddings()
    # in a tuple it is no submodule
    setattr(head, TIED, (model.get_input_embeddings(),))
    head.forward = partial(_forward, head)


def _forward(head: Any, input: Tensor) -> Tensor:
    hidden, weight = adapted_head(head, input)
    return F.linear(hidden, weight.to(input.dtype), head.bias)


def adapted_head(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """What a head computes with, its adapter included, as hidden states and one matrix.

    In float32 the adapter is added to the weight. 16 bits would round most of it away there, so its
    two matrices stand beside hidden states and weight, in two parts each that hold 16 of its bits.

    Args:
        head: With or without an adapter of its own, or tied to an embedding with one.
        hidden: (..., D) last hidden states.

    Returns:
        Hidden states (..., D') and a weight (V, D'), D' = D where there is no adapter; with the
        adapter's gradients.
    """
    [adapted] = getattr(head, TIED, (head,))
    weight: Tensor = adapted.weight
    for name in _active(adapted):
        A, B = _matrices(adapted, name)
        scaling = adapted.scaling[name]
        if hidden.dtype == torch.float32:
            weight = weight.to(hidden.dtype) + scaling * (B @ A)
            continue
        low_rank = scaling * (hidden.float() @ A.T)
        high_z, low_z = _parts(low_rank, hidden.dtype)
        high_B, low_B = _parts(B, hidden.dtype)
        hidden = torch.cat([hidden, high_z, low_z, high_z], dim=-1)
        weight = torch.cat([weight.to(hidden.dtype), high_B, high_B, low_B], dim=-1)
    return hidden, weight


def numbers_of_adapted_head(model: Any) -> int:
    """Numbers of the weight that `adapted_head` makes in 16 bits, which it needs a gradient of; 0
    where the head has no adapter."""
    head = model.get_output_embeddings()
    [adapted] = getattr(head, TIED, (head,))
    ranks = [_matrices(adapted, name)[0].shape[0] for name in _active(adapted)]
    V, D = head.weight.shape
    return V * (D + 3 * sum(ranks)) if ranks else 0


def _active(layer: Any) -> list[str]:
    """Adapters of a layer that compute now."""
    if not hasattr(layer, "active_adapters") or layer.disable_adapters:
        return []
    return [name for name in layer.active_adapters if name in layer.scaling]


def _matrices(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """An adapter of a head, (R, D) and (V, R), or of an embedding as its head reads it."""
    if name in getattr(layer, "lora_embedding_A", ()):
        return layer.lora_embedding_B[name].T, layer.lora_embedding_A[name].T
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def _parts(matrix: Tensor, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    """A float32 matrix as the sum of two of 16 bits; its gradient is that of the first, which is
    multiplied by all that it is multiplied by."""
    high = matrix.to(dtype)
    return high, (matrix.detach() - high.detach().float()).to(dtype)


def obstacle_of_head(model: Any, name: str) -> str:
    """Why an adapter on the embedding or the head cannot be trained or used here, "" if it can.

    Args:
        model: With the adapter in place.
        name: peft's of the adapter.
    """
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    names = {module: path for path, module in model.named_modules()}
    embedding, head = (name in getattr(table, "scaling", ()) for table in tables)
    shared = is_tied(model) and not hasattr(tables[1], TIED)
    if shared and (embedding or head):
        mine, other = (0, "the head") if embedding else (1, "the embedding")
        return (
            f"{names[tables[mine]]} shares its weight with {other}, so an adapter merged into one "
            "would change both; adapter.ensure_weight_tying=true adapts both alike"
        )
    [computes] = getattr(tables[1], TIED, (tables[1],))
    if name not in getattr(computes, "scaling", ()):
        return ""
    matrix = dict(computes.lora_B.items()).get(name)
    more = {
        "DoRA or another variant": name in computes.lora_variant,
        "a bias": getattr(matrix, "bias", None) is not None,
        "dropout, which adapter.dropout=0 leaves out": not isinstance(
            computes.lora_dropout[name], nn.Identity
        ),
    }
    found = [what for what, has in more.items() if has]
    return f"{names[computes]}, with which logits are made, cannot have {found[0]}" if found else ""


def head_names(model: Any) -> tuple[str, str]:
    """Names of the matrices that peft's folders have for a head that is tied."""
    names = {module: name for name, module in model.named_modules()}
    head = names[model.get_output_embeddings()]
    return f"{head}.lora_A.weight", f"{head}.lora_B.weight"


def head_state(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """The matrices that peft's folders have for a head that is tied: the embedding's, transposed.

    Args:
        model: With the adapter.
        state: Of the adapter, by the model's names.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding = names[model.get_input_embeddings()]
    name_A, name_B = head_names(model)
    return {
        name_A: state[f"{embedding}.lora_embedding_B"].T.contiguous(),
        name_B: state[f"{embedding}.lora_embedding_A"].T.contiguous(),
    }
