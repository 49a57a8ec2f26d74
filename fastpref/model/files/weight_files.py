"""Finds the files of a checkpoint's folder that hold its weights."""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from safetensors import safe_open

from fastpref.model.files.paths import local_folder, matching_files, read_object

WHOLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
"""Maps weights to files, whatever these are called."""
PICKLE = "pytorch_model.bin"
PICKLES_INDEX = "pytorch_model.bin.index.json"
_SHARDS = "model-*-of-*.safetensors"


def weights_folder(name: str, revision: str | None) -> Path:
    """A model's local folder; for a hub model, its cached snapshot with its files of weights.

    Raises:
        OSError, ValueError: the hub has no such model, or does not answer.
    """
    folder = local_folder(name, revision, (WHOLE, INDEX))
    if Path(name).is_dir() or (folder / WHOLE).is_file():
        return folder
    return local_folder(name, revision, _indexed(folder) or (WHOLE, _SHARDS))


def weight_files(folder: Path) -> list[Path]:
    """The safetensors files that transformers loads from a folder: the single file, or those of the
    index, but not variants such as model.fp16.safetensors.

    Raises:
        CheckpointError: the index cannot be read.
    """
    if (folder / WHOLE).is_file():
        return [folder / WHOLE]
    names = _indexed(folder)
    if names:
        return [folder / name for name in names if (folder / name).is_file()]
    return matching_files(folder, (_SHARDS,))


def pickle_files(folder: Path) -> list[Path]:
    """Pickles that transformers loads from a folder without safetensors: one file or its shards."""
    whole = folder / PICKLE
    return [whole] if whole.is_file() else matching_files(folder, ("pytorch_model-*.bin",))


def stored_weights(folder: Path) -> Iterator[tuple[str, Any]]:
    """Names of the weights in `weight_files`, each with an unread slice for its shape and dtype."""
    for path in weight_files(folder):
        with safe_open(path, "pt") as file:
            names = file.keys()
            for name in names:
                yield name, file.get_slice(name)


def _indexed(folder: Path) -> Sequence[str]:
    """The files that an index names; none without an index."""
    if not (folder / INDEX).is_file():
        return ()
    weight_map = read_object(folder / INDEX).get("weight_map")
    # a damaged one is refused where the model is loaded
    files = weight_map.values() if isinstance(weight_map, dict) else ()
    return sorted({name for name in files if isinstance(name, str)})
