"""How many tokens are computed at once: one number for all ranks, of the memory that there is."""

import json
import os
from dataclasses import fields
from pathlib import Path
from unittest.mock import Mock, call

import pytest
import torch
from ranks import run_on_ranks
from stopped_runs import run, small_command
from tiny_models import random_rows, read_metrics, save_dataset, save_tiny_model

from fastpref.batch import Batch
from fastpref.batches.layouts import PaddedRows
from fastpref.distributed import World, init_world
from fastpref.errors import LostRankError, MemoryExhaustedError, RankMemoryError
from fastpref.memory import fitting
from fastpref.memory.fitting import Fitting, agreed_tokens
from fastpref.memory.here import available_bytes, resident_bytes, with_loaded_models
from fastpref.memory.plan import GIB, Device, MemoryPlan

ROOM = 10 * GIB


def agree(folder: Path, loaded: tuple[int, int]) -> None:
    world = init_world()
    found = agreed_tokens(
        world, 8192, 8000, room=ROOM, loaded=loaded[world.rank], peak=12 * GIB + world.rank
    )
    (folder / str(world.rank)).write_text(str(found))


@pytest.mark.parametrize("loaded", [(2 * GIB, 4 * GIB), (4 * GIB, 2 * GIB), (GIB, GIB + 512)])
def test_ranks_whose_models_take_different_memory_agree_on_a_number(tmp_path, loaded):
    run_on_ranks(agree, 2, tmp_path, loaded)
    one, two = (int((tmp_path / str(rank)).read_text()) for rank in range(2))
    assert one == two and one % 256 == 0
    # of the rank that has least: of 12 GiB 2 are too much, of all that tokens took
    most = min(8000 * (ROOM - x) // (12 * GIB - x) for x in loaded)
    assert most - 256 < one <= most


def test_what_fits_is_taken_and_never_nothing():
    world = init_world()
    try:
        for peak in (ROOM, ROOM // 2):
            assert agreed_tokens(world, 8192, 8192, room=ROOM, loaded=GIB, peak=peak) == 8192
        assert agreed_tokens(world, 8192, 8192, room=GIB, loaded=2 * GIB, peak=ROOM) == 1
    finally:
        torch.distributed.destroy_process_group()


def test_auto_keeps_a_cpu_within_its_memory_and_changes_no_number(tmp_path, monkeypatch):
    save_dataset(tmp_path, "words", num_train=16, num_test=0)
    save_tiny_model(tmp_path / "model")
    device = Device("cpu", 1, memory=0)
    monkeypatch.setattr(fitting, "device_here", lambda *_, **__: device)
    plans = []
    describe = fitting.describe_plan

    def keep_plan(plan, *args):
        plans.append(plan)
        return describe(plan, *args)

    monkeypatch.setattr(fitting, "describe_plan", keep_plan)
    options = ("n_eval_examples=0", "n_epochs=1")
    assert run(small_command(tmp_path, tmp_path / "roomy", *options)) == 0
    # what is planned without a trial leaves a tenth
    room = int(plans[0].peak(100) / fitting.UNTRIED)
    monkeypatch.setattr(fitting, "available_bytes", lambda _: room)
    assert run(small_command(tmp_path, tmp_path / "tight", *options)) == 0
    roomy, tight = (read_metrics(tmp_path / name, "train") for name in ("roomy", "tight"))
    assert [x["loss/train"] for x in tight] == pytest.approx([x["loss/train"] for x in roomy])
    [path] = (tmp_path / "tight" / "checkpoints").glob("step-*/state.json")
    assert 90 <= json.loads(path.read_text())["record"]["state"]["max_tokens"] <= 100


def test_the_memory_of_a_rank_is_its_share_of_the_machine(monkeypatch):
    physical = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "4")
    assert available_bytes(torch.device("cpu")) <= physical // 4 + resident_bytes()


def test_a_trial_that_waits_for_a_rank_without_memory_hears_of_it(monkeypatch):
    """As the host does not, once it asks for the memory that the trial has left."""

    def lost(world: World) -> None:
        raise LostRankError("a GPU waits, with no word of rank 1")

    monkeypatch.setattr(fitting, "await_device", lost)
    monkeypatch.setattr(torch.cuda, "reset_peak_memory_stats", lambda device: None)
    trial = Mock(training=Mock(caches_reference=False))
    trial.step_loss.compute.return_value = torch.zeros(1, requires_grad=True), {}
    with pytest.raises(LostRankError):
        Fitting._peak(trial, [], 256)
    trial.policy.forget_gradients.assert_not_called()


NO_MEMORY = torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")


@pytest.mark.parametrize(
    ("error", "num_ranks", "num_rows", "raised", "message"),
    [
        (None, 1, 2, None, ""),
        (NO_MEMORY, 1, 2, None, ""),
        (NO_MEMORY, 1, 1, MemoryExhaustedError, "a single row, before the first step"),
        (NO_MEMORY, 2, 2, RankMemoryError, "set packing.max_tokens=128"),
        (ValueError("of a model"), 1, 2, ValueError, "of a model"),
    ],
)
def test_of_a_trial_that_memory_does_not_hold_nothing_is_left(
    monkeypatch, error, num_ranks, num_rows, raised, message
):
    for name, value in (("reset_peak_memory_stats", None), ("max_memory_allocated", GIB)):
        monkeypatch.setattr(torch.cuda, name, lambda device, value=value: value)
    monkeypatch.setattr(fitting, "await_device", lambda world: None)
    known = []

    def compute(batch: Batch, step: int) -> tuple[torch.Tensor, dict]:
        known.append(batch.reference_logps)
        if error is not None:
            raise error
        return torch.zeros(num_rows, requires_grad=True), {}

    world = Mock(size=num_ranks, device=torch.device("cpu"))
    trial = Mock(training=Mock(caches_reference=True), world=world)
    trial.measured.rows.layout.limited_to.side_effect = lambda most: PaddedRows(max_tokens=most)
    trial.step_loss.compute.side_effect = compute
    rows = random_rows(num_rows)
    if raised is not None:
        with pytest.raises(raised, match=message):
            Fitting._peak(trial, rows, 256)
    else:
        assert Fitting._peak(trial, rows, 256) == (GIB if error is None else None)
        trial.step_loss.done.assert_called_once()
        trial.policy.forget_gradients.assert_called_once()
    [reference_logps] = known
    assert len(reference_logps) == sum(len(row[1]) + len(row[2]) for row in rows)


def test_models_that_are_loaded_are_not_counted_twice():
    nothing = dict.fromkeys((field.name for field in fields(MemoryPlan)), 0)
    models = nothing | {"masters": 4, "weights": 2, "reference": 1}
    for process, left in ((10, 3), (6, 0)):
        assert with_loaded_models(MemoryPlan(**models | {"process": process})).process == left


@pytest.mark.parametrize(("limit", "expected"), [(None, 64), (512, 512)])
def test_a_limit_that_is_given_is_kept_and_the_poorest_rank_decides(monkeypatch, limit, expected):
    monkeypatch.setattr(fitting, "available_bytes", lambda device: ROOM)
    monkeypatch.setattr(fitting, "auto_tokens", lambda plan, available: 1024)
    trial = Mock(_most_tokens=300)
    trial.world.device.type = "cuda"
    trial.world.agree_max.side_effect = lambda value: max(value, -GIB)
    trial._confirm.return_value = 64
    plan = trial.world.on_main.return_value
    assert Fitting.fit(trial, limit) == expected
    # of a step that has fewer tokens it is told what these take
    trial._say.assert_called_once_with(plan, 300, GIB)
    assert trial._confirm.call_args_list == [call(1024, plan, GIB)] * (limit is None)


def test_a_plan_that_takes_more_than_there_is_is_warned_of(monkeypatch, caplog):
    monkeypatch.setattr(fitting, "describe_plan", lambda *_: "memory, planned")
    for peak, warned in ((ROOM, 0), (ROOM + 1, 1)):
        Fitting._say(Mock(), Mock(**{"peak.return_value": peak}), 256, ROOM)
        assert len([x for x in caplog.messages if "more than there is" in x]) == warned


@pytest.mark.parametrize(
    ("planned", "peaks", "expected"),
    [
        # of the 10 GiB, what comes later leaves as much as the trial took, and half of that
        ({"optimizer": 3 * GIB, "gradients": GIB, "reserve": GIB}, [5 * GIB], 8192),
        ({"optimizer": 4 * GIB, "gradients": 2 * GIB, "reserve": GIB}, [5 * GIB], 2048),
        ({"optimizer": 4 * GIB, "gradients": 2 * GIB, "reserve": GIB}, [None, 5 * GIB], 1024),
        (None, [5 * GIB], 8192),
        (None, [None, None, 5 * GIB], 1024),
    ],
)
def test_what_fits_leaves_room_for_what_comes_later(monkeypatch, planned, peaks, expected):
    """A step has 4096 tokens at most, and models of 1 GiB are loaded."""
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: GIB)
    trial = Mock(_most_tokens=4096)
    trial.world.agree_max.side_effect = lambda value: value
    trial._peak.side_effect = peaks
    plan = None if planned is None else Mock(**planned)
    assert Fitting._confirm(trial, 8192, plan, ROOM) == expected
    tried = [trial_of.args[1] for trial_of in trial._peak.call_args_list]
    assert tried == [4096 // 2**i for i in range(len(peaks))]
