"""Errors of torch and of the operating system, translated into errors for the user."""

import errno
import os

import torch.distributed as dist

from fastpref.errors import (
    CheckpointError,
    FastprefError,
    LostRankError,
    MemoryExhaustedError,
    first_line,
    is_out_of_memory,
    is_without_thread,
)

# found in messages, as gloo raises plain RuntimeErrors
SIGNS_OF_A_LOST_RANK = (
    "Connection closed by peer",
    "Connection reset by peer",
    "gloo",
    "Timed out waiting",
)

NO_PROCESS = (
    "no other process or thread can be started, for want of memory or by a limit of it or of them "
    "(ulimit -u, ulimit -v, a container's)"
)

NO_FILE = (
    "no more files or connections can be open at once, by a limit of the process or of the machine "
    "(ulimit -n)"
)


def explain(error: BaseException) -> FastprefError | None:
    """The user-facing error that an exception amounts to; None for a bug in fastpref.

    Args:
        error: The exception that ended a task; a `FastprefError` is returned as it is.
    """
    if isinstance(error, FastprefError):
        return error
    text = str(error).strip()
    if is_out_of_memory(error):
        return MemoryExhaustedError(
            f"out of memory: {first_line(error) or 'no detail given'}; a smaller "
            "packing.max_tokens or max_length, or activation_checkpointing=true need less"
        )
    if is_without_thread(error):
        return MemoryExhaustedError(f"{NO_PROCESS}: {text}")
    if isinstance(error, RuntimeError) and os.strerror(errno.EMFILE) in text:
        return MemoryExhaustedError(f"{NO_FILE}: {first_line(error)}")
    if isinstance(error, dist.DistError) or (
        isinstance(error, RuntimeError) and any(sign in text for sign in SIGNS_OF_A_LOST_RANK)
    ):
        return LostRankError(f"a rank died or did not answer: {first_line(error)}")
    if isinstance(error, OSError) and error.errno is not None:
        return _explain_system_error(error)
    return None


def _explain_system_error(error: OSError) -> FastprefError:
    """Classify a system error: no memory, no free file descriptor or process, or a failed file."""
    if error.errno == errno.ENOMEM:
        return MemoryExhaustedError(f"out of memory: {error.strerror}")
    if error.errno in (errno.EMFILE, errno.ENFILE):
        return MemoryExhaustedError(f"{NO_FILE}: {error.strerror}")
    if error.errno == errno.EAGAIN and error.filename is None:
        return MemoryExhaustedError(f"{NO_PROCESS}: {error.strerror}")
    name = os.fsdecode(error.filename) if isinstance(error.filename, str | bytes) else "a file"
    return CheckpointError(f"{name}: {error.strerror}")
