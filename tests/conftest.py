"""One thread, no network, no trace in the user's caches."""

import gc
import logging
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import hypothesis
import pytest

# before anything imports torch, datasets or huggingface_hub, which read these once
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["HF_HUB_DISABLE_PROGRESS_BARS"] = "1"
# what is started in the background of a script ignores Ctrl-C, and so would all that tests start
if signal.getsignal(signal.SIGINT) is signal.SIG_IGN:
    signal.signal(signal.SIGINT, signal.default_int_handler)
# gone when the process ends
DATASETS_CACHE = tempfile.TemporaryDirectory(prefix="fastpref-tests-", ignore_cleanup_errors=True)
os.environ["HF_DATASETS_CACHE"] = DATASETS_CACHE.name


# how long an example takes is the machine's affair; which ones are drawn follows from the test, so
# that it passes here if it passed there, and --hypothesis-profile=search looks for others
hypothesis.settings.register_profile("search", deadline=None)
hypothesis.settings.register_profile("settled", deadline=None, derandomize=True)
hypothesis.settings.load_profile("settled")


def pytest_collection_finish():
    """What the imports made is half a million objects that garbage collection need not visit."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()


@pytest.fixture(autouse=True)
def logger_as_imported():
    """A command line run within the process makes the project's logger its own: that of the test
    before, or of a fixture of this one's module."""
    logger = logging.getLogger("fastpref")
    logger.handlers.clear()
    logger.setLevel(logging.NOTSET)
    logger.propagate = True


@pytest.fixture(autouse=True)
def arithmetic_as_named(monkeypatch):
    """16 bits are 16 bits, whatever the CPU of the tests has units for."""
    monkeypatch.setattr("fastpref.model.precision.has_units", lambda dtype: True)


@pytest.fixture(autouse=True)
def shortcuts(request, monkeypatch):
    """Pictures are blank but where a test looks at one, memory is counted once a model, and rows
    are read once but in the tests of reading."""
    from shortcuts import count_once, leave_pictures_blank, read_once

    if request.node.get_closest_marker("looks_at_pictures") is None:
        leave_pictures_blank(monkeypatch.setattr)
    if request.node.get_closest_marker("counts_memory") is None:
        count_once(monkeypatch.setattr)
    if "data" not in request.node.path.parts:
        read_once(monkeypatch.setattr)


@pytest.fixture
def small_disk(tmp_path) -> Iterator[Path]:
    """A file system of its own, of two megabytes."""
    disk = tmp_path / "disk"
    disk.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(disk)]
    if shutil.which("mount") is None or subprocess.run(mount, capture_output=True).returncode:
        pytest.skip("mounting is not permitted here")
    yield disk
    subprocess.run(["umount", str(disk)], check=True)
