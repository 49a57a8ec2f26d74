"""The dtypes of a model's weights in the files that they are loaded from."""

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from fastpref.config import ModelConfig
from fastpref.model.files.archives import read_policy
from fastpref.model.files.configs import load_base_config
from fastpref.model.files.paths import archive_file, archived_model, named_model
from fastpref.model.files.source_weights import DTYPES, open_files


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
    if path := archive_file(model):
        weights = {name: (x.dtype, x.numel()) for name, x in read_policy(path).items()}
        return _summary({k: v for k, v in weights.items() if v[0] in DTYPES.values()})
    source = archived_model(model) if model.archive else named_model(model)
    files = open_files(source).weights.items()
    found = _summary({k: (x.dtype, x.num_bytes // x.dtype.itemsize) for k, x in files if x.dtype})
    if found.commonest is None:
        return LoadedDtypes({}, getattr(load_base_config(source), "dtype", None))
    return found


def _summary(weights: Mapping[str, tuple[torch.dtype, int]]) -> LoadedDtypes:
    sizes: Counter[torch.dtype] = Counter()
    for dtype, size in weights.values():
        sizes[dtype] += size
    by_name = {name: dtype for name, (dtype, _) in weights.items()}
    return LoadedDtypes(by_name, max(sizes, key=lambda dtype: sizes[dtype], default=None))
