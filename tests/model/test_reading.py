"""Whatever a library raises is one sentence that names the model, unless it is none of its."""

import pickle

import pytest
import torch
from safetensors import SafetensorError

from fastpref.errors import CheckpointError, ConfigError
from fastpref.model.files.reading import reading, reason

RULE = "Validation error for field 'size':\n    TypeError: expected int, got str\nTraceback …"


@pytest.mark.parametrize(
    ("error", "sentence"),
    [
        (OSError("no such file\nand more"), "no such file"),
        (KeyError("rope"), "KeyError: 'rope'"),
        (ZeroDivisionError("division by zero"), "ZeroDivisionError: division by zero"),
        (ValueError(RULE), "Validation error for field 'size': TypeError: expected int, got str"),
        (ValueError(), "ValueError"),
        (ValueError("what follows:"), "what follows:"),
        (pickle.UnpicklingError("Weights only load failed. …"), "not a file of tensors alone"),
    ],
)
def test_an_error_is_reduced_to_its_sentence(error, sentence):
    assert reason(error) == sentence
    with pytest.raises(CheckpointError, match=r"^model: .* m") as raised, reading("Config", "m"):
        raise error
    assert str(raised.value).endswith(sentence)
    assert raised.value.__cause__ is error


def test_damaged_files_are_called_damaged():
    message = r"^model: the weights in m are damaged"
    with pytest.raises(CheckpointError, match=message), reading("Config", "m"):
        raise SafetensorError("header too large")


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("an option"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        KeyboardInterrupt(),
    ],
)
def test_what_is_no_matter_of_the_files_passes(error):
    with pytest.raises(type(error)) as raised, reading("Config", "m"):
        raise error
    assert raised.value is error
