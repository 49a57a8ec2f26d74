"""Finds the frozen base of trained adapters, and the adapter that training starts from."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import torch

from fastpref.config import ModelConfig
from fastpref.errors import CheckpointError, ConfigError
from fastpref.model.adapters.lora import check_beside
from fastpref.model.files.paths import ModelSource, archive_file, archived_model, named_model
from fastpref.model.source import build_meta


class AdapterBase(NamedTuple):
    """A model option, split into base and adapter."""

    source: ModelSource
    """The frozen base; its own adapters are merged."""
    start: str | None
    """Folder of the adapter to train on; None: new ones."""

    @property
    def name(self) -> str:
        """The base as an exported adapter names it: an absolute folder, or a hub name."""
        name = self.source.adapters[-1] if self.source.adapters else self.source.base
        return str(Path(name).resolve()) if Path(name).is_dir() else name


def find_adapter_base(model: ModelConfig) -> AdapterBase:
    """The frozen base of a run that trains adapters, and the adapter that it starts from.

    Args:
        model: For `name_or_path`, `revision` and `archive`: an archive is the base, or if it is an
            adapter folder, the adapter to train on.

    Raises:
        ConfigError: the archive is a single file, which no adapter could name as its base.
        CheckpointError: there is no such model.
    """
    source = named_model(model)
    if model.archive:
        if path := archive_file(model):
            raise ConfigError(
                f"model.archive: an adapter names the folder of the model that it belongs to, and "
                f"{path} is a file; train with adapter=none, or name a folder"
            )
        source = archived_model(model)
    if not source.adapters:
        return AdapterBase(source, None)
    return AdapterBase(source._replace(adapters=source.adapters[:-1]), source.adapters[-1])


def find_shared_base(models: Sequence[ModelConfig]) -> list[AdapterBase] | None:
    """Base and adapter of each model, if all can share one base in memory; else None."""
    if any(map(archive_file, models)):
        return None
    bases = [find_adapter_base(model) for model in models]
    first = bases[0].source
    if any((b.source.base, *b.source[2:]) != (first.base, *first[2:]) for b in bases):
        return None
    try:
        for base in bases:
            if base.start is not None:
                check_beside(build_meta(base.source, dtype=torch.float32), base.start)
    # one that has to be merged, if it can be used at all
    except CheckpointError:
        return None
    return bases
