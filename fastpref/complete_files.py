"""Atomic writes: a file or folder gets its name only when it is complete and on the disk."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fastpref.errors import CheckpointError, WritingMemoryError, is_shortage

LOCK = ".lock"
"""Name of the lock file in a folder that one process writes to, or several share."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Turn an OSError (no space left, a missing folder, …) into a user error that names `path`.

    Raises:
        CheckpointError: naming `path` and the system's reason.
    """
    try:
        yield
    except OSError as error:
        kind = WritingMemoryError if is_shortage(error) else CheckpointError
        raise kind(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def complete_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that replaces `path` atomically once it is written and synced to the disk.

    If the process is killed or the block raises, `path` is unchanged and at most a `.partial` file
    remains beside it, which the next attempt overwrites.

    Args:
        path: The file; its folder is created if missing.
        mode: "w" for text in UTF-8, "wb" for bytes.

    Raises:
        CheckpointError: it cannot be written.
    """
    with writing(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial = path.with_name(f"{path.name}.partial")
        with partial.open(mode, encoding=None if "b" in mode else "utf-8") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        sync(path.parent)


def append_whole(path: Path, text: str) -> None:
    """Append a text to a file; if a write fails, the file is truncated to its previous size.

    Raises:
        CheckpointError: it cannot be written.
    """
    content = text.encode()
    with writing(path):
        file = path.open("ab", buffering=0)
        end = file.seek(0, os.SEEK_END)
        try:
            # a network file system may report a failed write only at close
            with file:
                while content:
                    content = content[file.write(content) :]
        except OSError:
            # a device file cannot be truncated
            with suppress(OSError):
                os.truncate(path, end)
            raise


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """Yield a path to create a folder at, which replaces `folder` once it is complete and synced.

    If the process is killed, `folder` is unchanged and at most one `.partial` remains beside it. If
    the block raises, that is deleted too: half a model is useless and takes up disk space.

    Raises:
        CheckpointError: it cannot be written.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    with writing(folder):
        try:
            remove(partial)
            yield partial
            # a network file system reports failed writes here at the latest, whoever made them
            for path in (partial, *partial.rglob("*")):
                sync(path)
            replace_folder(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def share(folder: Path, remains: str) -> IO[str]:
    """Take a shared lock on a folder that several processes may write to; closing it releases it.
    A process that is alone in the folder first deletes files that killed processes left behind.

    Args:
        folder: Must exist.
        remains: Glob pattern of such leftover files.

    Raises:
        OSError: the folder cannot be written to.
    """
    # readable too: NFS, which turns flock into fcntl locks, refuses a shared one otherwise
    lock = (folder / LOCK).open("a+", encoding="utf-8")
    # on a file system without locks no process is known to be alone, and nothing is deleted
    with suppress(OSError):
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for partial in folder.glob(remains):
                partial.unlink(missing_ok=True)
        fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def sync(path: Path) -> None:
    """fsync a file, or the entries of a folder, so that they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # some file systems cannot sync a folder
        if error.errno not in (errno.EINVAL, errno.EBADF) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def replace_folder(complete: Path, folder: Path) -> None:
    """Rename `complete` to `folder`, then delete the folder that had this name before.

    If the process is killed in between, the old folder remains beside it as `<name>.old`, as it
    does where it cannot be deleted.
    """
    old = folder.with_name(f"{folder.name}.old")
    if folder.is_symlink() or folder.exists():
        remove(old)
        folder.rename(old)
    complete.rename(folder)
    sync(folder.parent)
    # the new one is in its place; NFS keeps a folder as long as a file in it is open elsewhere
    with suppress(OSError):
        remove(old)


def remove(path: Path) -> None:
    """Delete a file, a symbolic link or a folder with its contents, if it exists."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
