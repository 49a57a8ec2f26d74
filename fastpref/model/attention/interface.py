"""Packed, prompt-shared attention behind transformers' `AttentionInterface`.

A model whose attention implementation is `fastpref` computes packed rows if its forward gets
`packed_row(…)` as additional keyword arguments, and ordinary attention (padded rows, sampling)
otherwise. Keyword arguments, because activation checkpointing passes them again when it recomputes
in an autograd thread.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fastpref.batch import Batch
from fastpref.config.groups import FLASH_PACKAGES
from fastpref.model.attention.backends import (
    ByWindow,
    PackedAttention,
    attend_in_groups,
    attend_in_math,
    attend_varlen,
    flash_kernel,
    torch_varlen_kernel,
)
from fastpref.model.attention.flex import block_mask, flex_attend
from fastpref.model.attention.rules import ScoreRules, attend_to_all
from fastpref.model.attention.segments import group_segments

IMPLEMENTATION = "fastpref"
"""The name under which transformers finds `attention_forward`."""


class PackedRow:
    """A packed row as its attention takes it; a plain object to torch.compile."""

    def __init__(self, attention: PackedAttention, layout: Any, longest: int) -> None:
        self.attention = attention
        self.layout = layout
        """What `attention.prepare` returned."""
        self.longest = longest
        """Assumed length of the longest sequence; a window that reaches over it is dropped."""


def packed_row(batch: Batch, attention: PackedAttention, longest: int = 0) -> dict[str, Any]:
    """Keyword arguments, beside `input_ids`, with which a model's body computes a packed row.

    Args:
        batch: With a layout.
        attention: Its backend.
        longest: Assumed length of the longest sequence, if greater than the batch's own.
    """
    assert batch.layout is not None
    longest = max(longest, batch.layout.longest_keys)
    # models take a 4-D mask for a finished one and build none; this one is never read
    ready = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
    return {
        "position_ids": batch.position_ids,
        "attention_mask": ready,
        "fastpref_row": PackedRow(attention, attention.prepare(batch.layout), longest),
    }


@torch.compiler.disable
def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    sliding_window: int | None = None,
    s_aux: Tensor | None = None,
    fastpref_row: PackedRow | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface: (1, H, T, E) … -> (1, T, H, E).

    Raises:
        ValueError: the row is packed, and the layer asks for something that packed rows lack.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    rules = ScoreRules(scale, softcap, sliding_window, s_aux)
    if fastpref_row is not None:
        if options.get("position_bias") is not None:
            raise ValueError("its attention adds position_bias")
        if sliding_window is not None and sliding_window >= fastpref_row.longest:
            # the window reaches over every sequence
            rules = rules._replace(window=None)
        attend = fastpref_row.attention.attend
        return attend(query, key, value, fastpref_row.layout, rules), None
    if softcap is not None or s_aux is not None:
        return attend_to_all(query, key, value, rules, mask=attention_mask), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scale, **options
    )


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def build_attention(name: str) -> PackedAttention:
    """The packed attention that `model.attention` names, one of `ATTENTIONS`.

    Raises:
        ImportError: its package is not installed, or not as expected.
    """
    match name:
        case "eager":
            return PackedAttention(name=name, attend=attend_in_math)
        case "sdpa":
            prepare = partial(ByWindow, group_segments)
            return PackedAttention(name=name, attend=attend_in_groups, prepare=prepare)
        case "varlen":
            attend = attend_varlen(torch_varlen_kernel())
            return PackedAttention(name=name, attend=attend, gathers_keys=True)
        case "flex":
            prepare = partial(ByWindow, block_mask)
            return PackedAttention(name=name, attend=flex_attend(), prepare=prepare)
    if name in FLASH_PACKAGES:
        attend = attend_varlen(flash_kernel(FLASH_PACKAGES[name]))
        return PackedAttention(name=name, attend=attend, gathers_keys=True)
    raise AssertionError(f"build_attention has no case for {name}")
