"""A checkpoint's weights as its files have them: their names, and those that are not trained.

Names in memory differ from those in the files (transformers renames and stacks weights while it
loads them), and files hold weights that the model in memory lacks: towers of a multimodal wrapper,
multi-token-prediction heads. An export saves the model's weights under the files' names and copies
all others from the files, bit for bit.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import safe_open
from torch import Tensor
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    rename_source_key,
    revert_weight_conversion,
)

from fastpref.config import ModelConfig
from fastpref.errors import CheckpointError
from fastpref.model.files.archives import load_pickle
from fastpref.model.files.configs import load_base_config, quantization_options
from fastpref.model.files.paths import (
    ModelSource,
    archive_file,
    archived_model,
    named_model,
)
from fastpref.model.files.reading import reading
from fastpref.model.files.weight_files import pickle_files, weight_files, weights_folder

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""Safetensors' names of the dtypes that weights are trained from; others are quantized."""


class FileWeight(NamedTuple):
    """A tensor of a file that is held open, to be read on demand even if the file was deleted."""

    read: Callable[[], Tensor]
    """Returns the tensor, on the CPU."""
    num_bytes: int
    dtype: torch.dtype | None
    """None if weights cannot be trained from its dtype."""


class SourceWeights(NamedTuple):
    """What the files of a checkpoint hold."""

    weights: dict[str, FileWeight]
    """By their names in the files."""
    packed: tuple[str, ...]
    """Names of the tensors of quantized weights, which an export with ordinary weights lacks."""


class Arranged(NamedTuple):
    """A model's weights and the rest of its source's, by their names in the source's files."""

    own: dict[str, Tensor]
    untouched: dict[str, FileWeight]
    """Weights of the source that the model does not have, or does not use."""
    left_out: list[str]
    """Names of quantized weights that the model does not have."""


def open_weights(model: ModelConfig, *, wrapper: bool) -> SourceWeights:
    """Open the files that a run's weights come from: those of an archive folder, unless they hold
    fewer weights than the model's own.

    Args:
        model: For `name_or_path`, `revision` and `archive`.
        wrapper: The model has parts that are not loaded.

    Raises:
        CheckpointError: a file cannot be read, or no file is known that holds the weights of the
            parts that are not loaded.
    """
    own = named_model(model)
    sources = [own]
    if archive_file(model):
        # the archive has all weights of the model; its own files add only a wrapper's other parts
        sources = [own] if wrapper else []
    elif model.archive:
        sources.insert(0, archived_model(model))
    # the first one among equals; weights of few bits are no weights to train
    found = max(map(open_files, sources), key=_num_weights, default=SourceWeights({}, ()))
    if wrapper and not found.weights:
        raise CheckpointError(
            f"model: {own.base} is more than its text part, and none of its files of weights is "
            "known, so the rest of it cannot be exported"
        )
    return found


def _num_weights(source: SourceWeights) -> int:
    return sum(weight.dtype is not None for weight in source.weights.values())


def arrange(model: Any, weights: Mapping[str, Tensor], source: SourceWeights) -> Arranged:
    """Rename a model's weights as in its source, and find the source's other weights.

    Args:
        model: For its names and conversions.
        weights: By the model's names; tied weights under the first of theirs.
        source: The model's source.
    """
    own = revert_weight_conversion(model, dict(weights))
    find_place = place_finder(model)
    places = {name: find_place(name) for name in source.weights}
    given = {
        name: place
        for name, (place, alone) in places.items()
        if alone and place is not None and place in weights and name not in own
    }
    renamed = set(given.values())
    # drop names of weights that the files hold under another name only
    own = {
        name: weight
        for name, weight in own.items()
        if name in source.weights or find_place(name)[0] not in renamed
    }
    own |= {name: weights[place] for name, place in given.items()}
    known = {*own, *(name for name, (place, _) in places.items() if place in weights)}
    modules = {_module(name) for name in own}
    return Arranged(
        own=own,
        untouched={name: x for name, x in source.weights.items() if name not in known},
        left_out=[name for name in source.packed if _module(name) not in modules],
    )


def most_common_dtype(weights: Mapping[str, FileWeight]) -> torch.dtype | None:
    """The dtype of most bytes; None if no weight has a dtype that can be trained from."""
    sizes: Counter[torch.dtype] = Counter()
    for weight in weights.values():
        if weight.dtype is not None:
            sizes[weight.dtype] += weight.num_bytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


def group_names(names: Iterable[str], others: Iterable[str]) -> dict[str, list[str]]:
    """Group names by the outermost module that contains none of `others`."""
    taken = {
        ".".join(parts[:end])
        for parts in (name.split(".") for name in others)
        for end in range(1, len(parts) + 1)
    }
    groups: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        paths = (".".join(parts[:end]) for end in range(1, len(parts) + 1))
        groups.setdefault(next(path for path in paths if path not in taken), []).append(name)
    return groups


def _first_names(model: Any) -> dict[str, str]:
    """Map every name of a model's tensors to the first name of the same tensor, if it is tied."""
    firsts = {parameter: name for name, parameter in model.named_parameters()}
    same = {name: firsts[x] for name, x in model.named_parameters(remove_duplicate=False)}
    return {name: same.get(name, name) for name in model.state_dict()}


def place_finder(model: Any) -> Callable[[str], tuple[str | None, bool]]:
    """A function that maps a name in a file to the model's tensor that transformers loads it into,
    None if none, and to whether the file's tensor is all of the model's."""
    first = _first_names(model)
    conversions = get_model_conversion_mapping(model)
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    prefix = model.base_model_prefix

    def find(name: str) -> tuple[str | None, bool]:
        place, pattern = rename_source_key(name, renamings, converters, prefix, first)
        if place not in first and name in first:
            place, pattern = rename_source_key(name, [], [], prefix, first)
        return first.get(place), pattern is None

    return find


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _read_held(file: Any, name: str, path: Path, state: tuple[int, ...]) -> Tensor:
    """Read a tensor of a safetensors file that is held open: it may have been replaced or deleted.

    Args:
        file: The open file.
        name: Of the tensor.
        path: Where the file was opened.
        state: Its `_state` then.

    Raises:
        CheckpointError: the file was overwritten in place, so that reading it is unsafe.
    """
    now = _state(path)
    # another file under that name has another inode
    if now and now[0] == state[0] and now != state:
        raise CheckpointError(
            f"model: {path} was written to while a run used it, so what is not trained "
            "of it cannot be exported; the trained weights are in the last checkpoint: put the "
            "file back and go on with resume=auto"
        )
    return file.get_tensor(name)


def _state(path: Path) -> tuple[int, ...]:
    """Inode, size and modification time of a file; () if it does not exist."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


def open_files(source: ModelSource) -> SourceWeights:
    """The weight files of a base model, without its adapters.

    Raises:
        CheckpointError: one cannot be read.
    """
    with reading("the weights", source.base):
        folder = weights_folder(source.base, source.revision)
        found = _in_safetensors(folder) or _in_pickles(folder)
    if not quantization_options(source.base, load_base_config(source)):
        return SourceWeights(found, ())
    modules = {_module(name) for name, weight in found.items() if weight.dtype is None}
    packed = tuple(name for name in found if _module(name) in modules)
    rest = {name: x for name, x in found.items() if _module(name) not in modules}
    return SourceWeights(rest, packed)


def _in_safetensors(folder: Path) -> dict[str, FileWeight]:
    found: dict[str, FileWeight] = {}
    for path in weight_files(folder):
        file: Any = safe_open(path, "pt")
        state = _state(path)
        names = file.keys()
        for name in names:
            part = file.get_slice(name)
            kind = part.get_dtype()
            # F8_E4M3, BF16, U8, BOOL
            bits = int(next(iter(re.findall(r"\d+", kind)), "8"))
            num_bytes = math.prod(part.get_shape()) * bits // 8
            read = partial(_read_held, file, name, path, state)
            found[name] = FileWeight(read, num_bytes, DTYPES.get(kind))
    return found


def _in_pickles(folder: Path) -> dict[str, FileWeight]:
    found: dict[str, FileWeight] = {}
    for path in pickle_files(folder):
        for name, weight in load_pickle(path).items():
            if not isinstance(weight, Tensor):
                continue
            dtype = weight.dtype if weight.dtype in DTYPES.values() else None
            found[name] = FileWeight(weight.cpu, weight.nbytes, dtype)
    return found
