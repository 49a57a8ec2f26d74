"""Checkpoints of several ranks: bitwise on as many, the same state on any other number."""

import datetime
import logging
import resource
import time
import warnings
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from ranks import run_on_ranks
from small_training import SmallTraining, assert_same_state, find_checkpoint, raise_if_failed

from fastpref.checkpoint import store as stores
from fastpref.checkpoint.agreement import AgreedError, Agreement
from fastpref.checkpoint.load import load_checkpoint
from fastpref.checkpoint.store import CheckpointStore
from fastpref.distributed import World, init_world
from fastpref.errors import CheckpointError, DistributedError

CPU = torch.device("cpu")
OPTIMIZERS = ("AdamW", "Rprop", "RMSprop")
"""Fused on DTensors, on each rank's own shards, and the loop over DTensors."""
STOP, END = 3, 6
"""Steps at which training is saved, and at which it ends."""


def save(run_dir: Path, agreement: Agreement, training: SmallTraining, step: int) -> None:
    run_dir.mkdir(exist_ok=True)
    with CheckpointStore(run_dir, agreement, CPU, asynchronous=True, keep=1) as store:
        store.save(step, *training.parts, record={"step": step})
        raise_if_failed(store.wait()[0])


def load(run_dir: Path, agreement: Agreement, training: SmallTraining) -> dict[str, Any]:
    checkpoint = find_checkpoint("auto", run_dir, agreement)
    return load_checkpoint(checkpoint, *training.parts, agreement=agreement, device=CPU)


def write_state(path: Path, training: SmallTraining) -> None:
    state = training.whole_state()
    if training.world.is_main:
        torch.save(state, path)


def read_state(path: Path) -> dict[str, Any]:
    return torch.load(path, weights_only=True)


def train_and_save(base: Path) -> None:
    """On two ranks: with dropout, which differs between ranks, and for other numbers without."""
    warnings.simplefilter("error")
    world = init_world()
    with Agreement(world) as agreement:
        for optimizer in OPTIMIZERS:
            training = SmallTraining(world, optimizer, dropout=0.3)
            torch.manual_seed(world.rank)
            training.train(0, STOP)
            save(base / optimizer, agreement, training, STOP)
            training.train(STOP, END)
            write_state(base / f"{optimizer}.pt", training)
        training = SmallTraining(world)
        training.train(0, STOP)
        save(base / "two ranks", agreement, training, STOP)
        write_state(base / "saved.pt", training)
        training.train(STOP, END)
        write_state(base / "end.pt", training)
    dist.destroy_process_group()


def resume_in_a_fresh_process(base: Path) -> None:
    """On two ranks again; and what happens where only one of them fails."""
    warnings.simplefilter("error")
    world = init_world()
    with Agreement(world) as agreement:
        for optimizer in OPTIMIZERS:
            training = SmallTraining(world, optimizer, dropout=0.3)
            assert load(base / optimizer, agreement, training) == {"step": STOP}
            training.train(STOP, END)
            assert_same_state(training.whole_state(), read_state(base / f"{optimizer}.pt"))
        check_errors_are_shared(world, agreement, base)
        check_one_rank_that_cannot_write(world, agreement, base / "failing")
        check_ranks_that_differ(world, agreement, base / "differing")
        check_a_disk_of_each_rank_is_refused(agreement, base)
    check_rank_0_may_take_longer_than_ranks_wait(world)
    world.wait_for_all()
    dist.destroy_process_group()


def check_errors_are_shared(world: World, agreement: Agreement, base: Path) -> None:
    def fail(error: Exception) -> None:
        raise error

    with pytest.raises(CheckpointError, match=r"resume: .*nowhere is not there"):
        find_checkpoint(str(base / "nowhere"), base, agreement)
    # a bug of rank 0 keeps its class there
    with pytest.raises(KeyError if world.is_main else DistributedError, match="'bug'"):
        agreement.on_main(lambda: fail(KeyError("bug")))
    with pytest.raises(AgreedError, match=r"^rank 1: \[Errno 28\] full$"):
        agreement.each(lambda: world.rank and fail(OSError(28, "full")))
    with pytest.raises(AgreedError, match=r"^\[Errno 28\] full$") as raised:
        agreement.each(lambda: fail(OSError(28, "full")))
    assert not raised.value.is_shortage
    with pytest.raises(AgreedError, match=r"^rank 1: ") as raised:
        agreement.each(lambda: world.rank and fail(OSError(12, "Cannot allocate memory")))
    assert raised.value.is_shortage
    assert agreement.each(lambda: world.rank) == [0, 1]


def check_a_disk_of_each_rank_is_refused(agreement: Agreement, base: Path) -> None:
    stores.SIGN_SECONDS = 0.1
    own = base / f"of rank {agreement.rank}"
    (own / "checkpoints").mkdir(parents=True)
    with pytest.raises(CheckpointError, match=r"rank 1: .* is not the folder that rank 0 has"):
        CheckpointStore(own, agreement, CPU, asynchronous=True, keep=1)
    assert not list((own / "checkpoints").iterdir())


def check_rank_0_may_take_longer_than_ranks_wait(world: World) -> None:
    def read_every_byte() -> str:
        time.sleep(1.5)
        return "whole"

    with Agreement(replace(world, timeout=datetime.timedelta(seconds=1))) as impatient:
        assert impatient.on_main(read_every_byte) == "whole"


def check_one_rank_that_cannot_write(world: World, agreement: Agreement, run_dir: Path) -> None:
    run_dir.mkdir(exist_ok=True)
    training = SmallTraining(world)
    training.train(0, 1)
    before = training.whole_state()
    with CheckpointStore(run_dir, agreement, CPU, asynchronous=True, keep=1) as store:
        limits = resource.getrlimit(resource.RLIMIT_FSIZE)
        if not world.is_main:
            resource.setrlimit(resource.RLIMIT_FSIZE, (1000, limits[1]))
        store.save(1, *training.parts, record={})
        [report] = store.wait()
        assert "rank 1: " in report.error and "File too large" in report.error
        assert "rank 0" not in report.error
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
        assert_same_state(training.whole_state(), before)
        store.save(1, *training.parts, record={})
        raise_if_failed(store.wait()[0])
    assert find_checkpoint("auto", run_dir, agreement).step == 1


def check_ranks_that_differ(world: World, agreement: Agreement, run_dir: Path) -> None:
    run_dir.mkdir(exist_ok=True)
    training = SmallTraining(world)
    training.train(0, 1)
    if not world.is_main:
        training.optimizer.param_groups[0]["weight_decay"] = 0.5
    with CheckpointStore(run_dir, agreement, CPU, asynchronous=True, keep=1) as store:
        store.save(1, *training.parts, record={})
        assert "the ranks' optimizers differ" in store.wait()[0].error
        if not world.is_main:
            training.optimizer.state[training.policy.scales]["history"] = []
        store.save(2, *training.parts, record={})
        assert "rank 1: AdamW keeps history of scales" in store.wait()[0].error


def go_on_with_other_ranks(base: Path, saved_by: str, saved_to: str) -> None:
    """The checkpoint's state, its continuation up to rounding, and a checkpoint of these ranks."""
    warnings.simplefilter("error")
    world = init_world()
    with Agreement(world) as agreement:
        training = SmallTraining(world)
        assert load(base / saved_by, agreement, training) == {"step": STOP}
        assert_same_state(training.whole_state(), read_state(base / "saved.pt"))
        save(base / saved_to, agreement, training, STOP)
        training.train(STOP, END)
        assert_same_state(training.whole_state(), read_state(base / "end.pt"), tolerance=1e-5)
    dist.destroy_process_group()


@pytest.fixture(scope="module")
def base(tmp_path_factory) -> Path:
    """A folder with what two ranks saved, and where an uninterrupted run of theirs ended."""
    base = tmp_path_factory.mktemp("ranks")
    run_on_ranks(train_and_save, 2, base)
    return base


def test_two_fresh_ranks_go_on_bitwise_and_fail_together(base):
    run_on_ranks(resume_in_a_fresh_process, 2, base)


def test_the_state_moves_from_two_ranks_to_three_to_one(base, caplog):
    run_on_ranks(go_on_with_other_ranks, 3, base, "two ranks", "three ranks")
    with caplog.at_level(logging.WARNING):
        go_on_with_other_ranks(base, "three ranks", "one rank")
    assert "saved by 3 ranks, loaded by 1" in caplog.text


def test_the_state_moves_from_two_ranks_to_one(base):
    go_on_with_other_ranks(base, "two ranks", "one rank too")
