"""The dtypes of a model's weights in the files that they are loaded from."""

import math
import zipfile
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from fastpref.config import ModelConfig
from fastpref.model.files.archives import load_pickle, read_policy
from fastpref.model.files.configs import load_base_config
from fastpref.model.files.paths import archived_model, named_model
from fastpref.model.files.reading import reading
from fastpref.model.files.weight_files import stored_weights, weights_folder

DTYPES = {
    "F32": torch.float32,
    "BF16": torch.bfloat16,
    "F16": torch.float16,
}
"""Safetensors' names of the dtypes that weights are trained from; others are quantized."""


@dataclass(frozen=True, slots=True)
class LoadedDtypes:
    """Dtypes of a checkpoint's weights."""

    by_name: Mapping[str, torch.dtype]
    """By the weights' names in its files."""
    commonest: torch.dtype | None
    """Dtype of most elements; None if unknown."""


def loaded_dtypes(model: ModelConfig) -> LoadedDtypes:
    """Dtypes of the weights that a run starts from, below any adapters.

    Args:
        model: For `name_or_path`, `archive` and `revision`.

    Raises:
        CheckpointError: a file cannot be read.
    """
    if model.archive and Path(model.archive).expanduser().is_file():
        weights = read_policy(Path(model.archive).expanduser())
        return _summary({name: (x.dtype, x.numel()) for name, x in weights.items()})
    source = archived_model(model) if model.archive else named_model(model)
    with reading("the weights", source.base):
        files = weights_folder(source.base, source.revision)
        found = _summary(_in_safetensors(files) or _in_pickles(files))
    if found.commonest is None:
        return LoadedDtypes({}, getattr(load_base_config(source), "dtype", None))
    return found


def _in_safetensors(folder: Path) -> dict[str, tuple[torch.dtype, int]]:
    return {
        name: (dtype, math.prod(part.get_shape()))
        for name, part in stored_weights(folder)
        if (dtype := DTYPES.get(part.get_dtype())) is not None
    }


def _in_pickles(folder: Path) -> dict[str, tuple[torch.dtype, int]]:
    found: dict[str, tuple[torch.dtype, int]] = {}
    for path in filter(zipfile.is_zipfile, sorted(folder.glob("pytorch_model*.bin"))):
        weights = load_pickle(path)
        found |= {name: (x.dtype, x.numel()) for name, x in weights.items()}
    return found


def _summary(weights: Mapping[str, tuple[torch.dtype, int]]) -> LoadedDtypes:
    trainable = set(DTYPES.values())
    by_name = {name: dtype for name, (dtype, _) in weights.items() if dtype in trainable}
    sizes: Counter[torch.dtype] = Counter()
    for name, dtype in by_name.items():
        sizes[dtype] += weights[name][1]
    return LoadedDtypes(by_name, max(sizes, key=lambda dtype: sizes[dtype], default=None))
