"""Maximum sequence length of a model: its position table, and the length it was trained for."""

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
"""Types of rotary embeddings whose frequencies depend on the longest sequence of the batch."""


def config_value(config: Any, name: str) -> Any:
    """A value of a transformers config; None where it is absent or differs from layer to layer."""
    try:
        return getattr(config, name, None)
    # transformers raises it for a value that differs from layer to layer
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
    """Sequence length beyond which the rotary frequencies of all sequences of the batch change
    (longrope, dynamic scaling); None if they never do.
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
    """Longest sequence that a position table allows (GPT-2, GPT-J, OPT); None without a table.

    Args:
        model: A causal LM of transformers; may be on the meta device.
    """
    declared = declared_positions(model.config)
    if declared is None:
        return None
    # MPT builds the biases of its ALiBi for this many positions, used or not
    if hasattr(config_value(model.config, "attn_config"), "alibi"):
        return declared
    embedding = model.get_input_embeddings()
    # peft wraps an adapted embedding
    embedding = getattr(embedding, "base_layer", embedding)
    for module in model.get_decoder().modules():
        is_table = isinstance(module, nn.Embedding) and module is not embedding
        # OPT and BART have two extra rows before the first position
        if is_table and declared <= module.num_embeddings <= declared + 2:
            # RoBERTa's positions start after its padding index
            return declared - (0 if module.padding_idx is None else module.padding_idx + 1)
        if any(declared in table.shape[:-1] for table in _tables(module)):
            return declared
    return None


def _tables(module: nn.Module) -> Iterator[Tensor]:
    """Tensors of a module, parameters aside, that may have an entry for every position."""
    values = {**vars(module), **module._buffers}
    for name, value in values.items():
        # caches of rotary angles, which grow
        if isinstance(value, Tensor) and value.dim() > 1 and not name.startswith(("cos", "sin")):
            yield value


def trained_positions(config: Any) -> int | None:
    """Context length that a model without a table was made for, RoPE scaling included."""
    declared = declared_positions(config)
    if declared is None:
        return None
    longest = declared
    for scaling in _rope_parameters(config.get_text_config()):
        # YaRN leaves max_position_embeddings at the pretrained length and multiplies by a factor
        original = scaling.get("original_max_position_embeddings")
        if original and scaling.get("factor"):
            longest = max(longest, int(original * scaling["factor"]))
    return longest


def _rope_parameters(config: Any) -> Iterator[dict[str, Any]]:
    parameters = config_value(config, "rope_parameters") or config_value(config, "rope_scaling")
    if not isinstance(parameters, dict):
        return
    yield parameters
    # nested: a set for each layer type
    yield from (value for value in parameters.values() if isinstance(value, dict))


def check_positions(model: Any, longest: int) -> None:
    """Refuse sequences longer than a position table; warn of those that a model was not made for.

    Args:
        model: A causal LM of transformers; may be on the meta device.
        longest: Tokens in the longest sequence.

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
    """Refuse to cache a row's scores if longer sequences in the same batch would change them.

    Args:
        model, longest: See `check_positions`.

    Raises:
        ConfigError: naming the length beyond which they do.
    """
    limit = frequencies_change_beyond(model.config)
    if limit is not None and longest > limit:
        raise ConfigError(
            f"reference.mode: a sequence of more than {limit} tokens changes how this model "
            f"computes those beside it, and the longest one has {longest}; set "
            "reference.mode=online or a smaller max_length"
        )


def warn_beyond_training(model: Any, longest: int) -> None:
    """Warn if sequences are longer than a model without a position table was made for."""
    trained = trained_positions(model.config)
    if position_limit(model) is None and trained is not None and longest > trained:
        logger.warning(
            "the longest sequence has %d tokens, %s was made for %d by its config "
            "(max_position_embeddings): what it computes beyond them may be worth little",
            longest,
            type(model).__name__,
            trained,
        )
