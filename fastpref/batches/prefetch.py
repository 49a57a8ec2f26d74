"""Results made ahead of whoever asks for them, in a thread."""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from itertools import islice
from typing import TypeVar

Item = TypeVar("Item")

AHEAD = 3
"""Results that are made, or are being made, before they are asked for."""


@contextmanager
def prefetch(make: Callable[[int], Item], indices: Iterable[int]) -> Iterator[Iterator[Item]]:
    """Results of `make` in the order of the indices, made in a thread up to `AHEAD` of them ahead.

    Leaving ends the thread, wherever the iteration stands and whatever was raised. An error in the
    thread is raised where its result was due.
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
