"""A process that dies, a disk that is full, a folder that is gone: what was saved stays usable."""

import errno
import importlib
import itertools
import logging
import os
import random
import re
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from exhaustion import no_more_files
from ranks import run_on_ranks
from small_training import SmallTraining, assert_same_state, find_checkpoint, raise_if_failed
from torch.distributed.checkpoint.filesystem import FileSystemReader

from fastpref.checkpoint import direct
from fastpref.checkpoint.agreement import Agreement
from fastpref.checkpoint.folders import find_newest, folder_name
from fastpref.checkpoint.load import load_checkpoint
from fastpref.checkpoint.store import CheckpointStore
from fastpref.distributed import init_world
from fastpref.errors import CheckpointError, FastprefError

pytestmark = pytest.mark.filterwarnings("error", "ignore:torch.distributed is disabled")

CPU = torch.device("cpu")


def store_in(run_dir: Path, agreement: Agreement, **options) -> CheckpointStore:
    defaults = {"asynchronous": False, "keep": 1}
    return CheckpointStore(run_dir, agreement, CPU, **(defaults | options))


def save_endlessly(run_dir: Path) -> None:
    """Train and save after every step, and say in a file which ones were said to be saved."""
    world = init_world()
    training = SmallTraining(world, width=300)
    with (
        Agreement(world) as agreement,
        store_in(run_dir, agreement, asynchronous=True) as store,
    ):
        for step in itertools.count(1):
            training.train(step - 1, step)
            store.save(step, *training.parts, record={})
            for report in store.poll():
                raise_if_failed(report)
                (run_dir / "said.partial").write_text(str(report.step))
                (run_dir / "said.partial").rename(run_dir / "said")


def save_and_die(run_dir: Path, killed_at: int) -> None:
    """A second save that SIGKILL ends before its `killed_at`th change to the file system."""
    world = init_world()
    training = SmallTraining(world)
    changes = 0

    def count(event: str, arguments: tuple) -> None:
        nonlocal changes
        writes = event == "open" and isinstance(arguments[2], int) and arguments[2] & os.O_ACCMODE
        if writes or event in ("os.mkdir", "os.rename", "os.remove", "os.rmdir"):
            changes += 1
            if changes == killed_at:
                os.kill(os.getpid(), signal.SIGKILL)

    with Agreement(world) as agreement, store_in(run_dir, agreement) as store:
        training.train(0, 1)
        store.save(1, *training.parts, record={"step": 1})
        training.train(1, 2)
        sys.addaudithook(count)
        # deletes the first
        store.save(2, *training.parts, record={"step": 2})
        os._exit(0)


def kill_everywhere(base: Path) -> None:
    """Fork a saving process for every instant at which it can be killed, until one survives."""
    for name in ("RANK", "WORLD_SIZE"):
        del os.environ[name]
    # FSDP2 would import it in every child
    importlib.import_module("torch._dynamo")
    killed_at = 0
    status = signal.SIGKILL
    while status == signal.SIGKILL:
        killed_at += 1
        run_dir = base / f"killed-{killed_at}"
        run_dir.mkdir()
        child = _fork(save_and_die, run_dir, killed_at)
        status = os.waitpid(child, 0)[1]
    assert status == 0
    delays = random.Random(0)
    for attempt in range(3):
        run_dir = base / f"surprised-{attempt}"
        run_dir.mkdir()
        child = _fork(save_endlessly, run_dir)
        while not (run_dir / "said").exists():
            assert os.waitpid(child, os.WNOHANG) == (0, 0)
            time.sleep(0.01)
        time.sleep(delays.uniform(0, 0.1))
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)


def _fork(function: Callable[..., None], *arguments: Any) -> int:
    child = os.fork()
    if not child:
        try:
            function(*arguments)
        finally:
            os._exit(1)
    return child


def test_a_save_that_is_killed_at_any_instant_leaves_a_checkpoint(world, agreement, tmp_path):
    run_on_ranks(kill_everywhere, 1, tmp_path)
    runs = sorted(tmp_path.iterdir())
    # folders, torch's two files, ours, the renames, and the files of the first that is deleted
    assert len(runs) > 25
    expected = {}
    training = SmallTraining(world)
    for step in (1, 2, 3):
        training.train(step - 1, step)
        expected[step] = training.whole_state()
    found = []
    for run_dir in runs:
        said = run_dir / "said"
        checkpoint = find_checkpoint("auto", run_dir, agreement)
        assert checkpoint.step >= (int(said.read_text()) if said.exists() else 1)
        if said.exists():
            continue
        found.append(checkpoint.step)
        resumed = SmallTraining(world)
        load_checkpoint(checkpoint, *resumed.parts, agreement=agreement, device=CPU)
        assert_same_state(resumed.whole_state(), expected[checkpoint.step])
        # the next start finds a folder that it can save to
        with store_in(run_dir, agreement, resumed_from=checkpoint) as store:
            resumed.train(checkpoint.step, 3)
            store.save(3, *resumed.parts, record={})
            raise_if_failed(store.wait()[0])
        assert_same_state(resumed.whole_state(), expected[3])
        names = {folder_name(3), folder_name(checkpoint.step), "latest"}
        assert set(os.listdir(run_dir / "checkpoints")) == names
    assert set(found) == {1, 2}


@contextmanager
def largest_file(num_bytes: int) -> Iterator[None]:
    """A disk that takes no more: files beyond a size fail to be written, for root as well."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (num_bytes, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


@pytest.mark.parametrize("asynchronous", [False, True])
@pytest.mark.parametrize("num_bytes", [100, 2000, 30_000])
def test_a_save_that_the_disk_refuses_is_reported_and_training_goes_on(
    world, agreement, tmp_path, asynchronous, num_bytes
):
    training = SmallTraining(world)
    with store_in(tmp_path, agreement, asynchronous=asynchronous) as store:
        training.train(0, 1)
        store.save(1, *training.parts, record={})
        before = training.whole_state()
        assert store.wait()[0].error is None
        with largest_file(num_bytes):
            store.save(2, *training.parts, record={})
            [report] = store.wait()
        assert "step 2 was not saved" in report.error and "File too large" in report.error
        assert_same_state(training.whole_state(), before)
        assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-00000001"]
        # the disk has room again
        training.train(1, 3)
        store.save(3, *training.parts, record={})
        assert store.wait()[0].error is None
    assert find_newest(tmp_path / "checkpoints").step == 3


@pytest.mark.parametrize("number", [errno.EDQUOT, errno.ENOMEM])
def test_a_refusal_in_the_midst_of_a_file_is_told_as_the_system_tells_it(
    world, agreement, tmp_path, monkeypatch, number
):
    training = SmallTraining(world, width=64)
    # many writes while torch packs a tensor, the first of them refused
    monkeypatch.setattr(direct, "BLOCK_BYTES", 4096)
    real, refusals = os.write, [OSError(number, os.strerror(number))]

    def write(descriptor: int, data: memoryview) -> int:
        if refusals and len(data) == direct.BLOCK_BYTES:
            raise refusals.pop()
        return real(descriptor, data)

    monkeypatch.setattr(os, "write", write)
    with store_in(tmp_path, agreement) as store:
        store.save(1, *training.parts, record={})
        [report] = store.wait()
    assert not refusals
    assert report.error == f"step 1 was not saved: [Errno {number}] {os.strerror(number)}"
    assert report.is_shortage == (number == errno.ENOMEM)
    assert os.listdir(tmp_path / "checkpoints") == []


@pytest.mark.parametrize("error", [errno.ENOMEM, errno.EIO])
def test_memory_that_runs_out_while_a_checkpoint_is_loaded_is_told_as_that(
    world, agreement, tmp_path, monkeypatch, error
):
    training = SmallTraining(world)
    with store_in(tmp_path, agreement) as store:
        store.save(1, *training.parts, record={})
        raise_if_failed(store.wait()[0])
    checkpoint = find_newest(tmp_path / "checkpoints")

    def fail(*_: Any) -> None:
        raise OSError(error, os.strerror(error))

    def load() -> None:
        load_checkpoint(checkpoint, *training.parts, device=CPU, agreement=agreement)

    for method in ("read_metadata", "read_data"):
        with monkeypatch.context() as patch:
            patch.setattr(FileSystemReader, method, fail)
            with pytest.raises(FastprefError, match=f"cannot be loaded: .*{error}") as raised:
                load()
        assert raised.value.exit_code == (6 if error == errno.ENOMEM else 4)
    with pytest.raises(OSError) as lacking, no_more_files():
        load()
    assert lacking.value.errno == errno.EMFILE


@pytest.mark.parametrize("asynchronous", [False, True])
def test_saves_that_fail_are_reported_and_the_next_one_may_succeed(
    world, agreement, tmp_path, asynchronous
):
    training = SmallTraining(world)
    with store_in(tmp_path, agreement, asynchronous=asynchronous) as store:
        with largest_file(2000):
            for step in (1, 2, 3):
                store.save(step, *training.parts, record={})
            reports = store.wait()
        store.save(4, *training.parts, record={})
        reports += store.wait()
    assert [report.step for report in reports] == [1, 2, 3, 4]
    assert all("was not saved" in report.error for report in reports[:3])
    assert reports[3].error is None


def test_a_checkpoints_folder_that_was_removed_is_made_again(world, agreement, tmp_path):
    training = SmallTraining(world)
    with store_in(tmp_path, agreement) as store:
        shutil.rmtree(tmp_path / "checkpoints")
        store.save(1, *training.parts, record={})
        raise_if_failed(store.wait()[0])
    assert find_newest(tmp_path / "checkpoints").step == 1


def test_a_run_folder_that_was_removed_is_reported(world, agreement, tmp_path):
    run_dir = tmp_path / "run"
    training = SmallTraining(world)
    with store_in(run_dir, agreement) as store:
        shutil.rmtree(run_dir)
        store.save(1, *training.parts, record={})
        [report] = store.wait()
    with pytest.raises(CheckpointError, match=r"step 1 was not saved: .*No such file or directory"):
        raise_if_failed(report)
    assert not run_dir.exists()


def test_a_file_where_the_folder_should_be_is_reported(world, agreement, tmp_path):
    training = SmallTraining(world)
    with store_in(tmp_path, agreement) as store:
        shutil.rmtree(tmp_path / "checkpoints")
        (tmp_path / "checkpoints").write_text("")
        store.save(1, *training.parts, record={})
        assert "File exists" in store.wait()[0].error
    with pytest.raises(CheckpointError, match="cannot be used for checkpoints") as raised:
        store_in(tmp_path, agreement)
    assert raised.value.exit_code == 4


def test_a_folder_that_no_descriptor_is_left_for_ends_with_the_code_of_memory(agreement, tmp_path):
    message = "cannot be used for checkpoints: .*Too many open files"
    with pytest.raises(CheckpointError, match=message) as raised, no_more_files():
        store_in(tmp_path, agreement)
    assert raised.value.exit_code == 6


def test_a_disk_without_room_is_found_out_before_anything_is_written(world, agreement, small_disk):
    large = SmallTraining(world, width=600)
    with store_in(small_disk, agreement) as store:
        store.save(1, *large.parts, record={})
        assert re.search(r"has 0\.00 GiB free, a checkpoint takes", store.wait()[0].error)
    assert os.listdir(small_disk / "checkpoints") == []


def test_a_disk_that_fills_up_while_a_checkpoint_is_written_is_reported(
    world, agreement, small_disk
):
    training = SmallTraining(world)
    with store_in(small_disk, agreement) as store:
        store.save(1, *training.parts, record={})
        free = shutil.disk_usage(small_disk).free
        # room for the tensors, but not for what is around them
        (small_disk / "other").write_bytes(bytes(free - 16_384))
        store.save(2, *training.parts, record={})
        assert "No space left on device" in store.wait()[-1].error
    assert find_newest(small_disk / "checkpoints").step == 1
    assert sorted(os.listdir(small_disk / "checkpoints")) == ["latest", "step-00000001"]


def test_a_disk_that_becomes_read_only_is_reported(world, agreement, small_disk):
    training = SmallTraining(world)
    with store_in(small_disk, agreement) as store:
        store.save(1, *training.parts, record={})
        subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
        store.save(2, *training.parts, record={})
        assert "Read-only file system" in store.wait()[-1].error
    assert find_newest(small_disk / "checkpoints").step == 1
    with pytest.raises(CheckpointError, match="Read-only file system"):
        store_in(small_disk / "other", agreement)


def test_an_old_checkpoint_that_cannot_be_deleted_costs_no_save(world, agreement, tmp_path, caplog):
    training = SmallTraining(world)
    with store_in(tmp_path, agreement) as store:
        store.save(1, *training.parts, record={})
        # a file where the folder to be deleted would be renamed to
        (tmp_path / "checkpoints" / "step-00000001.deleted").write_text("")
        with caplog.at_level(logging.WARNING):
            store.save(2, *training.parts, record={})
        assert [report.error for report in store.wait()] == [None, None]
    assert "an old checkpoint could not be deleted" in caplog.text
    assert find_newest(tmp_path / "checkpoints").step == 2


def test_a_pointer_that_cannot_be_written_costs_no_save(world, agreement, tmp_path, caplog):
    training = SmallTraining(world)
    with store_in(tmp_path, agreement) as store, caplog.at_level(logging.WARNING):
        (tmp_path / "checkpoints" / "latest.partial").mkdir()
        store.save(1, *training.parts, record={})
        assert store.wait()[0].error is None
    assert "latest does not name step-00000001" in caplog.text
    assert find_newest(tmp_path / "checkpoints").step == 1
