"""Bytes that are in use while something is computed, with or without memory behind them."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Counts the storages that operators make while it is entered, until they are freed.

    What it counts may lie on the meta device: a whole step can be counted without a byte of memory.
    Views and results in place are the storage that they look at.

    Args:
        present: Tensors that were there before, which do not count.
    """

    def __init__(self, present: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        """Now."""
        self.peak = 0
        """The most so far."""
        self._known: dict[int, weakref.ref] = {}
        for tensor in present:
            self._meet(tensor, num_bytes=0)

    def restart_peak(self) -> None:
        """Forget how much there has been."""
        self.peak = self.live

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        if func is torch.ops.aten._grouped_mm.default and args[0].is_meta:
            func = _grouped_product
        if func is torch.ops.aten._local_scalar_dense.default and args[0].dtype == torch.bool:
            # models ask whether a mask leaves all tokens in, or a row is one sequence
            return True if args[0].is_meta else func(*args)
        results = func(*args, **(kwargs or {}))
        for result in tree_leaves(results):
            if isinstance(result, Tensor):
                self._meet(result, num_bytes=result.untyped_storage().nbytes())
        return results

    def _meet(self, tensor: Tensor, *, num_bytes: int) -> None:
        storage: torch.UntypedStorage = tensor.untyped_storage()
        place = id(storage)
        if place in self._known:
            return
        self.live += num_bytes
        self.peak = max(self.peak, self.live)

        def forget(_: Any) -> None:
            self.live -= num_bytes
            del self._known[place]

        self._known[place] = weakref.ref(storage, forget)


def _grouped_product(
    a: Tensor,
    b: Tensor,
    offs: Tensor | None = None,
    bias: Tensor | None = None,
    out_dtype: torch.dtype | None = None,
) -> Tensor:
    """The result of experts' products; torch's own rule without memory takes bfloat16 alone.

    Args:
        a, b: (rows, K) and (experts, K, N), or in a weight's gradient (M, rows) and (rows, N).
        offs: (experts,) where each expert's rows end.
        bias: As torch's operator has it, never given.
        out_dtype: None for that of `a`.
    """
    experts = () if offs is None or b.dim() == 3 else offs.shape
    return a.new_empty(*experts, a.shape[0], b.shape[-1], dtype=out_dtype or a.dtype)
