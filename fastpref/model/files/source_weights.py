"""The weights of a checkpoint as its files have them: under which names, and what nobody trains.

A model has other names in memory than its files (transformers renames and joins weights while it
loads them), and files hold weights that no model here has: towers of a wrapper that text does not
go through, heads for several tokens at once. An export of the model puts its weights under the
files' names and takes the others from the files, bit by bit.
"""

import math
import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
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
from fastpref.model.files.loaded_dtypes import DTYPES
from fastpref.model.files.paths import (
    ModelSource,
    archived_model,
    named_model,
)
from fastpref.model.files.reading import reading
from fastpref.model.files.weight_files import weight_files, weights_folder


class FileWeight(NamedTuple):
    """A tensor of a file that is held open: read when it is asked for, though the file may have
    been deleted by then."""

    file: Any
    """Has `get_tensor`."""
    name: str
    num_bytes: int
    dtype: torch.dtype | None
    """None: none that weights are trained from."""

    def read(self) -> Tensor:
        """The tensor, on the CPU."""
        return self.file.get_tensor(self.name)


class SourceWeights(NamedTuple):
    """What the files of a checkpoint hold."""

    weights: dict[str, FileWeight]
    """By their names there."""
    packed: tuple[str, ...]
    """Names of what belongs to weights of few bits, which an export without them cannot have."""


class Arranged(NamedTuple):
    """A model's weights and all else of its source, by the names of the source's files."""

    own: dict[str, Tensor]
    untouched: dict[str, FileWeight]
    """What the model does not have, or has no use for."""
    left_out: list[str]
    """Weights of few bits that the model does not have."""


def open_weights(model: ModelConfig, *, wrapper: bool) -> SourceWeights:
    """The files that a run's weights come from: of an archive that is a folder, unless they hold
    less than the model's own.

    Args:
        model: For `name_or_path`, `revision` and `archive`.
        wrapper: There is more of the model than is loaded.

    Raises:
        CheckpointError: a file cannot be read, or where weights that are not loaded lie is not
            known.
    """
    own = named_model(model)
    sources = [own]
    if model.archive and Path(model.archive).expanduser().is_file():
        # its weights are those of the whole model, and its own are not looked for
        sources = [own] if wrapper else []
    elif model.archive:
        sources.insert(0, archived_model(model))
    # the first one among equals; weights of few bits are no weights to train
    found = max(map(_open, sources), key=_num_weights, default=SourceWeights({}, ()))
    if wrapper and not found.weights:
        raise CheckpointError(
            f"model: {own.base} is more than its text part, and none of its files of weights is "
            "known, so the rest of it cannot be exported"
        )
    return found


def _num_weights(source: SourceWeights) -> int:
    return sum(weight.dtype is not None for weight in source.weights.values())


def arrange(model: Any, weights: Mapping[str, Tensor], source: SourceWeights) -> Arranged:
    """Give a model's weights the names of its source, and find what the source has beside them.

    Args:
        model: For its names and conversions.
        weights: By its names; of those that are tied the first ones.
        source: Of the model.
    """
    own = revert_weight_conversion(model, dict(weights))
    find_place = _place_finder(model)
    places = {name: find_place(name) for name in source.weights}
    given = {
        name: place
        for name, (place, alone) in places.items()
        if alone and place is not None and place in weights and name not in own
    }
    renamed = set(given.values())
    # what the files have under another name, and not under this one as well
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
    """Of most bytes, None of none that weights are trained from."""
    sizes: Counter[torch.dtype] = Counter()
    for weight in weights.values():
        if weight.dtype is not None:
            sizes[weight.dtype] += weight.num_bytes
    return max(sizes, key=lambda dtype: sizes[dtype], default=None)


def group_names(names: Iterable[str], others: Iterable[str]) -> dict[str, list[str]]:
    """Names by the outermost module that has none of the others."""
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
    """Of every name of a model's tensors the first name of the same one."""
    firsts: dict[Any, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        firsts.setdefault(parameter, name)
    same = {name: firsts[x] for name, x in model.named_parameters(remove_duplicate=False)}
    return {name: same.get(name, name) for name in model.state_dict()}


def _place_finder(model: Any) -> Callable[[str], tuple[str | None, bool]]:
    """Which tensor of a model a name of a file means, None if none, and whether what lies there is
    all of that tensor; as transformers finds it when it loads."""
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


class _Held:
    """A safetensors file that stays open: what replaces it, or deletes it, changes nothing here."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file: Any = safe_open(path, "pt")
        self._state = _state(path)

    def keys(self) -> list[str]:
        return list(self._file.keys())

    def get_slice(self, name: str) -> Any:
        return self._file.get_slice(name)

    def get_tensor(self, name: str) -> Tensor:
        """A tensor of it.

        Raises:
            CheckpointError: the file itself was written to, so that it may not be read any more.
        """
        now = _state(self._path)
        # another file under that name has another number
        if now and now[0] == self._state[0] and now != self._state:
            raise CheckpointError(
                f"model: {self._path} was written to while a run used it, so what is not trained "
                "of it cannot be exported; the trained weights are in the last checkpoint: put the "
                "file back and go on with resume=auto"
            )
        return self._file.get_tensor(name)


def _state(path: Path) -> tuple[int, ...]:
    """Number, size and time of a file; () where there is none."""
    try:
        found = path.stat()
    except OSError:
        return ()
    return found.st_ino, found.st_size, found.st_mtime_ns


class _Pickled:
    """A file that `torch.save` wrote, as safetensors' handles are."""

    def __init__(self, weights: dict[str, Tensor]) -> None:
        self._weights = weights

    def get_tensor(self, name: str) -> Tensor:
        return self._weights[name]


def _open(source: ModelSource) -> SourceWeights:
    with reading("the weights", source.base):
        folder = weights_folder(source.base, source.revision)
        found = _in_safetensors(folder) or _in_pickles(folder)
    if not quantization_options(source.base, load_base_config(source)):
        return SourceWeights(found, ())
    modules = {_module(name) for name, weight in found.items() if weight.dtype is None}
    packed = tuple(name for name in found if _module(name) in modules)
    return SourceWeights({name: x for name, x in found.items() if name not in packed}, packed)


def _in_safetensors(folder: Path) -> dict[str, FileWeight]:
    found: dict[str, FileWeight] = {}
    for path in weight_files(folder):
        file: Any = _Held(path)
        for name in file.keys():  # noqa: SIM118 its handles have keys and are no mappings
            part = file.get_slice(name)
            kind = part.get_dtype()
            # F8_E4M3, BF16, U8, BOOL
            bits = int(next(iter(re.findall(r"\d+", kind)), "8"))
            num_bytes = math.prod(part.get_shape()) * bits // 8
            found[name] = FileWeight(file, name, num_bytes, DTYPES.get(kind))
    return found


def _in_pickles(folder: Path) -> dict[str, FileWeight]:
    found: dict[str, FileWeight] = {}
    for path in sorted(folder.glob("pytorch_model*.bin")):
        weights = load_pickle(path)
        file = _Pickled(weights)
        for name, weight in weights.items():
            dtype = weight.dtype if weight.dtype in DTYPES.values() else None
            found[name] = FileWeight(file, name, weight.nbytes, dtype)
    return found
