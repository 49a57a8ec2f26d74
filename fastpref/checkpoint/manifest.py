"""A training checkpoint as a folder: it is complete if and only if its manifest holds.

The manifest is written last. It lists every other file with its size and digests, and carries a
digest of itself, so a file that is missing, cut short or altered is found and named.
"""

import errno
import json
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from fastpref.complete_files import complete_file
from fastpref.errors import CheckpointError, first_line

MANIFEST = "manifest.json"
FORMAT = 1
"""Of the manifest and of the files beside it."""

BLOCK_BYTES = 2**20
READERS = 8
"""Files read at a time: one digest takes bytes as fast as memory has them."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint."""

    num_bytes: int
    digest: str
    """XXH3, 128 bits in hexadecimal digits: against chance, not against malice."""


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
            name: {"bytes": entry.num_bytes, "xxh3": entry.digest}
            for name, entry in manifest.files.items()
        },
    }
    with complete_file(folder / MANIFEST) as file:
        json.dump({"content": content, "xxh3": _digest_of_content(content)}, file, indent=1)


def add_metrics(folder: Path, metrics: dict[str, float]) -> None:
    """Add to a complete checkpoint what was measured of its weights afterwards.

    Raises:
        CheckpointError: its manifest cannot be read or written.
    """
    manifest = read_manifest(folder)
    if manifest.metrics | metrics != manifest.metrics:
        write_manifest(folder, replace(manifest, metrics=manifest.metrics | metrics))


def read_manifest(folder: Path) -> Manifest:
    """A folder's manifest; of the files it lists nothing is looked at.

    Raises:
        CheckpointError: there is none, it is damaged, or of a later format.
    """
    try:
        manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
        content = manifest["content"]
        if manifest["xxh3"] != _digest_of_content(content):
            raise CheckpointError(f"{MANIFEST} is damaged: its digest differs")
        if content["format"] != FORMAT:
            raise CheckpointError(f"{MANIFEST} has format {content['format']}, expected {FORMAT}")
        files = {
            name: FileEntry(entry["bytes"], entry["xxh3"])
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
        paths = [folder / name for name in manifest.files]
        with ThreadPoolExecutor(READERS) as threads:
            compared = threads.map(_difference, paths, manifest.files.values())
            problems = [problem for problem in compared if problem]
    if problems:
        raise CheckpointError("; ".join(problems))


def digest_files(paths: Iterable[Path]) -> dict[str, FileEntry]:
    """Sizes and digests of files that are there, by their names."""
    paths = list(paths)
    with ThreadPoolExecutor(READERS) as threads:
        return {
            path.name: entry for path, entry in zip(paths, threads.map(_digest, paths), strict=True)
        }


def _difference(path: Path, entry: FileEntry) -> str:
    """How a file's bytes differ from what the manifest says, "" if they do not."""
    try:
        return "" if _digest(path) == entry else f"{path.name} is altered: its digest differs"
    except OSError as error:
        if error.errno in (errno.EMFILE, errno.ENFILE):
            # of this process, not of the disk
            raise
        return f"{path.name} cannot be read: {error.strerror}"


def _digest(path: Path) -> FileEntry:
    digest, num_bytes = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            num_bytes += len(block)
    return FileEntry(num_bytes, digest.hexdigest())


def _digest_of_content(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
