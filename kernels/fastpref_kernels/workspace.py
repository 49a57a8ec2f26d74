"""Workspace limit of the ops, beyond their inputs and results, and the tile shapes it allows."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastpref_kernels.checks import is_above_zero

ROW_MULTIPLE = 32
"""GEMM rows are padded to a multiple of this. Without padding MKL's result for a row was seen to
depend on the number of other rows and on the memory alignment of the operands."""

LEAST_COLUMNS = 16
"""Minimum columns of a GEMM on a CPU, for the same reason."""

_PREFERRED_TILE_CPU = (1024, 2048)
"""Rows, columns. 8 MiB of logits stay in a CPU's cache: 1.2 to 1.4 times faster than 256 MiB
(float32 GEMM and softmax sums on two shapes, one core of an EPYC)."""
_PREFERRED_TILE_GPU = (8192, 8192)

_KEPT_MULTIPLE = 128
_LEAST_KEPT = 2048
"""Minimum rows worth keeping in partial mode. Estimated for an H100: K kept rows save a pass of
2·K·D·V operations at 790 TFLOP/s, but read the head once more and its float32 slices twice,
10·D·V bytes at 3 TB/s; the two break even at 1,300 rows."""
_SLICE_BYTES = 256 * 2**20
"""Reserved for logit and gradient slices of the rows not kept; at most half of the workspace."""

_LEAN_BYTES = 1024 * 2**20
"""Upper bound of a GPU call's tiles, sums and slices, without the exponentials kept."""
_MOST_MIB = 2**42
"""Keeps the limit in bytes within the 64-bit integers that a registered op takes."""
_workspace_bytes = 1024 * 2**20
_of_call = threading.local()


def set_workspace_mib(mib: float) -> None:
    """Limit the workspace of an op: memory beyond inputs, results and float32 result accumulators.

    Args:
        mib: Limit in MiB, in (0, 2^42]; the default is 1024. The smallest tile, 32 rows by one
            column, is used even if it exceeds the limit.
    """
    global _workspace_bytes
    if not is_above_zero(mib):
        raise ValueError(f"workspace_mib must be > 0 and finite, got {mib!r}")
    if mib > _MOST_MIB:
        raise ValueError(f"workspace_mib must be <= 2^42, got {mib!r}")
    _workspace_bytes = max(1, int(mib * 2**20))


def auto_workspace_mib(device_memory: int | None) -> int:
    """Default workspace of a device: 1/16 of a GPU's memory, at least 1 GiB; 1 GiB on a CPU.

    A trained head is a third faster when the exponentials of all tokens fit, 2 bytes per token and
    vocabulary entry: 1/16 of 80 GB holds those of 20,000 tokens with a vocabulary of 128,256.

    Args:
        device_memory: Memory of the GPU in bytes; None on a CPU.
    """
    return max(1024, (device_memory or 0) // 16 // 2**20)


def get_workspace_mib() -> float:
    """The limit set by `set_workspace_mib`, in MiB."""
    return _workspace_bytes / 2**20


def bytes_set() -> int:
    """The limit set by `set_workspace_mib`, in bytes."""
    return _workspace_bytes


@contextmanager
def bounded_by(num_bytes: int) -> Iterator[None]:
    """Use this limit in the current thread instead of the global one, so that the forward and the
    backward of a call share one limit even if the global one changes in between."""
    before = getattr(_of_call, "num_bytes", None)
    _of_call.num_bytes = num_bytes
    try:
        yield
    finally:
        _of_call.num_bytes = before


def limit() -> int:
    """Workspace limit in bytes of the call running in this thread; else the global limit."""
    num_bytes = getattr(_of_call, "num_bytes", None)
    return _workspace_bytes if num_bytes is None else num_bytes


def kept_rows(num_rows: int, row_bytes: int) -> int:
    """Number of leading rows whose exponentials fit in the workspace: all of them, a multiple of
    128, or 0 where too few fit to be worth keeping."""
    most = limit()
    if num_rows * row_bytes <= most:
        return num_rows
    fitting = (most - min(_SLICE_BYTES, most // 2)) // row_bytes
    whole = fitting // _KEPT_MULTIPLE * _KEPT_MULTIPLE
    return whole if whole >= _LEAST_KEPT else 0


def keeping_mode(num_rows: int, row_bytes: int) -> str:
    """Mode by the share of rows whose exponentials fit: store (all), partial or lean (none)."""
    kept = kept_rows(num_rows, row_bytes)
    if kept == num_rows:
        return "store"
    return "partial" if kept else "lean"


def tile_shape(vocab: int, hidden: int, device: torch.device) -> tuple[int, int]:
    """Rows R and columns C of a logits tile: the device's preferred shape, shrunk to the workspace.

    At most these are live at once, all float32 (backward of the KL with a softcap): four tiles of
    logits, three slices of head weights (policy, reference, gradient) and two tiles of hidden
    states, 4·R·C + 3·C·D + 2·R·D numbers. A quarter of the workspace goes to the slices.

    The shape is independent of the number of rows N, so a row has the same bits in every batch.

    Args:
        vocab, hidden: V and D, the larger D if policy and reference differ.
        device: Device that the op runs on.
    """
    rows, cols = _PREFERRED_TILE_CPU if device.type == "cpu" else _PREFERRED_TILE_GPU
    numbers = limit() // 4
    cols = max(1, min(vocab, cols, numbers // 4 // (3 * hidden)))
    # TDPO1's values need four float64 tiles of (R, D) after the sweep
    rows = min(rows, numbers * 3 // 4 // max(4 * cols + 2 * hidden, 8 * hidden))
    return max(ROW_MULTIPLE, rows // ROW_MULTIPLE * ROW_MULTIPLE), cols


def workspace_bytes(vocab: int, hidden: int, device_type: str) -> int:
    """Upper bound of the workspace in bytes, without exponentials kept, for memory planning.

    Args:
        vocab, hidden: V and D.
        device_type: "cpu" or "cuda".
    """
    if device_type != "cpu":
        return min(limit(), _LEAN_BYTES)
    rows, cols = tile_shape(vocab, hidden, torch.device(device_type))
    return min(limit(), 4 * (4 * rows * cols + 3 * cols * hidden + 2 * rows * hidden))


def slices(stop: int, step: int, *, start: int = 0) -> Iterator[slice]:
    """Cut [start, stop) into slices of length `step`; the last one may be shorter."""
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))
