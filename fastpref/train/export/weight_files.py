"""Weights as safetensors files: a single one, or several with an index."""

import json
from collections.abc import Mapping
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor

from fastpref.model.files.source_weights import FileWeight

INDEX = "model.safetensors.index.json"
MOST_BYTES = 50 * 10**9
"""Largest size of one file, as the hub accepts it and transformers writes it."""


def write_weights(
    folder: Path, weights: Mapping[str, Tensor | FileWeight], *, most_bytes: int = MOST_BYTES
) -> None:
    """Write `model.safetensors`, or several numbered files and their index.

    Args:
        folder: Where to write.
        weights: By name; weights in other files are read only when their output file is written.
        most_bytes: Largest size of one file, unless a single weight is larger.
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
    """Write one safetensors file, with the permissions of its folder.

    Args:
        weights: By name.
        path: The file, in a folder that this process created.
    """
    save_file(_apart(weights), path, metadata={"format": "pt"})
    # safetensors 0.8 makes it readable by its owner only; the folder's mode follows the umask
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
    """Contiguous tensors that share no memory, as safetensors requires: tied ones are cloned."""
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
