"""Results made ahead of whoever asks for them, in a thread."""

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from typing import Generic, TypeVar

Item = TypeVar("Item")


class Prefetch(Generic[Item]):
    """Results of `make`, computed in a thread up to `depth` ahead of whoever iterates.

    To be entered; leaving ends the thread, wherever the iteration stands and whatever was raised.
    An error in the thread is raised where its result was due.
    """

    def __init__(
        self, make: Callable[[int], Item], indices: Iterable[int], *, depth: int = 2
    ) -> None:
        self._make = make
        self._indices = indices
        self._results: queue.Queue[tuple[Item | None, BaseException | None]] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, name="fastpref-feed", daemon=True)

    def __enter__(self) -> Iterator[Item]:
        self._thread.start()
        return self._iterate()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()

    def _iterate(self) -> Iterator[Item]:
        for _ in self._indices:
            result, error = self._results.get()
            if error is not None:
                raise error
            assert result is not None
            yield result

    def _work(self) -> None:
        for index in self._indices:
            try:
                result: tuple[Item | None, BaseException | None] = (self._make(index), None)
            except BaseException as error:
                result = (None, error)
            while not self._stopped.is_set():
                try:
                    self._results.put(result, timeout=0.1)
                    break
                except queue.Full:
                    pass
            if self._stopped.is_set() or result[1] is not None:
                return
