"""Writing one checkpoint, by all ranks: its folder gets its name only once it is complete."""

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from io import IOBase
from pathlib import Path

from torch import Tensor
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystem, FileSystemWriter
from torch.distributed.checkpoint.metadata import MetadataIndex
from torch.distributed.checkpoint.state_dict_saver import save

from fastpref.checkpoint.agreement import AgreedError, Agreement
from fastpref.checkpoint.direct import DirectFile
from fastpref.checkpoint.folders import LATEST, MARK, PARTIAL, folder_name, set_aside
from fastpref.checkpoint.manifest import (
    Checkpoint,
    FileEntry,
    Manifest,
    digest_files,
    write_manifest,
)
from fastpref.checkpoint.restore import is_of_shortage, reasons_of
from fastpref.checkpoint.size import free_bytes
from fastpref.checkpoint.snapshot import Snapshot
from fastpref.complete_files import complete_file, sync, writing
from fastpref.errors import CheckpointError, WritingMemoryError

logger = logging.getLogger("fastpref")

STATE = "state.json"
"""File with the caller's record, and the state of optimizer and schedule that is no tensor."""


def write_checkpoint(folder: Path, snapshot: Snapshot, agreement: Agreement) -> Checkpoint:
    """Write a snapshot as `<folder>/step-NNNNNNNN`; every rank calls this.

    Args:
        folder: `<run_dir>/checkpoints`; created if the run folder exists.
        snapshot: This rank's.
        agreement: Connects the ranks.

    Raises:
        CheckpointError: on every rank, if it could not be written; what was written is removed, or
            else a warning names it.
    """
    partial = folder / (folder_name(snapshot.step) + PARTIAL)
    is_main = agreement.rank == 0
    try:
        num_bytes = sum(agreement.each(snapshot.num_bytes))
        agreement.each(lambda: _prepare(partial, num_bytes) if is_main else None)
        # DirectFile syncs each file when it is closed
        storage = FileSystemWriter(partial, sync_files=False)
        if not any(part.is_cuda for part in snapshot.local_parts.values()):
            # else DCP synchronizes with the GPU for every tensor, and waits for training's kernels
            storage.per_thread_copy_ahead = 0
        storage.fs = files = _DirectFiles()
        save(
            snapshot.state.tensors,
            storage_writer=storage,
            planner=_LocalPlanner(snapshot.local_parts),
            process_group=agreement.group,
            no_dist=agreement.is_alone,
        )
        written = agreement.each(
            lambda: files.entries | _write_own_files(partial, snapshot, agreement.rank)
        )
        manifest = Manifest(
            step=snapshot.step,
            world_size=agreement.size,
            metrics=snapshot.metrics,
            files={name: entry for entries in written for name, entry in entries.items()},
        )
        agreement.each(lambda: _publish(partial, manifest) if is_main else None)
    except (AgreedError, CheckpointException, RuntimeError) as error:
        reason = reasons_of(error, agreement.size)
        if is_main:
            shutil.rmtree(partial, ignore_errors=True)
            if partial.exists():
                logger.warning("%s could not be removed", partial)
        kind = WritingMemoryError if is_of_shortage(error) else CheckpointError
        raise kind(f"step {snapshot.step} was not saved: {reason}") from error
    return Checkpoint(folder / folder_name(snapshot.step), manifest)


class _DirectFiles(FileSystem):
    """DCP's file system: writes by direct I/O, and records each file's size and digest."""

    def __init__(self) -> None:
        self.entries: dict[str, FileEntry] = {}

    @contextmanager
    def create_stream(self, path: str | os.PathLike[str], mode: str) -> Iterator[IOBase]:
        path = Path(path)
        with DirectFile(path) as file:
            yield file
        self.entries[path.name] = FileEntry(file.num_bytes, file.digest())

    def rename(self, path: str | os.PathLike[str], new_path: str | os.PathLike[str]) -> None:
        super().rename(path, new_path)
        self.entries[Path(new_path).name] = self.entries.pop(Path(path).name)


class _LocalPlanner(DefaultSavePlanner):
    """Plans a save by the DTensors, but writes the bytes of `parts`.

    Args:
        parts: Their local shards or copies of these, by tensor name.
    """

    def __init__(self, parts: dict[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = parts

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.parts[index.fqn]


def _prepare(partial: Path, num_bytes: int) -> None:
    """Create an empty folder to write to.

    Raises:
        CheckpointError: fewer than `num_bytes` are free.
    """
    partial.parent.mkdir(exist_ok=True)
    if partial.exists():
        shutil.rmtree(partial)
    free = free_bytes(partial.parent)
    if num_bytes > free:
        raise CheckpointError(
            f"{partial.parent} has {free / 2**30:.2f} GiB free, "
            f"a checkpoint takes {num_bytes / 2**30:.2f} GiB"
        )
    partial.mkdir()


def _write_own_files(partial: Path, snapshot: Snapshot, rank: int) -> dict[str, FileEntry]:
    """Write this rank's files other than those of tensors: random states, on rank 0 `STATE`."""
    own = {partial / random_states_file(rank): snapshot.random_states}
    if rank == 0:
        own[partial / STATE] = {"record": snapshot.record, **snapshot.state.description}
    for path, content in own.items():
        with complete_file(path) as file:
            json.dump(content, file)
    return digest_files(own)


def _publish(partial: Path, manifest: Manifest) -> None:
    """Write the manifest, then rename the folder to its final name."""
    found = {path.name for path in partial.iterdir()}
    if found != manifest.files.keys():
        differing = ", ".join(sorted(found ^ manifest.files.keys()))
        raise CheckpointError(f"{partial} was changed while it was written: {differing}")
    write_manifest(partial, manifest)
    final = partial.with_name(folder_name(manifest.step))
    if final.exists():
        logger.warning("%s was there already; it is now %s", final, set_aside(final).name)
    partial.rename(final)
    sync(final.parent)
    try:
        with complete_file(final.parent / LATEST) as file:
            file.write(f"{final.name}\n")
        # in the run folder: `checkpoints` may be emptied, or be a link to a disk that is unmounted
        mark = final.parent.with_name(MARK)
        with writing(mark):
            mark.touch()
    except CheckpointError as error:
        # not fatal: `find_newest` needs neither file
        logger.warning("%s does not name %s: %s", LATEST, final.name, error)


def random_states_file(rank: int) -> str:
    """Name of the file with the states of a rank's random generators."""
    return f"random-{rank:05d}.json"
