"""How long a sequence a model can take: tables of positions, and what it was trained for."""

import logging
from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from fastpref.errors import ConfigError

logger = logging.getLogger("fastpref")

_NAMES = (
    "max_position_embeddings",
    "n_positions",
    "max_seq_len",
    "max_target_positions",
    "model_max_length",
)

CHANGING_ROPE = ("longrope", "dynamic")
"""Types of rotary embeddings that rotate all sequences by the longest one beside them."""


def config_value(config: Any, name: str) -> Any:
    """A value of a transformers config; None where it is absent or differs from layer to layer."""
    try:
        return getattr(config, name, None)
    # such a value cannot be read off the whole model's config
    except RuntimeError:
        return None


def declared_positions(config: Any) -> int | None:
    """Positions of a model by its config, None if it names none."""
    config = config.get_text_config()
    for name in _NAMES:
        value = config_value(config, name)
        if isinstance(value, int) and value > 0:
            return value
    return None


def frequencies_change_beyond(config: Any) -> int | None:
    """Tokens of a sequence from which on all sequences computed beside it are rotated otherwise
    (longrope, dynamic scaling of rotary embeddings); None where no sequence has such an effect.
    """
    config = config.get_text_config()
    changing = [
        group
        for group in _rope_parameters(config)
        if group.get("rope_type", group.get("type")) in CHANGING_ROPE
    ]
    if not changing:
        return None
    original = "original_max_position_embeddings"
    lengths = [group.get(original) for group in changing]
    known = [length for length in (*lengths, config_value(config, original)) if length]
    return min(known, default=declared_positions(config) or 0)


def position_limit(model: Any) -> int | None:
    """Longest sequence that a table of positions allows (GPT-2, GPT-J, OPT); None without a table.

    Args:
        model: A causal LM of transformers; may be on the meta device.
    """
    declared = declared_positions(model.config)
    if declared is None:
        return None
    # MPT lays the distances of its ALiBi out for so many positions, used or not
    if hasattr(config_value(model.config, "attn_config"), "alibi"):
        return declared
    embedding = model.get_input_embeddings()
    # beside an adapter
    embedding = getattr(embedding, "base_layer", embedding)
    for module in model.get_decoder().modules():
        is_table = isinstance(module, nn.Embedding) and module is not embedding
        # OPT and BART keep two rows in front of the first position
        if is_table and declared <= module.num_embeddings <= declared + 2:
            # RoBERTa counts positions from behind that of its padding
            return declared - (0 if module.padding_idx is None else module.padding_idx + 1)
        if any(declared in table.shape[:-1] for table in _tables(module)):
            return declared
    return None


def _tables(module: nn.Module) -> Iterator[Tensor]:
    """Tensors of a module that are no parameters and may hold something for every position."""
    values = {**vars(module), **module._buffers}
    for name, value in values.items():
        # caches of rotary angles, which grow
        if isinstance(value, Tensor) and value.dim() > 1 and not name.startswith(("cos", "sin")):
            yield value


def trained_positions(config: Any) -> int | None:
    """Tokens that a model without a table was made for, scaling of its rotary angles included."""
    declared = declared_positions(config)
    if declared is None:
        return None
    longest = declared
    for scaling in _rope_parameters(config.get_text_config()):
        # YaRN leaves max_position_embeddings at what was trained and multiplies
        original = scaling.get("original_max_position_embeddings")
        if original and scaling.get("factor"):
            longest = max(longest, int(original * scaling["factor"]))
    return longest


def _rope_parameters(config: Any) -> Iterator[dict[str, Any]]:
    parameters = config_value(config, "rope_parameters") or config_value(config, "rope_scaling")
    if not isinstance(parameters, dict):
        return
    yield parameters
    # one set for each kind of layer
    yield from (value for value in parameters.values() if isinstance(value, dict))


def check_positions(model: Any, longest: int) -> None:
    """Refuse sequences that run off a table of positions; warn of those a model was not made for.

    Args:
        model: A causal LM of transformers; may be on the meta device.
        longest: Tokens of the longest sequence.

    Raises:
        ConfigError: naming the largest max_length that fits.
    """
    limit = position_limit(model)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"max_length: the longest sequence has {longest} tokens, the model has positions for "
            f"{limit}; set max_length={limit} or less"
        )
    warn_beyond_training(model, longest)


def check_company(model: Any, longest: int) -> None:
    """Refuse to keep what a model computes of a row, if it computes it in another way beside longer
    ones.

    Args:
        model, longest: See `check_positions`.

    Raises:
        ConfigError: naming the length from which on it does.
    """
    limit = frequencies_change_beyond(model.config)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"reference.mode: a sequence of more than {limit} tokens changes how this model "
            f"computes those beside it, and the longest one has {longest}; set "
            "reference.mode=online or a smaller max_length"
        )


def warn_beyond_training(model: Any, longest: int) -> None:
    """Say where sequences are longer than those that a model without a table was made for."""
    trained = trained_positions(model.config)
    if position_limit(model) is None and trained is not None and longest > trained:
        logger.warning(
            "the longest sequence has %d tokens, %s was made for %d by its config "
            "(max_position_embeddings): what it computes beyond them may be worth little",
            longest,
            type(model).__name__,
            trained,
        )
