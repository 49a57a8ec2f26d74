"""Files that appear under their name when they are complete, and never before."""

import errno
import fcntl
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from fastpref.errors import CheckpointError

LOCK = ".lock"
"""In a folder that one process, or several together, may write to."""


@contextmanager
def writing(path: Path) -> Iterator[None]:
    """Name what is being written where the system refuses it: no space left, a folder gone, ….

    Raises:
        CheckpointError: naming `path` and the system's reason.
    """
    try:
        yield
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be written: {error.strerror or error}") from error


@contextmanager
def complete_file(path: Path, mode: str = "w") -> Iterator[IO[Any]]:
    """Open a file that takes the place of `path` once it is written and on the disk.

    A process that is killed, or an error inside, leaves `path` as it was and at most a file
    `.partial` beside it, which the next attempt overwrites.

    Args:
        path: The file; its folder is made if need be.
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
    """Add a text to the end of a file: all of it, or none and the file as it was.

    Raises:
        CheckpointError: it cannot be written.
    """
    content = text.encode()
    with writing(path):
        file = path.open("ab", buffering=0)
        end = file.seek(0, os.SEEK_END)
        try:
            # a disk on another machine may refuse as late as when it is closed
            with file:
                while content:
                    content = content[file.write(content) :]
        except OSError:
            # what is no file of a disk has no end
            with suppress(OSError):
                os.truncate(path, end)
            raise


@contextmanager
def complete_folder(folder: Path) -> Iterator[Path]:
    """A folder to write into, which takes the place of `folder` once all is written.

    A process that is killed leaves `folder` as it was and at most one `.partial` beside it; an
    error inside leaves nothing, as half a model is of no use and takes the space that is wanting.

    Raises:
        CheckpointError: it cannot be written.
    """
    partial = folder.with_name(f"{folder.name}.partial")
    with writing(folder):
        try:
            remove(partial)
            yield partial
            # what a disk on another machine refuses late is known by then, whoever wrote it
            for path in partial.rglob("*"):
                sync(path)
            replace_folder(partial, folder)
        finally:
            shutil.rmtree(partial, ignore_errors=True)


def share(folder: Path, remains: str) -> IO[str]:
    """A lock on a folder that several processes may write to at once; it is given back by closing
    it. Whoever comes while nobody writes removes what kills have left half written.

    Args:
        folder: That is there.
        remains: What the names of such files are like, as a pattern.

    Raises:
        OSError: the folder cannot be written to.
    """
    lock = (folder / LOCK).open("a", encoding="utf-8")
    # a file system without locks: then nobody has one to himself, and nothing is removed
    with suppress(OSError):
        with suppress(BlockingIOError):
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            for partial in folder.glob(remains):
                partial.unlink(missing_ok=True)
        fcntl.flock(lock, fcntl.LOCK_SH)
    return lock


def sync(path: Path) -> None:
    """Bring a file, or the entries of a folder, to the disk: they survive a power failure."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    except OSError as error:
        # a file system may do so for files alone
        if error.errno not in (errno.EINVAL, errno.EBADF) or not path.is_dir():
            raise
    finally:
        os.close(descriptor)


def replace_folder(complete: Path, folder: Path) -> None:
    """Give a complete folder its name; the one that had it goes once this one is in its place.

    Killed in between, the old one is left beside it as `<name>.old`.
    """
    old = folder.with_name(f"{folder.name}.old")
    if folder.is_symlink() or folder.exists():
        remove(old)
        folder.rename(old)
    complete.rename(folder)
    sync(folder.parent)
    remove(old)


def remove(path: Path) -> None:
    """Remove a file, a link or a folder with all that is in it, if it is there."""
    if path.is_symlink() or path.is_file():
        path.unlink()
    elif path.exists():
        shutil.rmtree(path)
