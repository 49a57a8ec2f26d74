"""The cache of `datasets`: keys, progress bars, errors, and checksums against damaged files."""

import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

import datasets
import fastpref_kernels
import pyarrow
import xxhash
from datasets.exceptions import DatasetGenerationError

from fastpref.complete_files import complete_file, remove, share
from fastpref.errors import CheckpointError, DataError, FastprefError, is_shortage
from fastpref.forks import forks_end_with_us
from fastpref.host import available_cores

logger = logging.getLogger("fastpref")

DESCRIPTION = "dataset_info.json"
"""Metadata file that `datasets` writes beside its data files."""
ROWS_OF_A_PROCESS = 5000
"""Minimum rows per tokenizing process: about three seconds of HH."""
LOST_PROCESS = "subprocesses has abruptly died"
"""Part of the message of `datasets` about a worker that died."""
TEMPORARY = "tmp????????"
"""Glob of files that `datasets` has not finished writing; each may be as large as its input."""
THREADS = "TOKENIZERS_PARALLELISM"
"""Environment variable that switches the threads of `tokenizers`."""


@cache
def code_digest(*rooms: str) -> str:
    """SHA-256 of the source code of some subpackages and of the modules that all share: a cached
    result must not outlive the code that computed it.

    Args:
        rooms: Subpackages such as "data"; "kernels" for the package `fastpref_kernels`.
    """
    package, kernels = Path(__file__).parents[1], Path(fastpref_kernels.__file__).parent
    folders = (kernels if room == "kernels" else package / room for room in rooms)
    in_rooms = (path for folder in folders for path in sorted(folder.rglob("*.py")))
    paths = [*sorted(package.glob("*.py")), *in_rooms]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def file_state(path: Path) -> str:
    """Path, size and modification time of a file, to detect changes."""
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def cache_folder(cache_dir: str | None) -> str:
    """The given cache folder, or the default one of `datasets`."""
    return cache_dir or str(datasets.config.HF_DATASETS_CACHE)


@contextmanager
def progress_bars(quiet: bool) -> Iterator[None]:
    """Disable the progress bars of `datasets` while entered, if `quiet`."""
    if not quiet or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def processes_for(num_rows: int) -> int:
    """Number of tokenizing processes: at most the available cores, and each with at least
    `ROWS_OF_A_PROCESS` rows, so that its start-up pays off."""
    return max(1, min(available_cores(), num_rows // ROWS_OF_A_PROCESS))


@contextmanager
def tokenizing_in(num_proc: int) -> Iterator[None]:
    """Let forked tokenizing processes use one thread each, and end when this process ends."""
    before = os.environ.get(THREADS)
    if num_proc > 1:
        os.environ[THREADS] = "false"
    try:
        with forks_end_with_us():
            yield
    finally:
        if before is None:
            os.environ.pop(THREADS, None)
        else:
            os.environ[THREADS] = before


@contextmanager
def without_remains(dataset: datasets.Dataset) -> Iterator[None]:
    """While entered, hold a shared lock on a dataset's cache folders, for `Dataset.map`. Unfinished
    files that killed processes left are removed first, if no other process holds the lock."""
    folders = {Path(file["filename"]).parent for file in dataset.cache_files}
    with ExitStack() as locks:
        for folder in folders:
            # a read-only folder has the result already, or `datasets` will fail to write it
            with suppress(OSError):
                locks.enter_context(share(folder, TEMPORARY))
        yield


@contextmanager
def cache_errors(cache_dir: str | None) -> Iterator[None]:
    """Unwrap our own errors raised inside `datasets`, and explain failures of its cache.

    Raises:
        DataError: the cache cannot be written or is damaged, or a tokenizing process died.
        OSError: the cause is not the cache.
        Exception: no memory, file descriptor, process or thread is left, see `is_shortage`.
    """
    try:
        yield
    except (
        *(DatasetGenerationError, OSError, RuntimeError, ValueError),
        pyarrow.ArrowException,
    ) as error:
        cause: BaseException = error
        if type(error) is ValueError and isinstance(error.__context__, OSError):
            # `datasets` then wrote to the closed file, which raised the ValueError
            cause = error.__context__
        while cause.__cause__ is not None and not isinstance(cause, FastprefError):
            cause = cause.__cause__
        if isinstance(cause, FastprefError) or is_shortage(cause):
            raise cause from None
        # a pipe to a worker: broken standard streams raise nothing
        if LOST_PROCESS in str(cause) or isinstance(cause, BrokenPipeError | ConnectionResetError):
            raise DataError(
                "data.num_proc: a process that tokenized ended, as when memory runs out; fewer of "
                "them take less"
            ) from error
        if not isinstance(cause, OSError | pyarrow.ArrowException):
            raise
        folder = cache_folder(cache_dir)
        if isinstance(cause, OSError) and not is_of_cache(cause, folder):
            raise cause from None
        raise DataError(
            f"data.cache_dir: {folder} cannot be used: {cause}; delete what is damaged there or "
            "set data.cache_dir to another folder"
        ) from error


def is_of_cache(error: OSError, folder: str) -> bool:
    """Whether a system error concerns the cache in `folder`."""
    if not isinstance(error.filename, str):
        return True
    # parents count too: the folder is created in them
    paths = [os.path.abspath(os.path.expanduser(path)) for path in (folder, error.filename)]
    return os.path.commonpath(paths) in paths


def made_whole(
    sums: Path,
    make: Callable[[], datasets.Dataset],
    *,
    files: str,
    read: Callable[[Sequence[Path]], datasets.Dataset] | None = None,
) -> datasets.Dataset:
    """A cached dataset whose files match their checksums; damaged or unlisted files are rebuilt.

    From damaged files Arrow would read other tokens, or crash. Files without a checksum list may
    never have been written to the disk completely; they are kept only if the lock cannot be had
    (read-only cache, file system without locks).

    Args:
        sums: The checksum list, read and written here.
        make: Returns the dataset from the cache, or writes it there.
        files: Glob of everything that `make` writes beside the list, matching nothing else.
        read: Opens the listed files instead of `make`, if that writes to the cache even when they
            exist; such a `make` also writes a metadata file, `DESCRIPTION`.

    Raises:
        OSError: damaged files cannot be removed.
    """

    def find() -> datasets.Dataset:
        return make() if read is None else read(sorted(_read(sums)))

    if _is_whole(sums):
        return find()
    with _alone(sums) as is_alone:
        # another process may have made them in the meantime
        if _is_whole(sums):
            return find()
        damaged = _damaged(_read(sums))
        if damaged is not None:
            logger.warning("%s is damaged or gone, and is made again", damaged)
            # if they cannot be removed, `make` would take them for whole
            _remove(sums, files)
        elif is_alone:
            with suppress(OSError):
                _remove(sums, files)
        dataset = make()
        paths = {Path(file["filename"]).absolute() for file in dataset.cache_files}
        if read is not None:
            paths |= {path.with_name(DESCRIPTION) for path in paths}
        _write(sums, {path: _digest(path) for path in paths})
    return dataset


@contextmanager
def _alone(sums: Path) -> Iterator[bool]:
    """Hold the exclusive lock of a checksum list; yields whether it could be had."""
    is_alone = False
    with ExitStack() as held:
        # fails in a read-only cache and on a file system without locks
        with suppress(OSError):
            sums.parent.mkdir(parents=True, exist_ok=True)
            lock = held.enter_context(sums.with_suffix(".lock").open("a", encoding="utf-8"))
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                logger.info("%s: waiting for the process that makes its files", sums)
                fcntl.flock(lock, fcntl.LOCK_EX)
            is_alone = True
        yield is_alone


def _remove(sums: Path, files: str) -> None:
    """Remove a checksum list and its files."""
    # the list first: files without a list are not trusted
    sums.unlink(missing_ok=True)
    for path in sums.parent.glob(files):
        remove(path)


def _is_whole(sums: Path) -> bool:
    """Whether a checksum list exists and all its files match."""
    listed = _read(sums)
    return bool(listed) and _damaged(listed) is None


def _damaged(listed: dict[Path, str]) -> Path | None:
    """The first file that does not match its digest."""
    return next((path for path in listed if _digest(path) != listed[path]), None)


def _read(sums: Path) -> dict[Path, str]:
    """Read a checksum list, file -> digest; empty if it is missing or damaged."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        content = json.loads(sums.read_text(encoding="utf-8"))
        if content["sum"] == _sum_of(content["files"]):
            return {sums.parent / name: digest for name, digest in content["files"].items()}
    return {}


def _write(sums: Path, digests: dict[Path, str]) -> None:
    folder = sums.parent.absolute()
    files = {os.path.relpath(path, folder): digest for path, digest in digests.items()}
    # a read-only cache gets none
    with suppress(CheckpointError), complete_file(sums) as file:
        json.dump({"files": files, "sum": _sum_of(files)}, file)


def _digest(path: Path) -> str:
    """xxh3_128 digest of a file's bytes; "" if it cannot be read."""
    with suppress(OSError), path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    return ""


def _sum_of(files: dict[str, str]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())
