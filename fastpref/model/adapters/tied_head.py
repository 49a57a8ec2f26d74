"""One adapter for an embedding and the head that is tied to it.

peft gives the head matrices of its own that are views of the embedding's: two parameters of the
optimizer on the same memory, each with moments of its own. Here the head has no adapter; it
computes with the embedding's adapted weight.
"""

import re
from collections.abc import Collection
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from fastpref.model.adapters.low_rank import split

TIED = "_fastpref_tied_to"


def is_tied(model: Any) -> bool:
    """Whether a model's embedding and head have one weight."""
    return model.get_input_embeddings().weight is model.get_output_embeddings().weight


def without_head(model: Any, targets: Collection[str] | str) -> list[str]:
    """Name suffixes of target layers, with a tied head replaced by the embedding.

    Args:
        model: With tied embedding and head.
        targets: Name suffixes, or a regular expression of full names, as in peft.
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
    """Whether a module's name has a suffix that consists of whole parts of the name."""
    return name == end or name.endswith(f".{end}")


def tie_head(model: Any) -> None:
    """Make the head compute with the embedding's adapted weight, in place."""
    head = model.get_output_embeddings()
    # in a tuple it is not registered as a submodule
    setattr(head, TIED, (model.get_input_embeddings(),))
    head.forward = partial(_forward, head)


def _forward(head: Any, input: Tensor) -> Tensor:
    hidden, weight = adapted_head(head, input)
    return F.linear(hidden, weight.to(input.dtype), head.bias)


def adapted_head(head: Any, hidden: Tensor) -> tuple[Tensor, Tensor]:
    """Hidden states and one weight whose product is a head's output, its adapter included.

    In float32 the adapter is added to the weight. 16 bits would round most of it away there, so its
    matrices are appended to hidden states and weight, each in two parts that hold 16 of its bits.

    Args:
        head: With or without an adapter of its own, or tied to an embedding with one.
        hidden: (..., D) last hidden states.

    Returns:
        Hidden states (..., D') and a weight (V, D'), through which the adapter gets its gradients;
        D' = D without an adapter or in float32.
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
        high_z, low_z = split(low_rank, hidden.dtype)
        high_B, low_B = split(B, hidden.dtype)
        hidden = torch.cat([hidden, high_z, low_z, high_z], dim=-1)
        weight = torch.cat([weight.to(hidden.dtype), high_B, high_B, low_B], dim=-1)
    return hidden, weight


def numbers_of_adapted_head(model: Any) -> int:
    """Elements of the weight that `adapted_head` makes in 16 bits, whose gradient has as many; 0 if
    the head has no adapter."""
    head = model.get_output_embeddings()
    [adapted] = getattr(head, TIED, (head,))
    ranks = [_matrices(adapted, name)[0].shape[0] for name in _active(adapted)]
    V, D = head.weight.shape
    return V * (D + 3 * sum(ranks)) if ranks else 0


def _active(layer: Any) -> list[str]:
    """Names of a layer's active adapters."""
    if not hasattr(layer, "active_adapters") or layer.disable_adapters:
        return []
    return [name for name in layer.active_adapters if name in layer.scaling]


def _matrices(layer: Any, name: str) -> tuple[Tensor, Tensor]:
    """A (R, D) and B (V, R) of a head's adapter, or of an embedding's as its head uses it."""
    if name in getattr(layer, "lora_embedding_A", ()):
        return layer.lora_embedding_B[name].T, layer.lora_embedding_A[name].T
    return layer.lora_A[name].weight, layer.lora_B[name].weight


def shared_table(model: Any, name: str) -> str:
    """Why an adapter on only one of two tied tables is refused; "" if it is on neither.

    Args:
        model: With the adapter in place.
        name: peft's name of an adapter that does not tie both tables.
    """
    if not is_tied(model):
        return ""
    names = {module: path for path, module in model.named_modules()}
    tables = model.get_input_embeddings(), model.get_output_embeddings()
    for table, other in zip(tables, ("head", "embedding"), strict=True):
        if name in getattr(table, "scaling", ()):
            return (
                f"{names[table]} shares its weight with the {other}, so an adapter merged into one "
                "would change both"
            )
    return ""


def obstacle_of_head(model: Any, name: str) -> str:
    """Why an adapter on the head cannot be trained or used here, "" if it can.

    Args:
        model: With the adapter in place.
        name: The adapter's, in peft's layers.
    """
    head = model.get_output_embeddings()
    names = {module: path for path, module in model.named_modules()}
    [computes] = getattr(head, TIED, (head,))
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
    """Names of a tied head's matrices in peft's folders."""
    names = {module: name for name, module in model.named_modules()}
    head = names[model.get_output_embeddings()]
    return f"{head}.lora_A.weight", f"{head}.lora_B.weight"


def head_state(model: Any, state: dict[str, Tensor]) -> dict[str, Tensor]:
    """A tied head's matrices as peft's folders have them: the embedding's, transposed.

    Args:
        model: With the adapter.
        state: Tensors of the adapter, by the model's names.
    """
    names = {module: name for name, module in model.named_modules()}
    embedding = names[model.get_input_embeddings()]
    name_A, name_B = head_names(model)
    return {
        name_A: state[f"{embedding}.lora_embedding_B"].T.contiguous(),
        name_B: state[f"{embedding}.lora_embedding_A"].T.contiguous(),
    }
