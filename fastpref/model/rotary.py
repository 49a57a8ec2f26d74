"""Rotary embeddings whose frequencies depend on the longest sequence of a forward (longrope,
dynamic scaling): on that alone, not on earlier forwards, nor on the row layout."""

from inspect import unwrap
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from fastpref.model.mixers import current_sequences
from fastpref.model.positions import CHANGING_ROPE

ORIGINAL, GROWN = "original_inv_freq", "max_seq_len_cached"
"""Suffixes of a module's attributes: the frequencies for short sequences, and the greatest length
seen so far, of the whole module or of one layer type."""


class _Steady:
    """Replaces the forward of a rotary module of transformers."""

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def __call__(self, x: Tensor, position_ids: Tensor, *args: Any, **kwargs: Any) -> Any:
        forward: Any = type(self.module).forward
        if position_ids.is_meta:
            # without the search for the longest position: meta tensors have no values
            with torch.no_grad():
                return unwrap(forward)(self.module, x, position_ids, *args, **kwargs)
        self._forget()
        if current_sequences() is None:
            return forward(self.module, x, position_ids, *args, **kwargs)
        # a packed row omits the last token of each sequence, but its position counts
        last = (position_ids.amax() + 1).expand(*position_ids.shape[:-1], 1)
        longer = torch.cat([position_ids, last], dim=-1)
        angles = forward(self.module, x, longer, *args, **kwargs)
        return tree_map(lambda values: values[..., :-1, :], angles)

    def _forget(self) -> None:
        """Reset what transformers keeps of a longer sequence until a much shorter one comes."""
        module: Any = self.module
        for name, value in [*vars(module).items(), *module._buffers.items()]:
            if name.endswith(GROWN):
                setattr(module, name, module.original_max_seq_len)
            if name.endswith(ORIGINAL):
                used = name.removesuffix(ORIGINAL) + "inv_freq"
                # a copy: transformers may write into the frequencies in use
                setattr(module, used, value.to(getattr(module, used).device, copy=True))


def keep_steady(model: nn.Module) -> None:
    """Make length-dependent rotary frequencies a function of each forward's sequences alone.

    Args:
        model: A model of transformers; the forwards of such rotary modules are replaced.
    """
    for module in model.modules():
        rope_type = getattr(module, "rope_type", None)
        rope_types = rope_type.values() if isinstance(rope_type, dict) else [rope_type]
        changes = any(kind in str(rope) for rope in rope_types for kind in CHANGING_ROPE)
        if changes and hasattr(type(module).forward, "__wrapped__"):
            module.forward = _Steady(module)
