"""One checkpoint to the disk, by all ranks: nothing is called a checkpoint before all of it is."""

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
from fastpref.checkpoint.restore import reasons_of
from fastpref.checkpoint.size import free_bytes
from fastpref.checkpoint.snapshot import Snapshot
from fastpref.complete_files import complete_file, sync, writing
from fastpref.errors import CheckpointError

logger = logging.getLogger("fastpref")

STATE = "state.json"
"""The caller's record, and what of optimizer and schedule is no tensor."""


def write_checkpoint(folder: Path, snapshot: Snapshot, agreement: Agreement) -> Checkpoint:
    """Write a snapshot as `<folder>/step-NNNNNNNN`; every rank calls this.

    Args:
        folder: `<run_dir>/checkpoints`; made if the run folder is there.
        snapshot: This rank's.
        agreement: Of the ranks.

    Raises:
        CheckpointError: on every rank, it could not be written; nothing of it is left, or else a
            warning says so.
    """
    partial = folder / (folder_name(snapshot.step) + PARTIAL)
    is_main = agreement.rank == 0
    try:
        num_bytes = sum(agreement.each(snapshot.num_bytes))
        agreement.each(lambda: _prepare(partial, num_bytes) if is_main else None)
        # its files are on the disk when they are closed
        storage = FileSystemWriter(partial, sync_files=False)
        if not any(part.is_cuda for part in snapshot.local_parts.values()):
            # else DCP waits, tensor by tensor, for all that training has a GPU do meanwhile
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
        raise CheckpointError(f"step {snapshot.step} was not saved: {reason}") from error
    return Checkpoint(folder / folder_name(snapshot.step), manifest)


class _DirectFiles(FileSystem):
    """Where DCP writes: past the page cache, and known by size and digest without reading it."""

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
    """Plans a save by the tensors, and takes what it writes from copies of their local parts."""

    def __init__(self, parts: dict[str, Tensor]) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.parts = parts

    def lookup_object(self, index: MetadataIndex) -> Tensor:
        return self.parts[index.fqn]


def _prepare(partial: Path, num_bytes: int) -> None:
    """An empty folder to write to, if there is room for what is to come."""
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
    """This rank's files besides the tensors'."""
    own = {partial / random_states_file(rank): snapshot.random_states}
    if rank == 0:
        own[partial / STATE] = {"record": snapshot.record, **snapshot.state.description}
    for path, content in own.items():
        with complete_file(path) as file:
            json.dump(content, file)
    return digest_files(own)


def _publish(partial: Path, manifest: Manifest) -> None:
    """Make the folder complete, then visible."""
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
        # beside the folder, which may be emptied, or a disk that is not there one day
        mark = final.parent.with_name(MARK)
        with writing(mark):
            mark.touch()
    except CheckpointError as error:
        # they only tell what finding finds out for itself
        logger.warning("%s does not name %s: %s", LATEST, final.name, error)


def random_states_file(rank: int) -> str:
    """Name of the file with a rank's random states."""
    return f"random-{rank:05d}.json"
