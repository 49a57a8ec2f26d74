"""torch's setting for a CPU's bfloat16 units, which the whole process shares."""

import threading

import pytest
import torch
from fastpref_kernels.gemm import matrix_units


def setting() -> str:
    return torch.backends.mkldnn.matmul.fp32_precision


@pytest.fixture(autouse=True)
def as_it_was():
    before = torch.backends.fp32_precision
    yield
    torch.backends.fp32_precision = before


def test_units_are_on_within_and_as_they_were_behind():
    before = setting()
    with matrix_units(True):
        assert setting() == "bf16"
        with matrix_units(True):
            pass
        with matrix_units(False):
            assert setting() == "bf16"
    assert setting() == before
    with pytest.raises(ZeroDivisionError), matrix_units(True):
        raise ZeroDivisionError
    assert setting() == before


@pytest.mark.parametrize("enabled", [False, True])
def test_a_setting_that_follows_torchs_general_one_still_does(enabled):
    torch.backends.fp32_precision = "bf16"
    with matrix_units(enabled):
        pass
    torch.backends.fp32_precision = "ieee"
    assert setting() != "bf16"


def test_the_last_of_two_threads_gives_back_what_the_first_one_found():
    before, first_is_in, second_is_in = setting(), threading.Event(), threading.Event()
    within = []

    def first():
        with matrix_units(True):
            first_is_in.set()
            second_is_in.wait(10)
        within.append(setting())

    thread = threading.Thread(target=first)
    thread.start()
    first_is_in.wait(10)
    with matrix_units(True):
        second_is_in.set()
        thread.join()
        assert (within, setting()) == (["bf16"], "bf16")
    assert setting() == before
