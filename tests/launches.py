"""Counting what a GPU would launch, on a CPU: operators that compute something."""

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from torch.utils._python_dispatch import TorchDispatchMode

WITHOUT_KERNEL = ("empty", "new_empty", "empty_like", "empty_strided", "detach", "_unsafe_view")


class Launches(TorchDispatchMode):
    """Counts the operators that compute something."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: Counter[str] = Counter()
        self._inside_one = False

    def __torch_dispatch__(self, operator, types, args=(), kwargs=None):
        name = operator.overloadpacket.__name__
        makes_view = any(
            r.alias_info and not r.alias_info.is_write for r in operator._schema.returns
        )
        if not (makes_view or self._inside_one or name in WITHOUT_KERNEL):
            self.calls[name] += 1
        return operator(*args, **(kwargs or {}))

    @contextmanager
    def counted_as(self, name: str) -> Iterator[None]:
        """All operators inside are one launch of this name."""
        if self._inside_one:
            yield
            return
        self.calls[name] += 1
        self._inside_one = True
        try:
            yield
        finally:
            self._inside_one = False

    def take(self) -> Counter[str]:
        """What was counted; counting begins again."""
        calls, self.calls = self.calls, Counter()
        return calls
