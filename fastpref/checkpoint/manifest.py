"""The manifest of a checkpoint folder, which is complete if and only if its files match it.

The manifest is written last. It lists every other file with its size and digest, and carries a
digest of itself, so a file that is missing, truncated or altered is found and named.
"""

import json
from collections.abc import Collection
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import xxhash

from fastpref.complete_files import complete_file
from fastpref.errors import CheckpointError, in_a_line, is_shortage

MANIFEST = "manifest.json"
FORMAT = 1
"""Format version of the manifest and of the other files."""

BLOCK_BYTES = 2**20
READERS = 8
"""Number of files read in parallel; digests cost little, as XXH3 runs at memory bandwidth."""


@dataclass(frozen=True, slots=True)
class FileEntry:
    """One file of a checkpoint."""

    num_bytes: int
    digest: str
    """XXH3, 128 bits in hexadecimal digits: detects accidental damage, not tampering."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Manifest:
    """Contents of a complete checkpoint."""

    step: int
    """Optimizer steps completed."""
    world_size: int
    """Number of ranks that wrote it."""
    metrics: dict[str, float]
    """Held-out metrics of these weights, for choosing the best."""
    files: dict[str, FileEntry]
    """All files except the manifest, by name."""

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
    """Write the manifest, which makes the folder complete; its other files must be on disk."""
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
    """Add metrics to the manifest of a complete checkpoint.

    Raises:
        CheckpointError: its manifest cannot be read or written.
    """
    manifest = read_manifest(folder)
    if manifest.metrics | metrics != manifest.metrics:
        write_manifest(folder, replace(manifest, metrics=manifest.metrics | metrics))


def read_manifest(folder: Path) -> Manifest:
    """Read a folder's manifest, without checking the files it lists.

    Raises:
        CheckpointError: there is none, it is damaged, or of another format.
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
        if is_shortage(error):
            raise
        raise CheckpointError(f"{MANIFEST} is unreadable: {in_a_line(error)}") from error


def check_files(folder: Path, manifest: Manifest, *, digests: bool = True) -> None:
    """Compare every file with the manifest.

    Args:
        folder: The checkpoint's folder.
        manifest: Returned by `read_manifest`.
        digests: Also read every byte and compare digests; False: compare sizes only.

    Raises:
        CheckpointError: naming each file that is missing, of another size or altered.
    """
    problems = []
    for name, entry in manifest.files.items():
        try:
            num_bytes = (folder / name).stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            problems.append(f"{name} is missing")
            continue
        except OSError as error:
            problems.append(_unreadable(name, error))
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


def digest_files(paths: Collection[Path]) -> dict[str, FileEntry]:
    """Sizes and digests of existing files, by file name."""
    with ThreadPoolExecutor(READERS) as threads:
        return {
            path.name: entry for path, entry in zip(paths, threads.map(_digest, paths), strict=True)
        }


def _difference(path: Path, entry: FileEntry) -> str:
    """How a file differs from its entry in the manifest; "" if it does not."""
    try:
        return "" if _digest(path) == entry else f"{path.name} is altered: its digest differs"
    except OSError as error:
        return _unreadable(path.name, error)


def _unreadable(name: str, error: OSError) -> str:
    """The problem with a file that the system does not give; lack of memory or file descriptors is
    raised, as it is a limit of this process and no damage on the disk."""
    if is_shortage(error):
        raise error
    return f"{name} cannot be read: {error.strerror}"


def _digest(path: Path) -> FileEntry:
    digest, num_bytes = xxhash.xxh3_128(), 0
    with path.open("rb") as file:
        while block := file.read(BLOCK_BYTES):
            digest.update(block)
            num_bytes += len(block)
    return FileEntry(num_bytes, digest.hexdigest())


def _digest_of_content(content: dict[str, Any]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(content, sort_keys=True).encode())
