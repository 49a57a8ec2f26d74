"""Prefetching of results in a background thread."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")

AHEAD = 3
"""Maximum number of results computed ahead."""


@contextmanager
def prefetch(make: Callable[[int], Item], indices: Iterable[int]) -> Iterator[Iterator[Item]]:
    """Iterate over `make(index)`, computed in a thread up to `AHEAD` results in advance.

    Leaving the context ends the thread, also before the iteration is complete or after an error. An
    error in the thread is raised when its result is requested.
    """
    thread = ThreadPoolExecutor(1, thread_name_prefix="fastpref-feed")
    left = iter(indices)
    ahead = deque(thread.submit(make, index) for index in islice(left, AHEAD))

    def results() -> Iterator[Item]:
        while ahead:
            result = ahead.popleft().result()
            ahead.extend(thread.submit(make, index) for index in islice(left, 1))
            yield result

    try:
        yield results()
    finally:
        thread.shutdown(cancel_futures=True)
