"""A training checkpoint as a folder: it is complete if and only if its manifest holds.

The manifest is written last. It lists every other file with its size and digests, and carries a
digest of itself, so a file that is missing, cut short or altered is found and named.
"""

import hashlib
import json
import os
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from fastpref.complete_files import complete_file
from fastpref.errors import CheckpointError, first_line

MANIFEST = "manifest.json"
FORMAT = 1
"""Of the manifest and of the files beside it; another `PIECE_BYTES` would be another format."""

PIECE_BYTES = 256 * 2**20
"""Files are digested in pieces of this size, so that threads share a large one."""
BLOCK_BYTES = 2**20
DIGEST_THREADS = 8
"""SHA-256 is about 2 GB/s a thread, and Python lets go of its lock meanwhile."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint."""

    num_bytes: int
    digests: tuple[str, ...]
    """SHA-256 of each `PIECE_BYTES` in turn."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """What a complete checkpoint consists of."""

    step: int
    """Optimizer steps done."""
    world_size: int
    """Ranks that wrote it."""
    metrics: dict[str, float]
    """Held-out metrics of these weights, for choosing the best."""
    files: dict[str, FileEntry]
    """By name; all but the manifest."""

    @property
    def num_bytes(self) -> int:
        return sum(entry.num_bytes for entry in self.files.values())


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """A complete checkpoint on disk."""

    folder: Path
    manifest: Manifest

    @property
    def step(self) -> int:
        return self.manifest.step


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Make a folder a complete checkpoint; its other files are on the disk already."""
    content = {
        "format": FORMAT,
        "step": manifest.step,
        "world_size": manifest.world_size,
        "metrics": manifest.metrics,
        "files": {
            name: {"bytes": entry.num_bytes, "sha256": list(entry.digests)}
            for name, entry in manifest.files.items()
        },
    }
    with complete_file(folder / MANIFEST) as file:
        json.dump({"content": content, "sha256": _digest_of_content(content)}, file, indent=1)


def read_manifest(folder: Path) -> Manifest:
    """A folder's manifest; of the files it lists nothing is looked at.

    Raises:
        CheckpointError: there is none, it is damaged, or of a later format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        content = manifest["content"]
        if manifest["sha256"] != _digest_of_content(content):
            raise CheckpointError(f"{MANIFEST} is damaged: its sha256 differs")
        if content["format"] != FORMAT:
            raise CheckpointError(f"{MANIFEST} has format {content['format']}, expected {FORMAT}")
        files = {
            name: FileEntry(entry["bytes"], tuple(entry["sha256"]))
            for name, entry in content["files"].items()
        }
        return Manifest(
            step=content["step"],
            world_size=content["world_size"],
            metrics=content["metrics"],
            files=files,
        )
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{MANIFEST} is missing") from error
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        reason = f"{type(error).__name__}: {first_line(error)}"
        raise CheckpointError(f"{MANIFEST} is unreadable: {reason}") from error


def check_files(folder: Path, manifest: Manifest, *, digests: bool = True) -> None:
    """Compare every file with the manifest.

    Args:
        folder: The checkpoint's.
        manifest: What `read_manifest` said.
        digests: Also read every byte; without it, sizes are compared.

    Raises:
        CheckpointError: naming each file that is missing, of another size or altered.
    """
    problems = []
    for name, entry in manifest.files.items():
        try:
            num_bytes = (folder / name).stat().st_size
        except OSError:
            problems.append(f"{name} is missing")
            continue
        if num_bytes != entry.num_bytes:
            word = "truncated" if num_bytes < entry.num_bytes else "too long"
            problems.append(f"{name} is {word}: {num_bytes:,} of {entry.num_bytes:,} bytes")
    if digests and not problems:
        found = digest_files(folder / name for name in manifest.files)
        problems = [
            f"{name} is altered: its sha256 differs"
            for name, entry in manifest.files.items()
            if found[name] != entry
        ]
    if problems:
        raise CheckpointError("; ".join(problems))


def digest_files(paths: Iterable[Path], piece_bytes: int = PIECE_BYTES) -> dict[str, FileEntry]:
    """Sizes and digests by file name, computed by several threads."""
    sizes = {path: path.stat().st_size for path in paths}
    pieces = [
        (path, start) for path, size in sizes.items() for start in range(0, size, piece_bytes)
    ]
    digests: dict[Path, list[str]] = {path: [] for path in sizes}
    with ThreadPoolExecutor(min(DIGEST_THREADS, os.cpu_count() or 1)) as threads:
        computed = [threads.submit(_digest_piece, *piece, piece_bytes) for piece in pieces]
        for (path, _), digest in zip(pieces, computed, strict=True):
            digests[path].append(digest.result())
    return {path.name: FileEntry(size, tuple(digests[path])) for path, size in sizes.items()}


def _digest_piece(path: Path, start: int, remaining: int) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        file.seek(start)
        while remaining and (block := file.read(min(BLOCK_BYTES, remaining))):
            digest.update(block)
            remaining -= len(block)
    return digest.hexdigest()


def _digest_of_content(content: dict[str, Any]) -> str:
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()
