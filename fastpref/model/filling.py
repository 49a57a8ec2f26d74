"""Checks that weight files fit their models, by their headers, before any weights are read."""

from collections.abc import Sequence
from pathlib import Path

import torch

from fastpref.config import ModelConfig
from fastpref.model.adapters.base import find_shared_base
from fastpref.model.adapters.folders import check_merging
from fastpref.model.files.full_weights import NO_FIT, check_fit, check_weights
from fastpref.model.files.paths import ModelSource, archive_file, archived_model, named_model
from fastpref.model.source import archived_shapes, build_meta


def check_files(model: ModelConfig, *, beside: bool = False) -> None:
    """Refuse files of weights that are incomplete or do not fill their model; of a hub model only
    adapters are checked.

    Args:
        model: Model options.
        beside: Whether the last adapter stays beside the base; all others are merged.

    Raises:
        CheckpointError: naming what is missing or has another shape.
    """
    if not model.archive:
        _check_folder(named_model(model), beside=beside)
        return
    if not archive_file(model):
        _check_folder(archived_model(model), beside=beside)
    filled = build_meta(named_model(model), dtype=torch.float32)
    shapes = archived_shapes(model)
    check_fit(filled, shapes, f"model.archive: {model.archive}", opening=NO_FIT)


def _check_folder(source: ModelSource, *, beside: bool) -> None:
    if Path(source.base).is_dir():
        # an adapter may bring a vocabulary of its own
        own = source._replace(adapters=())
        check_weights(build_meta(own, dtype=torch.float32), Path(source.base))
    for i in range(len(source.adapters) - beside):
        adapted = source._replace(adapters=source.adapters[: i + 1])
        check_merging(build_meta(adapted, dtype=torch.float32), adapted.adapters[-1])


def check_scoring_files(models: Sequence[ModelConfig]) -> bool:
    """Refuse the files of models that only score, see `check_files`.

    Args:
        models: Options of each.

    Returns:
        Whether all share one base in memory, with their adapters beside it.
    """
    is_shared = find_shared_base(models) is not None
    for model in models:
        check_files(model, beside=is_shared)
    return is_shared
