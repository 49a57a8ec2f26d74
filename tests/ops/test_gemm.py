"""Dtypes of the GEMMs, and torch's setting for a CPU's bfloat16 units, which a process shares."""

import threading

import pytest
import torch
from fastpref_kernels.gemm import matrix_units
from fastpref_kernels.head import Head
from torch._subclasses.fake_tensor import FakeTensorMode


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


def test_the_gemms_dtype_follows_from_the_gpu_of_the_tensors_and_not_from_the_current_one(
    monkeypatch,
):
    monkeypatch.setattr(torch.version, "hip", None)
    old, new = torch.device("cuda", 0), torch.device("cuda", 1)
    capabilities = {old: (7, 5), new: (9, 0)}
    monkeypatch.setattr(torch.cuda, "get_device_capability", capabilities.__getitem__)
    with FakeTensorMode():
        dtypes = [
            Head(
                torch.empty(4, 8, dtype=torch.bfloat16, device=device),
                torch.empty(16, 8, dtype=torch.bfloat16, device=device),
                None,
                1.0,
                None,
            ).gemm_dtype
            for device in (old, new)
        ]
    assert dtypes == [torch.float32, torch.bfloat16]
