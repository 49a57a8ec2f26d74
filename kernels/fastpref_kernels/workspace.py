"""How much memory the ops may use beside their inputs and results, and the tiles that follow."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from fastpref_kernels.checks import is_above_zero

ROW_MULTIPLE = 32
"""Rows of a GEMM are padded to this. Without it MKL's result for a row was seen to change with the
number of rows beside it and with the operands' alignment in memory."""

LEAST_COLUMNS = 16
"""Fewest columns of such a GEMM on a CPU, for the same reason."""

_PREFERRED_TILE_CPU = (1024, 2048)
"""Rows, columns. Logits of 8 MiB stay in a CPU's cache: 1.2 to 1.4 times faster than 256 MiB
(float32 GEMM and softmax sums on two shapes, one core of an EPYC)."""
_PREFERRED_TILE_GPU = (8192, 8192)

_KEPT_MULTIPLE = 128
_LEAST_KEPT = 2048
"""Fewest rows that are kept of a call that is not kept whole. Reckoned for an H100: K rows save a
pass of 2·K·D·V operations at 790 TFLOP/s and read the head once more and its float32 slices twice,
10·D·V bytes at 3 TB/s, which is even at 1,300 rows."""
_SLICE_BYTES = 256 * 2**20
"""Left for slices of the other rows' logits and their gradients, or half of a small workspace."""

_LEAN_BYTES = 1024 * 2**20
"""More than this a GPU's tiles, rows and slices never take, exponentials that are kept left out."""
_MOST_MIB = 2**42
"""Its bytes are a number of 64 bits, as those of a registered op are."""
_workspace_bytes = 1024 * 2**20
_of_call = threading.local()


def set_workspace_mib(mib: float) -> None:
    """Bound the bytes an op may hold beside its inputs, its results and float32 sums of results.

    Args:
        mib: Bound in MiB, in (0, 2^42]; 1024 until set. The smallest tile, 32 rows by one column,
            is used even where it needs more.
    """
    global _workspace_bytes
    if not is_above_zero(mib):
        raise ValueError(f"workspace_mib must be > 0 and finite, got {mib!r}")
    if mib > _MOST_MIB:
        raise ValueError(f"workspace_mib must be <= 2^42, got {mib!r}")
    _workspace_bytes = max(1, int(mib * 2**20))


def auto_workspace_mib(device_memory: int | None) -> int:
    """What suits a device: a sixteenth of a GPU's memory, 1 GiB at least; 1 GiB on a CPU.

    A head that is trained is a third faster where the exponentials of all its tokens fit, 2 bytes a
    token and word: on 80 GB those of 20,000 tokens and 128,256 words.

    Args:
        device_memory: Bytes of the GPU; None on a CPU.
    """
    return max(1024, (device_memory or 0) // 16 // 2**20)


def get_workspace_mib() -> float:
    """The bound set by `set_workspace_mib`, in MiB."""
    return _workspace_bytes / 2**20


def bytes_set() -> int:
    """That bound, in bytes."""
    return _workspace_bytes


@contextmanager
def bounded_by(num_bytes: int) -> Iterator[None]:
    """The bound of what runs inside, in this thread: a call has one, from its forward to its
    backward, whatever is set in between."""
    before = getattr(_of_call, "num_bytes", None)
    _of_call.num_bytes = num_bytes
    try:
        yield
    finally:
        _of_call.num_bytes = before


def limit() -> int:
    """Bytes that the call which runs in this thread may take; outside of one, those set."""
    num_bytes = getattr(_of_call, "num_bytes", None)
    return _workspace_bytes if num_bytes is None else num_bytes


def kept_rows(num_rows: int, row_bytes: int) -> int:
    """Rows of a call whose exponentials the workspace holds, the first ones: all, or whole groups
    of 128, or none where it holds so few that keeping them would not pay."""
    most = limit()
    if num_rows * row_bytes <= most:
        return num_rows
    fitting = (most - min(_SLICE_BYTES, most // 2)) // row_bytes
    whole = fitting // _KEPT_MULTIPLE * _KEPT_MULTIPLE
    return whole if whole >= _LEAST_KEPT else 0


def keeping_mode(num_rows: int, row_bytes: int) -> str:
    """Mode of a call whose backward may use kept exponentials: store, partial or lean."""
    kept = kept_rows(num_rows, row_bytes)
    if kept == num_rows:
        return "store"
    return "partial" if kept else "lean"


def tile_shape(vocab: int, hidden: int, device: torch.device) -> tuple[int, int]:
    """Rows R and columns C of a logits tile: what suits the device, shrunk to the workspace.

    At most these are live at once, all float32 (backward of the KL with a softcap): four tiles of
    logits, three slices of head weights (policy, reference, gradient) and two tiles of hidden
    states, 4·R·C + 3·C·D + 2·R·D numbers. A quarter of the workspace goes to the slices.

    The shape does not depend on the number of rows, so neither do a row's bits.

    Args:
        vocab, hidden: V and D, the larger D if policy and reference differ.
        device: Where the op runs.
    """
    rows, cols = _PREFERRED_TILE_CPU if device.type == "cpu" else _PREFERRED_TILE_GPU
    numbers = limit() // 4
    cols = max(1, min(vocab, cols, numbers // 4 // (3 * hidden)))
    # behind its sweep TDPO1's value takes four tiles in float64
    rows = min(rows, numbers * 3 // 4 // max(4 * cols + 2 * hidden, 8 * hidden))
    return max(ROW_MULTIPLE, rows // ROW_MULTIPLE * ROW_MULTIPLE), cols


def workspace_bytes(vocab: int, hidden: int, device_type: str) -> int:
    """What the ops hold at most beside inputs, results and exponentials: to plan with.

    Args:
        vocab, hidden: V and D.
        device_type: "cpu" or "cuda".
    """
    if device_type != "cpu":
        return min(limit(), _LEAN_BYTES)
    rows, cols = tile_shape(vocab, hidden, torch.device(device_type))
    return min(limit(), 4 * (4 * rows * cols + 3 * cols * hidden + 2 * rows * hidden))


def slices(stop: int, step: int, *, start: int = 0) -> Iterator[slice]:
    """[start, stop) cut into pieces of `step`, the last one shorter."""
    for first in range(start, stop, step):
        yield slice(first, min(first + step, stop))
