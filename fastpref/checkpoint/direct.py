"""Direct I/O for large files: a checkpoint that nobody reads soon should not fill the page cache.

Copying into fresh pages of the cache costs a training process on two cores five times as much time
as the device takes for the same bytes.
"""

import errno
import fcntl
import io
import mmap
import os
from pathlib import Path
from typing import TYPE_CHECKING

import xxhash

if TYPE_CHECKING:
    from typing_extensions import Buffer

BLOCK_BYTES = 8 * 2**20
"""Bytes of one write: many device blocks, yet little memory."""
DIRECT = getattr(os, "O_DIRECT", 0)
"""Flag of direct I/O on Linux; elsewhere 0, and files go through the page cache."""


class DirectFile(io.RawIOBase):
    """A new file that is hashed while it is written, and synced to the disk when it is closed.

    On a file system without direct I/O it goes through the page cache. A failed write is raised
    again by `close`, in case the library in between has swallowed it.

    Args:
        path: An existing file is overwritten.

    Raises:
        OSError: from every method; the system's error.
    """

    def __init__(self, path: Path) -> None:
        self.num_bytes = 0
        self._digest = xxhash.xxh3_128()
        # direct I/O reads from this buffer, which must be page-aligned; an mmap is
        self._block = memoryview(mmap.mmap(-1, BLOCK_BYTES))
        self._filled = 0
        self._error: OSError | None = None
        flags = os.O_WRONLY | os.O_CREAT | os.O_TRUNC
        try:
            self._descriptor = os.open(path, flags | DIRECT, 0o666)
        except OSError as error:
            if error.errno != errno.EINVAL:
                raise
            self._descriptor = os.open(path, flags, 0o666)

    def writable(self) -> bool:
        return True

    def tell(self) -> int:
        return self.num_bytes

    def digest(self) -> str:
        """XXH3 of all bytes written so far, 128 bits in hexadecimal digits."""
        return self._digest.hexdigest()

    def write(self, data: "Buffer", /) -> int:
        """Write all bytes of a buffer; returns their number."""
        rest = memoryview(data).cast("B")
        num_bytes = len(rest)
        self._digest.update(rest)
        while rest:
            taken = min(len(rest), BLOCK_BYTES - self._filled)
            self._block[self._filled : self._filled + taken] = rest[:taken]
            self._filled += taken
            rest = rest[taken:]
            if self._filled == BLOCK_BYTES:
                self._empty()
        self.num_bytes += num_bytes
        return num_bytes

    def close(self) -> None:
        """Write the remaining bytes and sync the file to the disk."""
        if self.closed:
            return
        try:
            if self._error is not None:
                raise self._error
            self._through_cache()
            self._empty()
            os.fsync(self._descriptor)
        finally:
            super().close()
            os.close(self._descriptor)

    def _empty(self) -> None:
        """Write the buffered block to the file; direct I/O needs a full one."""
        rest, self._filled = self._block[: self._filled], 0
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._through_cache():
                    self._error = error
                    raise

    def _through_cache(self) -> bool:
        """Switch to the page cache from here on; returns whether direct I/O was on before."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~DIRECT)
        return bool(flags & DIRECT)
