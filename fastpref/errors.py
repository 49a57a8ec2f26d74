"""The errors a user can cause, each with the exit code that a scheduler sees."""

import errno
import os
import re
import sys


class FastprefError(Exception):
    """An error with a message for the user (argument, rule, value); printed without traceback."""

    exit_code = 1
    is_own = False
    """Whether only this rank knows of the error, and so prints it, whatever its rank number."""


class ConfigError(FastprefError):
    """An option is unknown, out of range or in conflict with another."""

    exit_code = 2


class DataError(FastprefError):
    """A data file is missing or a row breaks a rule; the message says file:row:field."""

    exit_code = 3


class CheckpointError(FastprefError):
    """A model or checkpoint is missing, incomplete or unsuitable, or a file cannot be written."""

    exit_code = 4


class NonFiniteError(FastprefError):
    """A loss or gradient is NaN or infinite; it was not applied to the weights."""

    exit_code = 5


class MemoryExhaustedError(FastprefError):
    """The device or the host ran out of memory."""

    exit_code = 6


class WritingMemoryError(MemoryExhaustedError, CheckpointError):
    """A file cannot be written for want of memory or file descriptors; where a run goes on without
    a file that cannot be written, it does so then too."""


class RankMemoryError(MemoryExhaustedError):
    """This rank ran out of memory."""

    is_own = True


class DistributedError(FastprefError):
    """Another rank died or did not answer in time."""

    exit_code = 7


class LostRankError(DistributedError):
    """A collective failed: some rank is missing, and it is not known which."""


class RankError(DistributedError):
    """This rank cannot join the others, or has lost rank 0, which prints shared errors."""

    is_own = True


class PreemptionError(FastprefError):
    """SIGTERM, SIGUSR1 or SIGHUP arrived, or the deadline is near; the message says what was
    saved."""

    exit_code = 75


class InterruptionError(FastprefError):
    """SIGINT (Ctrl-C) arrived; the message says what was saved."""

    exit_code = 130


SIGNS_OF_EXHAUSTION = re.compile(
    r"DefaultCPUAllocator|(CUDA|HIP|Cuda failure)\b.*out of memory"
    r"|(CUBLAS|HIPBLAS|CUDNN)_STATUS_ALLOC_FAILED"
    rf"|{os.strerror(errno.ENOMEM)} \((os error )?{errno.ENOMEM}\)"
)
"""Messages of torch's CPU and GPU allocators, of the driver, which Triton and NCCL call directly,
of cuBLAS and cuDNN, and of torch and safetensors when a file cannot be mapped into memory."""
SHORTAGES = (errno.EAGAIN, errno.ENOMEM, errno.EMFILE, errno.ENFILE)
"""Errors of a system that is out of processes, memory or file descriptors."""
SIGNS_OF_NO_THREAD = ("can't start new thread", os.strerror(errno.EAGAIN))
"""Messages of Python, and of the C++ library that torch uses, when no thread can be started."""


def is_out_of_memory(error: BaseException) -> bool:
    """Whether an error says that the host or the device has no memory left, on this rank."""
    # it may quote what another rank ran out of
    if isinstance(error, DistributedError):
        return False
    # torch's error is recognised by name, so that this module need not import torch
    if isinstance(error, MemoryError) or type(error).__name__ == "OutOfMemoryError":
        return True
    return SIGNS_OF_EXHAUSTION.search(str(error)) is not None


def is_failed_compilation(error: BaseException) -> bool:
    """Whether an error says that `torch.compile` could not compile, such as for a compiler that was
    killed."""
    return any(cls.__name__ == "BackendCompilerFailed" for cls in type(error).__mro__)


def is_without_thread(error: BaseException) -> bool:
    """Whether an error says that no thread can be started, for want of memory or by a limit."""
    return isinstance(error, RuntimeError) and str(error).strip() in SIGNS_OF_NO_THREAD


def is_shortage(error: BaseException) -> bool:
    """Whether an error says what the process or the machine lacks, and so nothing of the file that
    was being read or written."""
    if isinstance(error, OSError) and error.errno in SHORTAGES:
        return True
    # torch gives the system's error in its text
    no_file = isinstance(error, RuntimeError) and os.strerror(errno.EMFILE) in str(error)
    return no_file or is_without_thread(error) or is_out_of_memory(error)


def first_line(error: BaseException) -> str:
    """The first line of an error's message: library messages can run to pages."""
    return str(error).strip().split("\n")[0]


def in_a_line(error: BaseException) -> str:
    """The class of an error and the first line of its message."""
    return f"{type(error).__name__}: {first_line(error)}"


def error_text(error: FastprefError) -> str:
    """A failed run's message as one line; "" on a rank that leaves it to local rank 0."""
    # all ranks raise the same user error, so one per machine prints it: each machine may have its
    # own log, and before the rendezvous it may be the only one that fails
    number = os.environ.get("LOCAL_RANK") or os.environ.get("RANK", "0")
    return f"fastpref: {error}\n" if number == "0" or error.is_own else ""


def say_error(error: FastprefError) -> None:
    """Write `error_text` to stderr."""
    sys.stderr.write(error_text(error))
    sys.stderr.flush()
