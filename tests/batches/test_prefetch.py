"""Batches are made ahead, in order, and the thread that makes them ends whatever happens."""

import threading
import time

import pytest

from fastpref.batches.prefetch import prefetch


def feeding() -> bool:
    return any(thread.name.startswith("fastpref-feed") for thread in threading.enumerate())


def test_results_come_in_order_and_no_more_are_made_than_are_to_be_ahead():
    made = []
    with prefetch(lambda i: made.append(i) or i * i, range(20)) as results:
        assert next(results) == 0
        time.sleep(0.3)
        assert made == [0, 1, 2, 3]
        assert list(results) == [i * i for i in range(1, 20)]
    assert not feeding()


def test_results_are_made_one_at_a_time():
    # what makes them keeps the epoch that it is in
    with prefetch(lambda _: threading.get_ident(), range(20)) as results:
        assert len(set(results)) == 1


def test_an_error_is_raised_where_its_result_was_due():
    def make(index: int) -> int:
        if index == 2:
            raise KeyError("row 2")
        return index

    taken = []
    with pytest.raises(KeyError, match="row 2"), prefetch(make, range(5)) as results:
        for result in results:
            taken.append(result)
    assert taken == [0, 1]
    assert not feeding()


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_leaving_early_ends_the_thread(error):
    with pytest.raises(error), prefetch(lambda index: index, range(10**9)) as results:
        next(results)
        raise error
    assert not feeding()
