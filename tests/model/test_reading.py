"""Whatever a library raises is one sentence that names the model, unless it is none of its."""

import errno
import pickle
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from exhaustion import no_more_files
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

from fastpref.batch import EncodedRow
from fastpref.errors import CheckpointError, ConfigError
from fastpref.explanations import explain
from fastpref.model.adapters.folders import _merge
from fastpref.model.files.archives import read_policy
from fastpref.model.files.reading import reading, reason
from fastpref.scoring.row_cache import RowCache
from fastpref.scoring.shards import Shards

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


def test_files_are_not_to_blame_for_memory_that_runs_out(tmp_path, monkeypatch):
    def exhausted(*_: Any, **__: Any) -> None:
        raise MemoryError

    monkeypatch.setattr(torch, "load", exhausted)
    monkeypatch.setattr(np, "load", exhausted)
    path = tmp_path / "000000.npz"
    path.touch()
    shards = Shards.of(tmp_path, [EncodedRow([1], [2], [3])], 1)
    cache = RowCache(tmp_path)
    for read in (
        lambda: read_policy(path),
        shards.missing,
        lambda: cache.read(cache.files(), set()),
        lambda: _merge(UnmergeableModel(), "adapter"),
    ):
        with pytest.raises(MemoryError):
            read()


class UnmergeableModel:
    """A model with an adapter that memory is too small to merge."""

    def __init__(self) -> None:
        self.base_model = SimpleNamespace(model=SimpleNamespace(get_output_embeddings=lambda: None))
        config = SimpleNamespace(to_dict=lambda: {})
        self.peft_config = {"default": config}

    def merge_and_unload(self) -> None:
        raise MemoryError


@pytest.mark.parametrize(
    "error",
    [
        ConfigError("an option"),
        MemoryError(),
        torch.OutOfMemoryError("CUDA out of memory"),
        RuntimeError("DefaultCPUAllocator: can't allocate memory"),
        OSError(errno.EMFILE, "Too many open files", "config.json"),
        RuntimeError("CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
        # transformers loads weights in threads
        RuntimeError("can't start new thread"),
        RuntimeError("Resource temporarily unavailable"),
        KeyboardInterrupt(),
    ],
)
def test_what_is_no_matter_of_the_files_passes(error):
    with pytest.raises(type(error)) as raised, reading("Config", "m"):
        raise error
    assert raised.value is error
