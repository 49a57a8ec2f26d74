"""What a layer asks of its attention beside the tokens, and the definition of what it computes."""

from typing import NamedTuple

import torch
from torch import Tensor


class ScoreRules(NamedTuple):
    """How scores of queries and keys become the weights of values."""

    scale: float
    """Of the scores."""
    softcap: float | None = None
    """c in c · tanh(score / c), or None (Gemma 2)."""
    window: int | None = None
    """Tokens that one attends to, itself and those right before it; None: all before it."""
    sinks: Tensor | None = None
    """(H,): of each head the score of a key that is nobody's, whose value is zero (gpt-oss)."""


def attend_to_all(
    query: Tensor, key: Tensor, value: Tensor, rules: ScoreRules, *, mask: Tensor | None = None
) -> Tensor:
    """Attention of R queries to K keys in plain torch, the softmax in float32 or more.

    Args:
        query, key, value: (B, H, R, E), (B, heads, K, E) twice.
        rules: Of the layer.
        mask: Broadcast to (B, H, R, K), true where a query may attend; None: the last query to
            every key in its window, the one before to all but the last, and so on.

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
        mask = causal_mask(*scores.shape[2:], window=rules.window, device=scores.device)
    scores = scores.masked_fill(~mask, torch.finfo(scores.dtype).min)
    if rules.sinks is not None:
        sinks = rules.sinks.to(scores.dtype)[:, None, None].expand(*scores.shape[:3], 1)
        scores = torch.cat([scores, sinks], dim=-1)
    probabilities = scores.softmax(-1)[..., : key.shape[2]]
    return (probabilities.to(value.dtype) @ value).transpose(1, 2)


def causal_mask(R: int, K: int, *, window: int | None, device: torch.device) -> Tensor:
    """(R, K), true where a query attends; the last query is beside the last key."""
    mask = torch.ones(R, K, dtype=torch.bool, device=device).tril(K - R)
    return mask if window is None else mask.triu(K - R - window + 1)
