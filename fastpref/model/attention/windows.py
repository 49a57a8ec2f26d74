"""Layers that attend to less than a whole sequence: sliding windows and chunks."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from fastpref.model.positions import config_value


@contextmanager
def narrow_windows(model: Any, longest: int, *, tokens: int) -> Iterator[None]:
    """Shorten a model's sliding windows, so that the short probe rows exercise them; windows that
    reach over every sequence stay as they are.

    Args:
        model: A causal LM of transformers.
        longest: Tokens in the longest sequence that will be computed.
        tokens: The window inside the context.
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
    """Why a model with chunked attention cannot be packed; None if it can, or has none."""
    chunk = config_value(model.config.get_text_config(), "attention_chunk_size")
    if chunk is not None and chunk < longest:
        return f"its attention looks back {chunk} tokens, the longest sequence has {longest}"
    return None
