"""Batches are made ahead, in order, and the thread that makes them ends whatever happens."""

import threading
import time

import pytest

from fastpref.batches.prefetch import Prefetch


def feeding() -> bool:
    return any(thread.name == "fastpref-feed" for thread in threading.enumerate())


def test_results_come_in_order_and_no_more_are_made_than_the_depth_allows():
    made = []
    with Prefetch(lambda i: made.append(i) or i * i, range(20), depth=2) as results:
        assert next(results) == 0
        time.sleep(0.3)
        # two wait, and one more is ready to
        assert made == [0, 1, 2, 3]
        assert list(results) == [i * i for i in range(1, 20)]
    assert not feeding()


def test_an_error_is_raised_where_its_result_was_due():
    def make(index: int) -> int:
        if index == 2:
            raise KeyError("row 2")
        return index

    taken = []
    with pytest.raises(KeyError, match="row 2"), Prefetch(make, range(5)) as results:
        for result in results:
            taken.append(result)
    assert taken == [0, 1]
    assert not feeding()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_leaving_early_ends_the_thread(error):
    with pytest.raises(error), Prefetch(lambda index: index, range(10**9)) as results:
        next(results)
        raise error
    assert not feeding()
