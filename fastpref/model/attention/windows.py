"""How far a model's layers look back, where not over a whole sequence."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastpref.model.positions import config_value


@contextmanager
def narrow_windows(model: Any, longest: int, *, tokens: int) -> Iterator[None]:
    """Windows so short that the probe's rows tell what a family makes of them; those that reach
    over every sequence stay as they are.

    Args:
        model: Of transformers.
        longest: Tokens of the longest sequence that will be computed.
        tokens: Of a window while entered.
    """
    holders = [model.config.get_text_config(), *model.modules()]
    before = []
    for holder in holders:
        window = vars(holder).get("sliding_window")
        if isinstance(window, int) and window < longest:
            before.append((holder, window))
            holder.sliding_window = tokens
    try:
        yield
    finally:
        for holder, window in before:
            holder.sliding_window = window


def limited_view(model: Any, longest: int) -> str | None:
    """Why layers that look back within chunks cannot be packed; None if they can."""
    chunk = config_value(model.config.get_text_config(), "attention_chunk_size")
    if chunk is not None and chunk < longest:
        return f"its attention looks back {chunk} tokens, the longest sequence has {longest}"
    return None
