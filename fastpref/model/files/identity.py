"""Identity of a model's weights: a digest of its files, or its hub commit."""

import hashlib
import os
from dataclasses import replace
from pathlib import Path

from fastpref.config import ModelConfig
from fastpref.model.files.configs import load_base_config
from fastpref.model.files.paths import ModelSource, archive_file, archived_model, named_model
from fastpref.model.files.reading import reading

WEIGHT_SUFFIXES = (".safetensors", ".bin", ".pt")
CONFIG_FILES = ("config.json", "adapter_config.json")


def model_identity(model: ModelConfig) -> str:
    """Digest of all that a model's log-probabilities depend on, arithmetic aside.

    A folder is identified by the content of its weights and config, and of its Python code if that
    may run, so a copy elsewhere is the same model and a retrained folder another one; a hub model
    is identified by its commit. Reads every byte: about a second per gigabyte.

    Args:
        model: For `name_or_path`, `archive` and `revision`.

    Returns:
        64 hexadecimal digits.

    Raises:
        CheckpointError: no such model.
    """
    digest = hashlib.sha256()
    _add_model(digest, named_model(model))
    if path := archive_file(model):
        _add_files(digest, [path])
    elif model.archive:
        _add_model(digest, archived_model(model))
    return digest.hexdigest()


def _add_model(digest: "hashlib._Hash", source: ModelSource) -> None:
    if not Path(source.base).is_dir():
        commit = load_base_config(source)._commit_hash
        digest.update(f"{source.base}@{commit}".encode())
    suffixes = (*WEIGHT_SUFFIXES, ".py") if source.trust_remote_code else WEIGHT_SUFFIXES
    for folder in filter(Path.is_dir, map(Path, (source.base, *source.adapters))):
        paths = sorted(folder.iterdir())
        _add_files(digest, [x for x in paths if x.suffix in suffixes or x.name in CONFIG_FILES])


def _add_files(digest: "hashlib._Hash", paths: list[Path]) -> None:
    for path in paths:
        with reading(path.name, str(path.parent)), path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").digest()
        digest.update(path.name.encode() + content)


def side_model(model: ModelConfig, reference: str) -> ModelConfig:
    """The model that `weights.positive` or `weights.negative` names.

    Args:
        model: The run's model options: precision, attention, and the architecture of a `policy.pt`.
        reference: A name or folder, or a seed-format `policy.pt`.
    """
    if Path(os.path.expanduser(reference)).is_file():
        return replace(model, archive=reference)
    # the revision is a commit of the run's own model
    revision = model.revision if reference == model.name_or_path else None
    return replace(model, name_or_path=reference, archive=None, revision=revision)
