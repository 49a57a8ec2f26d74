"""Whatever a library raises is one sentence that names the model, unless it is none of its."""

import errno
import pickle

import pytest
import torch
from exhaustion import no_more_files
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastpref.errors import CheckpointError, ConfigError
from fastpref.explanations import explain
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
    # the system does not give the file, which may be whole
    message = r"^model: cannot load Config from m: .*Input/output error"
    with pytest.raises(CheckpointError, match=message), reading("Config", "m"):
        raise SafetensorError("I/O error: Input/output error (os error 5)")


def test_a_file_that_cannot_be_opened_is_not_called_missing(tmp_path):
    path = tmp_path / "model.safetensors"
    save_file({"weight": torch.zeros(2)}, path)
    with no_more_files(), pytest.raises(OSError) as raised, reading("the weights", "m"):
        safe_open(path, "pt")
    assert raised.value.errno == errno.EMFILE and raised.value.filename == str(path)
    known = explain(raised.value)
    assert known is not None and known.exit_code == 6
    path.unlink()
    path.symlink_to(path)
    message = "cannot load the weights from m: .*Too many levels of symbolic links"
    with pytest.raises(CheckpointError, match=message), reading("the weights", "m"):
        safe_open(path, "pt")
    path.unlink()
    message = "cannot load the weights from m: No such file"
    with pytest.raises(CheckpointError, match=message), reading("the weights", "m"):
        safe_open(path, "pt")


NO_MEMORY = [
    MemoryError(),
    torch.OutOfMemoryError("CUDA out of memory"),
    RuntimeError("DefaultCPUAllocator: can't allocate memory"),
    # of torch and of safetensors, where a file cannot be mapped
    RuntimeError("unable to mmap 256 bytes from file </m/w.bin>: Cannot allocate memory (12)"),
    SafetensorError("I/O error: Cannot allocate memory (os error 12)"),
    OSError(errno.ENOMEM, "Cannot allocate memory"),
]


@pytest.mark.parametrize("error", NO_MEMORY)
def test_memory_that_ran_out_while_weights_were_read_is_told_as_that(error):
    with pytest.raises(type(error)) as raised, reading("the weights", "m"):
        raise error
    known = explain(raised.value)
    assert known is not None and known.exit_code == 6
    assert str(known).startswith("out of memory: ")


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("an option"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        OSError(errno.EMFILE, "Too many open files", "config.json"),
        KeyboardInterrupt(),
    ],
)
def test_what_is_no_matter_of_the_files_passes(error):
    with pytest.raises(type(error)) as raised, reading("Config", "m"):
        raise error
    assert raised.value is error
