"""Weights as safetensors files: in one, or in several with an index of what lies where."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fastpref.model.files.source_weights import FileWeight

INDEX = "model.safetensors.index.json"
MOST_BYTES = 50 * 10**9
"""Of a file: what the hub takes, and what transformers writes."""


def write_weights(
    folder: Path, weights: Mapping[str, Tensor | FileWeight], *, most_bytes: int = MOST_BYTES
) -> None:
    """Write `model.safetensors`, or files of it and their index.

    Args:
        folder: To write to.
        weights: By their names; those of other files are read one after another.
        most_bytes: Of one file, where no single weight has more.
    """
    shards = _divide({name: _num_bytes(x) for name, x in weights.items()}, most_bytes)
    names = ["model.safetensors"]
    if len(shards) > 1:
        names = [f"model-{i + 1:05}-of-{len(shards):05}.safetensors" for i in range(len(shards))]
    for name, shard in zip(names, shards, strict=True):
        write_safetensors({key: _tensor(weights[key]) for key in shard}, folder / name)
    if len(shards) > 1:
        weight_map = {key: name for name, shard in zip(names, shards, strict=True) for key in shard}
        total = sum(map(_num_bytes, weights.values()))
        index = {"metadata": {"total_size": total}, "weight_map": weight_map}
        (folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def write_safetensors(weights: Mapping[str, Tensor], path: Path) -> None:
    """Write one file, with the permissions that its folder has.

    Args:
        weights: By their names.
        path: Of the file, in a folder that this process made.
    """
    save_file(_apart(weights), path, metadata={"format": "pt"})
    # safetensors 0.8 leaves it to its owner alone; the folder has what the umask says
    path.chmod(path.parent.stat().st_mode & 0o666)


def _divide(sizes: Mapping[str, int], most_bytes: int) -> list[list[str]]:
    shards: list[list[str]] = [[]]
    filled = 0
    for name, size in sizes.items():
        if shards[-1] and filled + size > most_bytes:
            shards.append([])
            filled = 0
        shards[-1].append(name)
        filled += size
    return shards


def _apart(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors that share no memory, which safetensors asks for: tied ones may have two names."""
    seen: set[int] = set()
    apart = {}
    for name, weight in weights.items():
        contiguous = weight.contiguous()
        where = contiguous.untyped_storage().data_ptr()
        apart[name] = contiguous.clone() if where in seen else contiguous
        seen.add(where)
    return apart


def _tensor(weight: Tensor | FileWeight) -> Tensor:
    return weight if isinstance(weight, Tensor) else weight.read()


def _num_bytes(weight: Tensor | FileWeight) -> int:
    return weight.nbytes if isinstance(weight, Tensor) else weight.num_bytes
