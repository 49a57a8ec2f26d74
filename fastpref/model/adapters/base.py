"""What adapters are trained beside: the frozen model, and the adapter that training starts from."""

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from fastpref.config import ModelConfig
from fastpref.errors import CheckpointError, ConfigError
from fastpref.model.adapters.given import given_config
from fastpref.model.files.paths import ModelSource, archived_model, named_model


class AdapterBase(NamedTuple):
    """A model option, taken apart."""

    source: ModelSource
    """The frozen model; adapters of it are merged."""
    start: str | None
    """Folder of the adapter to train on; None: new ones."""

    @property
    def name(self) -> str:
        """What an exported adapter says that it belongs to: an absolute folder, or a hub name."""
        name = self.source.adapters[-1] if self.source.adapters else self.source.base
        return str(Path(name).resolve()) if Path(name).is_dir() else name


def find_adapter_base(model: ModelConfig) -> AdapterBase:
    """The frozen model of a run that trains adapters, and where they start.

    Args:
        model: For `name_or_path`, `revision` and `archive`: weights of an archive are the frozen
            ones, or where it is an adapter folder, it is trained on.

    Raises:
        ConfigError: the archive is a single file, which no adapter could name as its base.
        CheckpointError: there is no such model.
    """
    source = named_model(model)
    if model.archive:
        path = Path(model.archive).expanduser()
        if path.is_file():
            raise ConfigError(
                f"model.archive: an adapter names the folder of the model that it belongs to, and "
                f"{path} is a file; train with adapter=none, or name a folder"
            )
        source = archived_model(model)
    if not source.adapters:
        return AdapterBase(source, None)
    return AdapterBase(source._replace(adapters=source.adapters[:-1]), source.adapters[-1])


def find_shared_base(models: Sequence[ModelConfig]) -> list[AdapterBase] | None:
    """Base and adapter of each model, if all of them can stand on one base in memory."""
    if any(model.archive and Path(model.archive).expanduser().is_file() for model in models):
        return None
    bases = [find_adapter_base(model) for model in models]
    first = bases[0].source
    if any((b.source.base, *b.source[2:]) != (first.base, *first[2:]) for b in bases):
        return None
    try:
        for base in bases:
            if base.start is not None:
                given_config(base.start)
    # of a kind that has to be merged
    except CheckpointError:
        return None
    return bases
