"""Whether files of weights fill their models, told by their headers before any weights are read."""

from collections.abc import Sequence
from pathlib import Path

import torch

from fastpref.config import ModelConfig
from fastpref.model.adapters.base import find_shared_base
from fastpref.model.adapters.folders import check_merging
from fastpref.model.files.full_weights import check_weights
from fastpref.model.files.paths import archived_model, named_model
from fastpref.model.source import build_meta


def check_files(model: ModelConfig, *, beside: bool = False) -> None:
    """Refuse files of weights that are incomplete or do not fill their model; of a hub model only
    adapters are checked.

    Args:
        model: Its options.
        beside: Its last adapter stands beside it; others are merged.

    Raises:
        CheckpointError: naming them.
    """
    source = named_model(model)
    if model.archive:
        if Path(model.archive).expanduser().is_file():
            return
        source = archived_model(model)
    if Path(source.base).is_dir():
        # an adapter may bring a vocabulary of its own
        own = source._replace(adapters=())
        check_weights(build_meta(own, dtype=torch.float32), Path(source.base))
    for i in range(len(source.adapters) - beside):
        adapted = source._replace(adapters=source.adapters[: i + 1])
        check_merging(build_meta(adapted, dtype=torch.float32), adapted.adapters[-1])


def check_scoring_files(models: Sequence[ModelConfig]) -> bool:
    """Refuse files of models that score, see `check_files`.

    Args:
        models: Options of each.

    Returns:
        Whether one base is in memory for all, with their adapters beside it.
    """
    is_shared = find_shared_base(models) is not None
    for model in models:
        check_files(model, beside=is_shared)
    return is_shared
