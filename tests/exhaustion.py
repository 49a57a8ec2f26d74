"""Memory that runs out at a chosen operation, wherever that is; file descriptors that run out."""

import os
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode


@contextmanager
def no_more_files() -> Iterator[None]:
    """While entered, this process can open nothing: EMFILE."""
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    lowest_free = os.open(os.devnull, os.O_RDONLY)
    os.close(lowest_free)
    resource.setrlimit(resource.RLIMIT_NOFILE, (lowest_free, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)


class Exhaustion(TorchDispatchMode):
    """Counts operations that make a tensor while entered, and fails at some of them, once each.

    Args:
        fail_at: Numbers of the operations, from 0; empty: none fails.
    """

    def __init__(self, *fail_at: int) -> None:
        super().__init__()
        self.count = 0
        self.failed: list[str] = []
        self._fail_at = set(fail_at)

    def __torch_dispatch__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: dict[str, Any] | None = None,
    ) -> Any:
        number, self.count = self.count, self.count + 1
        if number in self._fail_at:
            self._fail_at.discard(number)
            self.failed.append(str(func))
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")
        return func(*args, **(kwargs or {}))
