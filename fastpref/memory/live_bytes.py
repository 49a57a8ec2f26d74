"""Bytes of tensor storage in use during a computation, on real devices or the meta device."""

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves


class LiveBytes(TorchDispatchMode):
    """Dispatch mode that counts the storages created by operators, until they are freed.

    Works on the meta device too: a whole step can be counted without allocating memory. Views and
    in-place results share a storage and count once.

    Args:
        present: Tensors that exist already and are not counted.
    """

    def __init__(self, present: Iterable[Tensor] = ()) -> None:
        super().__init__()
        self.live = 0
        """Bytes in use now."""
        self.peak = 0
        """Maximum of `live` so far."""
        self._known: dict[int, weakref.ref] = {}
        for tensor in present:
            self._meet(tensor, num_bytes=0)

    def restart_peak(self) -> None:
        """Reset the peak to the bytes in use now."""
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
            # models branch on whether a mask is all ones, or a row is one sequence
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
    """Result of a grouped GEMM (mixture of experts) on meta; torch's own rule takes bfloat16 only.

    Args:
        a, b: (rows, K) and (experts, K, N), or for a weight's gradient (M, rows) and (rows, N).
        offs: (experts,) end of each expert's rows.
        bias: Part of torch's signature; never given.
        out_dtype: None for the dtype of `a`.
    """
    experts = () if offs is None or b.dim() == 3 else offs.shape
    return a.new_empty(*experts, a.shape[0], b.shape[-1], dtype=out_dtype or a.dtype)
