"""Standard streams that survive the loss of their reader (a closed pipe or terminal)."""

import errno
import io
import os
import select
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from fastpref.complete_files import writing

if TYPE_CHECKING:
    from typing_extensions import Buffer

STDERR = 2
READER_LEFT = (errno.EPIPE, errno.EIO)
"""Errors of writing to a pipe without a reader (`| head`) and to a closed terminal."""


class LastingOutput(io.FileIO):
    """Stdout or stderr that discards output once its reader is gone.

    Libraries print inside training loops, which an error from a progress bar would end.

    Args:
        number: File descriptor; not closed.

    Raises:
        OSError: stdout is redirected to a file that cannot be written, as on a full disk.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)

    def write(self, data: "Buffer", /) -> int:
        try:
            while (taken := super().write(data)) is None:
                # another program set this terminal to non-blocking mode
                select.select([], [self], [])
        except OSError as error:
            if self.fileno() != STDERR and error.errno not in READER_LEFT:
                raise
            return memoryview(data).nbytes
        return taken


def outlive_readers() -> None:
    """Replace stdout and stderr by streams that survive the loss of their reader.

    Streams that were already replaced by others, or were closed at the start (see
    `fill_standard_streams`), are kept.
    """
    for name, number in (("stdout", 1), ("stderr", STDERR)):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue
        stream.flush()
        lasting = io.TextIOWrapper(
            io.BufferedWriter(LastingOutput(number)),
            encoding=stream.encoding,
            # characters that the stream's encoding lacks are escaped
            errors="backslashreplace",
            line_buffering=stream.line_buffering or stream.write_through,
        )
        setattr(sys, name, lasting)


@contextmanager
def printing_results() -> Iterator[None]:
    """While entered, stdout takes what the command was run for; on leaving, all of it is written.

    Raises:
        CheckpointError: stdout is redirected to a file that cannot be written, as on a full disk.
    """
    with writing(Path("standard output")):
        yield
        sys.stdout.flush()


def fill_standard_streams() -> None:
    """Open the null device as stdin, stdout or stderr if closed before the start (`>&-`).

    Otherwise the first files that a run opens would reuse their descriptors and receive its output.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.dup(descriptor)
    os.close(descriptor)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w", encoding="utf-8"))
