"""Turns a library's errors on reading a user's files into one sentence."""

import pickle
from collections.abc import Iterator
from contextlib import contextmanager

from safetensors import SafetensorError

from fastpref.errors import CheckpointError, FastprefError, is_out_of_memory

DAMAGED = (SafetensorError, pickle.UnpicklingError, EOFError)
"""Errors of reading a file of weights that is truncated, or is not one."""
PLAIN = (OSError, ValueError, RuntimeError)
"""Errors whose text is a sentence; others, such as KeyError, say little without their name."""


@contextmanager
def reading(what: str, name: str) -> Iterator[None]:
    """Turn whatever is raised inside into a CheckpointError that names the model.

    A checkpoint's files steer a family's own code: a wrong value in a config may end in an error of
    any class, and all of them mean that these files cannot be used.

    Args:
        what: What is being loaded: "Config", "Tokenizer", ….
        name: Folder or hub name.

    Raises:
        CheckpointError: anything was raised, except for our own errors and running out of memory,
            which pass through.
    """
    try:
        yield
    except Exception as error:
        if isinstance(error, FastprefError) or is_out_of_memory(error):
            raise
        if isinstance(error, DAMAGED):
            raise CheckpointError(
                f"model: the weights in {name} are damaged: {reason(error)}"
            ) from error
        raise CheckpointError(f"model: cannot load {what} from {name}: {reason(error)}") from error


def reason(error: BaseException) -> str:
    """The first sentence of a library's error, whose text may go on for pages."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    if isinstance(error, pickle.UnpicklingError):
        return "not a file of tensors alone"
    # "Validation error for field 'hidden_size':" has the rule on its next line
    ends = next((i for i, line in enumerate(lines) if not line.endswith(":")), 0)
    text = " ".join(lines[: ends + 1])
    if isinstance(error, PLAIN) and text:
        return text
    return f"{type(error).__name__}: {text}" if text else type(error).__name__
