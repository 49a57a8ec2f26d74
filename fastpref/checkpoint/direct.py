"""A large file written past the page cache: what nobody reads soon needs no memory there.

Copying into fresh pages of the cache costs a training process on two cores five times what the
device takes for the same bytes.
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
"""Bytes of one write: many of the devices' blocks, and little memory."""
DIRECT = getattr(os, "O_DIRECT", 0)
"""Linux; elsewhere the file goes through the cache."""


class DirectFile(io.RawIOBase):
    """A new file of bytes that are digested on their way, on the disk when it is closed.

    A file system that cannot write past the cache writes through it. After an error there is no
    file: whatever became of that error in the hands of a library, closing raises it again.

    Args:
        path: A file there is replaced.

    Raises:
        OSError: by every method; what the system says.
    """

    def __init__(self, path: Path) -> None:
        self.num_bytes = 0
        self._digest = xxhash.xxh3_128()
        # the device takes it from there itself: it has to begin with a page
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
        """XXH3 of all bytes so far, 128 bits in hexadecimal digits."""
        return self._digest.hexdigest()

    def write(self, data: "Buffer", /) -> int:
        """Take all bytes of a buffer."""
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
        """Write what is left, and bring all of it to the disk."""
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
        """Write the block; a direct write needs a whole one."""
        rest, self._filled = self._block[: self._filled], 0
        while rest:
            try:
                rest = rest[os.write(self._descriptor, rest) :]
            except OSError as error:
                if error.errno != errno.EINVAL or not self._through_cache():
                    self._error = error
                    raise

    def _through_cache(self) -> bool:
        """From here on as every other file is written; whether that is a change."""
        flags = fcntl.fcntl(self._descriptor, fcntl.F_GETFL)
        fcntl.fcntl(self._descriptor, fcntl.F_SETFL, flags & ~DIRECT)
        return bool(flags & DIRECT)
