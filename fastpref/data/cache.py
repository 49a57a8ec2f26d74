"""The cache of `datasets`: what its entries depend on, its progress bars, its errors, what of it a
disk has damaged."""

import errno
import fcntl
import hashlib
import json
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from functools import cache
from pathlib import Path

import datasets
import fastpref_kernels
import pyarrow
import xxhash
from datasets.exceptions import DatasetGenerationError

from fastpref.complete_files import complete_file, remove, share
from fastpref.errors import CheckpointError, DataError, FastprefError
from fastpref.forks import forks_end_with_us
from fastpref.host import available_cores

logger = logging.getLogger("fastpref")

DESCRIPTION = "dataset_info.json"
"""In a folder of `datasets`, beside its files."""
ROWS_OF_A_PROCESS = 5000
"""At least: about three seconds of rows of HH."""
LOST_PROCESS = "subprocesses has abruptly died"
"""What `datasets` says when one ended."""
NOT_OF_FILES = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""What the system says where it has no more processes, memory or descriptors."""
TEMPORARY = "tmp????????"
"""Names of files that `datasets` has not finished: as large as what it maps."""
THREADS = "TOKENIZERS_PARALLELISM"
"""Environment variable of `tokenizers`."""


@cache
def code_digest(*rooms: str) -> str:
    """Digest of the code of some rooms, and of what all rooms share: what was computed must not
    outlive the code that computed it.

    Args:
        rooms: Folders of this package, "data"; "kernels" for the package of the head's ops.
    """
    package, kernels = Path(__file__).parents[1], Path(fastpref_kernels.__file__).parent
    folders = (kernels if room == "kernels" else package / room for room in rooms)
    in_rooms = (path for folder in folders for path in sorted(folder.rglob("*.py")))
    paths = [*sorted(package.glob("*.py")), *in_rooms]
    return hashlib.sha256(b"".join(path.read_bytes() for path in paths)).hexdigest()


def file_state(path: Path) -> str:
    """Location, size and time of a file: what tells that it has changed."""
    stat = path.stat()
    return f"{path.resolve()} {stat.st_size} {stat.st_mtime_ns}"


def cache_folder(cache_dir: str | None) -> str:
    """The cache that an option names, or that of `datasets`."""
    return cache_dir or str(datasets.config.HF_DATASETS_CACHE)


@contextmanager
def progress_bars(quiet: bool) -> Iterator[None]:
    """Switch the progress bars of `datasets` off while `quiet`."""
    if not quiet or datasets.are_progress_bars_disabled():
        yield
        return
    datasets.disable_progress_bars()
    try:
        yield
    finally:
        datasets.enable_progress_bars()


def processes_for(num_rows: int) -> int:
    """How many processes to tokenize rows in: those that are busy for longer than they take to
    start, and no more than there are cores."""
    return max(1, min(available_cores(), num_rows // ROWS_OF_A_PROCESS))


@contextmanager
def tokenizing_in(num_proc: int) -> Iterator[None]:
    """Let the tokenizers of several processes keep to one thread each, and end with this one."""
    before = os.environ.get(THREADS)
    if num_proc > 1:
        os.environ[THREADS] = "false"
    try:
        with forks_end_with_us():
            yield
    finally:
        if num_proc > 1 and before is None:
            del os.environ[THREADS]
        elif num_proc > 1 and before is not None:
            os.environ[THREADS] = before


@contextmanager
def without_remains(dataset: datasets.Dataset) -> Iterator[None]:
    """While entered, rows of ours are mapped; what kills have left half written beside them goes
    first, if no other process maps them."""
    folders = {Path(file["filename"]).parent for file in dataset.cache_files}
    with ExitStack() as locks:
        for folder in folders:
            # one that may only be read has what is wanted, or `datasets` says that it cannot write
            with suppress(OSError):
                locks.enter_context(share(folder, TEMPORARY))
        yield


@contextmanager
def cache_errors(cache_dir: str | None) -> Iterator[None]:
    """Bring our own errors out of the wrapping of `datasets`, and say what ails its cache.

    Raises:
        DataError: the cache cannot be written or is damaged, or a process was lost.
        OSError: the system lacks something else.
    """
    try:
        yield
    except (
        *(DatasetGenerationError, OSError, RuntimeError, ValueError),
        pyarrow.ArrowException,
    ) as error:
        cause: BaseException = error
        if type(error) is ValueError and isinstance(error.__context__, OSError):
            # of the closed file that `datasets` goes on to write to
            cause = error.__context__
        while cause.__cause__ is not None and not isinstance(cause, FastprefError):
            cause = cause.__cause__
        if isinstance(cause, FastprefError):
            raise cause from None
        # between us and them there are pipes; streams that people read break without a word
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
    """Whether it is for the cache in `folder` that the system refuses something."""
    if error.errno in NOT_OF_FILES:
        return False
    if not isinstance(error.filename, str):
        return True
    # one above it as well: the folder is made there
    paths = [os.path.abspath(os.path.expanduser(path)) for path in (folder, error.filename)]
    return os.path.commonpath(paths) in paths


def made_whole(
    sums: Path, make: Callable[[], datasets.Dataset], *, files: str, described: bool = False
) -> datasets.Dataset:
    """A dataset of files as they were written: those in the cache, or new ones.

    A list of them tells their digests: Arrow takes what a disk damaged for other tokens, or ends
    the process. What is in no list was perhaps never on the disk: it is made again.

    Args:
        sums: The list of its files, to read and to write.
        make: Finds them in the cache, or writes them.
        files: What the names are like, as a pattern, of all that is made beside the list, and of
            nothing else.
        described: Whether `datasets` describes them in a file beside them.
    """
    if _is_whole(sums):
        return make()
    with _alone(sums) as is_alone:
        # another process may have made them in the meantime
        if _is_whole(sums):
            return make()
        damaged = _damaged(_read(sums))
        if damaged is not None:
            logger.warning("%s is damaged or gone, and is made again", damaged)
        if damaged is not None or is_alone:
            _remove(sums, files)
        dataset = make()
        paths = {Path(file["filename"]).absolute() for file in dataset.cache_files}
        if described:
            paths |= {path.with_name(DESCRIPTION) for path in paths}
        _write(sums, {path: _digest(path) for path in paths})
    return dataset


@contextmanager
def _alone(sums: Path) -> Iterator[bool]:
    """While entered, no other process makes the files of a list, if that can be had."""
    is_alone = False
    with ExitStack() as held:
        # a cache that may only be read; a file system without locks
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
    """Remove a list and what it is of, as far as that may be."""
    with suppress(OSError):
        # what is left without a list is not believed
        sums.unlink(missing_ok=True)
        for path in sums.parent.glob(files):
            remove(path)


def _is_whole(sums: Path) -> bool:
    """Whether there is a list, and its files are what their digests say."""
    listed = _read(sums)
    return bool(listed) and _damaged(listed) is None


def _damaged(listed: dict[Path, str]) -> Path | None:
    """The first of some files that is not what its digest says."""
    return next((path for path in listed if _digest(path) != listed[path]), None)


def _read(sums: Path) -> dict[Path, str]:
    """Digests by file; none where the list is missing or damaged itself."""
    with suppress(OSError, ValueError, KeyError, TypeError, AttributeError):
        content = json.loads(sums.read_text(encoding="utf-8"))
        if content["sum"] == _sum_of(content["files"]):
            return {sums.parent / name: digest for name, digest in content["files"].items()}
    return {}


def _write(sums: Path, digests: dict[Path, str]) -> None:
    folder = sums.parent.absolute()
    files = {os.path.relpath(path, folder): digest for path, digest in digests.items()}
    # a cache that may only be read has none
    with suppress(CheckpointError), complete_file(sums) as file:
        json.dump({"files": files, "sum": _sum_of(files)}, file)


def _digest(path: Path) -> str:
    """Of a file's bytes; "" if it cannot be read."""
    with suppress(OSError), path.open("rb") as file:
        return hashlib.file_digest(file, xxhash.xxh3_128).hexdigest()
    return ""


def _sum_of(files: dict[str, str]) -> str:
    return xxhash.xxh3_128_hexdigest(json.dumps(files, sort_keys=True).encode())
