"""What a model's layers ask of their attention, found out by asking them."""

from typing import Any, NamedTuple

from torch import Tensor

from fastpref.model.attention.backends import PackedAttention
from fastpref.model.attention.interface import build_attention
from fastpref.model.attention.rules import ScoreRules


class AttentionCall(NamedTuple):
    """What a layer asks of its attention."""

    heads: int
    kv_heads: int
    width: int
    """Of a query and a key."""
    value_width: int
    scale: float
    softcap: float | None
    has_window: bool = False
    has_sinks: bool = False


def recording(calls: set[AttentionCall]) -> PackedAttention:
    """Packed attention by definition, of any shape, that remembers what it was asked for."""
    exact = build_attention("eager")

    def attend(query: Tensor, key: Tensor, value: Tensor, layout: Any, rules: ScoreRules) -> Tensor:
        shapes = query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]
        more = rules.window is not None, rules.sinks is not None
        calls.add(AttentionCall(*shapes, rules.scale, rules.softcap, *more))
        return exact.attend(query, key, value, layout, rules)

    return PackedAttention(name=exact.name, attend=attend)
