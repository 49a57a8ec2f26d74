"""Records the shapes and score rules that a model's layers pass to their attention."""

from typing import Any, NamedTuple

from torch import Tensor

from fastpref.model.attention.backends import PackedAttention
from fastpref.model.attention.interface import build_attention
from fastpref.model.attention.rules import ScoreRules


class AttentionCall(NamedTuple):
    """Shapes and score rules that a layer passes to its attention."""

    heads: int
    kv_heads: int
    width: int
    """Head dimension of queries and keys."""
    value_width: int
    scale: float
    softcap: float | None
    has_window: bool = False
    has_sinks: bool = False


def recording(calls: set[AttentionCall]) -> PackedAttention:
    """The reference packed attention, which adds every call that it gets to `calls`."""
    exact = build_attention("eager")

    def attend(query: Tensor, key: Tensor, value: Tensor, layout: Any, rules: ScoreRules) -> Tensor:
        shapes = query.shape[1], key.shape[1], query.shape[-1], value.shape[-1]
        more = rules.window is not None, rules.sinks is not None
        calls.add(AttentionCall(*shapes, rules.scale, rules.softcap, *more))
        return exact.attend(query, key, value, layout, rules)

    return PackedAttention(name=exact.name, attend=attend)
