"""Resolves options that name a model or a tokenizer: folders, runs, adapters, hub names."""

import json
import logging
import os
from collections.abc import Sequence
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, NamedTuple

from huggingface_hub import snapshot_download
from transformers.utils.peft_utils import find_adapter_config_file

from fastpref.checkpoint.folders import CHECKPOINTS, step_folders, step_of
from fastpref.checks import hint
from fastpref.config import ModelConfig
from fastpref.errors import CheckpointError, is_shortage

logger = logging.getLogger("fastpref")

EMBEDDED = "tiny"
"""The name of the model that ships with the package."""
EXPORT_FOLDER = "LATEST"
"""The folder of a run that holds the trained model in Hugging Face form."""
MERGED_FOLDER = f"{EXPORT_FOLDER}-merged"
"""The folder of a run that holds the trained adapter and its base as one model."""
CONFIG = "config.json"
ARCHIVE = "policy.pt"
"""The file of weights in a run folder of the seed repositories, or in its `LATEST/`."""
ADAPTER_CONFIG = "adapter_config.json"
"""The file that marks a folder as an adapter of peft."""
BASE_FIELD = "base_model_name_or_path"
TOKENIZER_FILES = (
    *("tokenizer*", "vocab*", "merges.txt", "added_tokens.json", "special_tokens_map.json"),
    *("*.model", "*.tiktoken", "tekken.json", "*.tokenizer", "bpe.codes"),
    *("byte_maps.json", "emoji.json", "normalizer.json", "tokenization_*.py"),
)
"""Patterns of the files that tokenizers read and write."""


def resolve_model(name_or_path: str, *, key: str = "model.name_or_path") -> str:
    """The folder (or hub name) that a model option means.

    Accepts the embedded model's name, a Hugging Face folder, a peft adapter folder, a run folder
    (its `LATEST/` is taken), `…/LATEST/policy.pt` of a run that wrote a folder instead, and hub
    names.

    Args:
        name_or_path: What the user wrote.
        key: The option it was written under, for the message.

    Raises:
        CheckpointError: it looks like a path and nothing usable lies there.
    """
    candidates = _folders(name_or_path)
    for folder in candidates:
        if _holds_model(folder):
            return _taken(folder, candidates, key)
    path = candidates[0]
    if path.is_dir():
        raise CheckpointError(
            f"{key}: {path} holds no model; expected config.json and weights in it or in its "
            f"{EXPORT_FOLDER}/, found {_listing(path)}{_what_it_is(path)}"
        )
    _refuse_a_path(name_or_path, path, key)
    return name_or_path


def resolve_tokenizer(
    name_or_path: str, *, key: str = "model.tokenizer_name_or_path", revision: str | None = None
) -> str:
    """The folder (or hub name) that a tokenizer is loaded from; no weights need to lie there.

    Args:
        name_or_path: All that `resolve_model` accepts, or a folder with a tokenizer alone. An
            adapter without a tokenizer of its own uses its base's.
        key: The option it was written under, for the message.

    Raises:
        CheckpointError: no tokenizer lies there.
    """
    candidates = _folders(name_or_path)
    for folder in candidates:
        if holds_tokenizer(folder):
            return _taken(folder, candidates, key)
    path = candidates[0]
    adapter = next((str(f) for f in candidates if (f / ADAPTER_CONFIG).is_file()), None)
    if adapter is None and path.is_dir():
        raise CheckpointError(
            f"{key}: {path} holds no tokenizer; expected tokenizer.json or tokenizer_config.json "
            f"in it or in its {EXPORT_FOLDER}/, found {_listing(path)}; "
            "model.tokenizer_name_or_path names one that lies elsewhere"
            f"{_link_to_nothing(path / EXPORT_FOLDER)}"
        )
    if adapter is None:
        _refuse_a_path(name_or_path, path, key)
    source = find_model(adapter or name_or_path, revision, key=key)
    with_their_own = [name for name in source.adapters if holds_tokenizer(Path(name))]
    if with_their_own:
        return with_their_own[-1]
    return resolve_tokenizer(source.base, key=key) if source.adapters else name_or_path


def holds_tokenizer(folder: Path) -> bool:
    """Whether a folder has files of a tokenizer."""
    return any(path.is_file() for path in matching_files(folder, TOKENIZER_FILES))


def matching_files(folder: Path, patterns: Sequence[str]) -> list[Path]:
    """Files of a folder whose name matches one of the patterns, sorted, each once."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file()}
    return sorted(found)


class ModelSource(NamedTuple):
    """A model on disk or the hub: base weights, and the adapters to merge into them."""

    name: str
    """Folder or hub name that the option names; an adapter's, if it names one."""
    base: str
    """Folder or hub name with config and weights."""
    revision: str | None
    """Revision of the base, on the hub."""
    adapters: tuple[str, ...]
    """Folders of peft adapters, in the order in which they are merged; empty for most models."""
    trust_remote_code: bool = False
    """Whether Python code in the base's folder may run."""


def named_model(model: ModelConfig, *, key: str = "model.name_or_path") -> ModelSource:
    """The model that `model.name_or_path` names, whatever its archive, see `find_model`."""
    return find_model(
        model.name_or_path, model.revision, key=key, trust_remote_code=model.trust_remote_code
    )


def archive_file(model: ModelConfig) -> Path | None:
    """The file that `model.archive` names; None if it names a folder, or is not set."""
    path = Path(os.path.expanduser(model.archive or ""))
    return path if path.is_file() else None


def archived_model(model: ModelConfig) -> ModelSource:
    """The model in the folder that `model.archive` names, see `find_archive`; not for a file."""
    assert model.archive is not None
    return find_archive(model.archive, trust_remote_code=model.trust_remote_code)


def find_archive(archive: str, *, trust_remote_code: bool) -> ModelSource:
    """The model in a folder with weights to start from, see `find_model`; hub names are refused.

    Raises:
        CheckpointError: as for `find_model`, or it is not a folder.
    """
    source = find_model(archive, key="model.archive", trust_remote_code=trust_remote_code)
    if not Path(source.name).is_dir():
        path = Path(os.path.expanduser(archive))
        raise CheckpointError(f"model.archive: no file or folder {path}{nearest_neighbour(path)}")
    return source


def find_model(
    name_or_path: str,
    revision: str | None = None,
    *,
    key: str = "model.name_or_path",
    trust_remote_code: bool = False,
) -> ModelSource:
    """Resolve a model option to the model's base and its adapters.

    Args:
        name_or_path: What the user wrote, see `resolve_model`.
        key: The option it was written under, for the message.
        trust_remote_code: Whether Python code in the base's folder may run.

    Raises:
        CheckpointError: nothing usable lies there, an adapter's config is damaged, or its base is
            not there.
    """
    asked = name = resolve_model(name_or_path, key=key)
    adapters: list[str] = []
    while True:
        folder = _adapter_folder(name, revision)
        if folder is None:
            ordered = tuple(reversed(adapters))
            return ModelSource(asked, name, revision, ordered, trust_remote_code)
        # the same folder has many names: A/../A
        if Path(folder).resolve() in map(Path.resolve, map(Path, adapters)):
            raise CheckpointError(f"model: {Path(folder) / ADAPTER_CONFIG} is its own {BASE_FIELD}")
        adapters.append(folder)
        name, revision = _base_of(Path(folder))


def _adapter_folder(name: str, revision: str | None) -> str | None:
    if Path(name).is_dir():
        return name if (Path(name) / ADAPTER_CONFIG).is_file() else None
    try:
        if find_adapter_config_file(name, revision=revision) is None:
            return None
        patterns = ["*.json", "*.jinja", "adapter_model.*", *TOKENIZER_FILES]
        return snapshot_download(name, revision=revision, allow_patterns=patterns)
    # no such repository, no network, no valid name: the load that follows reports it
    except (OSError, ValueError):
        return None


def _base_of(adapter: Path) -> tuple[str, str | None]:
    """Base and revision that an adapter names; a path is relative to the cwd or to the adapter."""
    fields = read_object(adapter / ADAPTER_CONFIG)
    name = fields.get(BASE_FIELD)
    if not isinstance(name, str) or not name:
        raise CheckpointError(
            f"model: {adapter / ADAPTER_CONFIG} must name the model that the adapter belongs to in "
            f"{BASE_FIELD}, got {name!r}"
        )
    if not Path(os.path.expanduser(name)).is_dir() and (adapter / name).is_dir():
        name = str(adapter / name)
    key = f"{BASE_FIELD} of {adapter / ADAPTER_CONFIG}"
    try:
        return resolve_model(name, key=key), fields.get("revision")
    except CheckpointError as error:
        raise CheckpointError(
            f"{error}; the adapter needs that model: write there where it lies now"
        ) from error


def local_folder(name: str, revision: str | None, patterns: Sequence[str]) -> Path:
    """A model's local folder; for a hub model, its cached snapshot with the matching files.

    Raises:
        OSError, ValueError: the hub has no such model, or does not answer.
    """
    if Path(name).is_dir():
        return Path(name)
    return Path(snapshot_download(name, revision=revision, allow_patterns=list(patterns)))


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        CheckpointError: it cannot be read, or holds something else.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    # UnicodeDecodeError and JSONDecodeError are ValueErrors
    except (OSError, ValueError) as error:
        if is_shortage(error):
            raise
        raise CheckpointError(f"model: {path} cannot be read as JSON: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"model: {path} must hold a JSON object, got {type(value).__name__}")
    return value


def nearest_neighbour(path: Path) -> str:
    """ "; nearest: X" with the sibling folder most similar to a missing one, "" without any."""
    if not path.parent.is_dir():
        return ""
    return hint(path.name, [child.name for child in path.parent.iterdir() if child.is_dir()])


def _folders(name_or_path: str) -> list[Path]:
    """Folders that a name may mean, the likeliest first."""
    here = Path(name_or_path)
    # a folder of that name may be about anything
    if name_or_path == EMBEDDED and not any(map(_holds_model, (here, here / EXPORT_FOLDER))):
        return [Path(str(files("fastpref") / "assets" / EMBEDDED))]
    path = Path(os.path.expanduser(name_or_path))
    if path.name == ARCHIVE and not path.exists():
        path = path.parent
    if path.exists():
        return [path, path / EXPORT_FOLDER]
    # the TIS-DPO README downloads to models/NAME and trains from models/ORGANISATION/NAME
    return [path, path.parent.parent / path.name]


def _holds_model(folder: Path) -> bool:
    return (folder / CONFIG).is_file() or (folder / ADAPTER_CONFIG).is_file()


def _taken(folder: Path, candidates: list[Path], key: str) -> str:
    if not candidates[0].exists():
        _say_taken(key, candidates[0], folder)
    return str(folder)


@cache
def _say_taken(key: str, asked: Path, taken: Path) -> None:
    """Warn once that another folder than the requested one is used."""
    logger.warning("%s: no folder %s, taking %s", key, asked, taken)


def _refuse_a_path(name: str, path: Path, key: str) -> None:
    if path.is_file():
        raise CheckpointError(f"{key}: {path} is a file, expected a folder{_what_it_is(path)}")
    # a hub name is NAME or ORGANISATION/NAME; if its first part is a local folder, a path is meant
    starts_like_one = name.startswith(("/", ".", "~")) or name.count("/") > 1
    if starts_like_one or ("/" in name and Path(name).parent.is_dir()):
        why = _link_to_nothing(path) or nearest_neighbour(path)
        raise CheckpointError(f"{key}: no folder {path}{why}")


def _link_to_nothing(path: Path) -> str:
    """A hint at a link whose target is missing, as of a recipe's run copied in part; else ""."""
    if not path.is_symlink() or path.exists():
        return ""
    return f"; {path} is a link to {path.readlink()}, which is not there"


def _listing(folder: Path) -> list[str]:
    return sorted(child.name for child in folder.iterdir())[:8]


def _what_it_is(path: Path) -> str:
    """A hint at what a folder or file is that is not a model, "" if nothing is known."""
    if link := _link_to_nothing(path / EXPORT_FOLDER):
        return link
    if path.suffix == ".gguf" or (path.is_dir() and any(path.glob("*.gguf"))):
        return "; GGUF files are quantized and cannot be trained, name the model they were made of"
    if path.suffix == ".pt":
        return "; weights of the seed repositories go to model.archive"
    archives = [f for f in (path / ARCHIVE, path / EXPORT_FOLDER / ARCHIVE) if f.is_file()]
    if archives:
        return (
            f"; weights of the seed repositories go by their file: set model.archive={archives[0]}"
        )
    inside = [f for f in path.iterdir() if _holds_model(f)] if path.is_dir() else []
    if inside:
        return f"; models lie in it, name one of them: {', '.join(sorted(map(str, inside))[:8])}"
    states = [path] if step_of(path) is not None else []
    states = states or [*step_folders(path / CHECKPOINTS), *step_folders(path)]
    if states:
        return (
            f"; {states[0]} is the state of a training: the command that wrote it goes on from it "
            "with resume=auto, or with that folder as resume, a new run_dir and n_examples of what "
            "it has seen, writes its model"
        )
    if path.is_dir() and holds_tokenizer(path):
        return "; it holds a tokenizer, which model.tokenizer_name_or_path names"
    return ""
