"""The standard streams of a run, which outlives whoever reads them."""

import errno
import io
import os
import select
import sys
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from typing_extensions import Buffer

STDERR = 2
READER_LEFT = (errno.EPIPE, errno.EIO)
"""Of a pipe (`| head`) and of a terminal that is closed."""


class LastingOutput(io.FileIO):
    """Stdout or stderr, written to in vain once nobody takes it any more.

    Libraries print from the midst of loops: what a progress bar raised would end them.

    Args:
        number: Of the descriptor; it is left open.

    Raises:
        OSError: results go to stdout, and it is a file that takes no more.
    """

    def __init__(self, number: int) -> None:
        super().__init__(number, "w", closefd=False)

    def write(self, data: "Buffer", /) -> int:
        try:
            while (taken := super().write(data)) is None:
                # another program at this terminal asked not to be kept waiting
                select.select([], [self], [])
        except OSError as error:
            if self.fileno() != STDERR and error.errno not in READER_LEFT:
                raise
            return memoryview(data).nbytes
        return taken


def outlive_readers() -> None:
    """Make stdout and stderr streams that no reader who leaves can end a run by.

    Those that something else put in their place stay, as do files that were closed: see
    `fill_standard_streams`.
    """
    for name, number in (("stdout", 1), ("stderr", STDERR)):
        stream = getattr(sys, name)
        if stream is not getattr(sys, f"__{name}__"):
            continue
        stream.flush()
        lasting = io.TextIOWrapper(
            io.BufferedWriter(LastingOutput(number)),
            encoding=stream.encoding,
            # a terminal or file of another encoding gets what it can show
            errors="backslashreplace",
            line_buffering=stream.line_buffering or stream.write_through,
        )
        setattr(sys, name, lasting)


def fill_standard_streams() -> None:
    """Put the null device where stdin, stdout or stderr were closed before the start (`>&-`).

    The first files that a run opens would take their numbers, and get what is printed.
    """
    descriptor = os.open(os.devnull, os.O_RDWR)
    while descriptor <= 2:
        descriptor = os.dup(descriptor)
    os.close(descriptor)
    for descriptor, name in ((1, "stdout"), (2, "stderr")):
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w", encoding="utf-8"))
