"""How a layer's attention treats its scores, and a reference implementation of attention."""

from typing import NamedTuple

import torch
from torch import Tensor


class ScoreRules(NamedTuple):
    """How query-key scores become attention weights."""

    scale: float
    """Factor of q·kᵀ."""
    softcap: float | None = None
    """c in c · tanh(score / c), or None (Gemma 2)."""
    window: int | None = None
    """Sliding window: tokens that a query attends to, its own included; None: all earlier ones."""
    sinks: Tensor | None = None
    """(H,): each head's score of an attention sink, a virtual key whose value is zero (gpt-oss)."""


def attend_to_all(
    query: Tensor, key: Tensor, value: Tensor, rules: ScoreRules, *, mask: Tensor | None = None
) -> Tensor:
    """Attention of R queries to K keys in plain torch, the softmax in float32 or more.

    Args:
        query, key, value: (B, H, R, E); (B, heads, K, E) each.
        rules: Of the layer.
        mask: Broadcast to (B, H, R, K), true where a query may attend; None: causal within the
            window, the last query aligned with the last key.

    Returns:
        (B, R, H, E).
    """
    groups = query.shape[1] // key.shape[1]
    key, value = (x.repeat_interleave(groups, dim=1) for x in (key, value))
    at_least = torch.promote_types(query.dtype, torch.float32)
    scores = query.to(at_least) @ key.to(at_least).transpose(2, 3) * rules.scale
    if rules.softcap is not None:
        scores = rules.softcap * torch.tanh(scores / rules.softcap)
    if mask is None:
        R, K = scores.shape[2:]
        mask = torch.ones(R, K, dtype=torch.bool, device=scores.device).tril(K - R)
        if rules.window is not None:
            mask = mask.triu(K - R - rules.window + 1)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if rules.sinks is not None:
        sinks = rules.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    probabilities = scores.softmax(-1)[..., : key.shape[2]]
    return (probabilities.to(value.dtype) @ value).transpose(1, 2)
