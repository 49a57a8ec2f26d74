"""Training goes on from a checkpoint as if it had never stopped, to the last bit."""

import logging
import os
from pathlib import Path

import pytest
import torch
from small_training import SmallTraining, assert_same_state, find_checkpoint, raise_if_failed
from torch.distributed.checkpoint import filesystem

from fastpref.checkpoint.agreement import Agreement
from fastpref.checkpoint.folders import Best
from fastpref.checkpoint.load import load_checkpoint, read_record
from fastpref.checkpoint.size import estimate_bytes
from fastpref.checkpoint.snapshot import HostCopies
from fastpref.checkpoint.store import CheckpointStore
from fastpref.errors import CheckpointError

# the whole file on a GPU, where copies are pinned and there is one more generator
pytestmark = [
    pytest.mark.filterwarnings("error", "ignore:torch.distributed is disabled"),
    *([pytest.mark.gpu] if torch.cuda.is_available() else []),
]
DEVICE = torch.device("cuda", 0) if torch.cuda.is_available() else torch.device("cpu")


def store_in(run_dir: Path, agreement: Agreement, **options) -> CheckpointStore:
    defaults = {"asynchronous": False, "keep": 3}
    return CheckpointStore(run_dir, agreement, DEVICE, **(defaults | options))


def save_once(run_dir, agreement, training, step, **options) -> None:
    with store_in(run_dir, agreement, **options) as store:
        store.save(step, *training.parts, record={"step": step})
        for report in store.wait():
            raise_if_failed(report)


def load_newest(run_dir, agreement, training) -> dict:
    checkpoint = find_checkpoint("auto", run_dir, agreement)
    return load_checkpoint(checkpoint, *training.parts, agreement=agreement, device=DEVICE)


OPTIMIZERS = "Adadelta Adafactor Adagrad Adam AdamW Adamax ASGD NAdam RAdam RMSprop Rprop SGD"


@pytest.mark.parametrize("step", [0, 3])
@pytest.mark.parametrize("optimizer", OPTIMIZERS.split())
def test_training_goes_on_bitwise_with_every_optimizer(world, agreement, tmp_path, optimizer, step):
    training = SmallTraining(world, optimizer, dropout=0.3)
    training.train(0, step)
    save_once(tmp_path, agreement, training, step)
    training.train(step, 6)
    resumed = SmallTraining(world, optimizer, dropout=0.3)
    torch.manual_seed(123)
    assert load_newest(tmp_path, agreement, resumed) == {"step": step}
    resumed.train(step, 6)
    assert_same_state(resumed.whole_state(), training.whole_state())


@pytest.mark.parametrize("asynchronous", [False, True])
def test_saving_does_not_touch_the_training(world, agreement, tmp_path, asynchronous):
    undisturbed = SmallTraining(world, dropout=0.3)
    undisturbed.train(0, 4)
    saved = SmallTraining(world, dropout=0.3)
    with store_in(tmp_path, agreement, asynchronous=asynchronous) as store:
        for step in range(5):
            store.save(step, *saved.parts, record={})
            saved.train(step, min(step + 1, 4))
    assert_same_state(saved.whole_state(), undisturbed.whole_state())


def test_training_may_go_on_while_its_state_is_written(world, agreement, tmp_path):
    training = SmallTraining(world, width=400)
    training.train(0, 1)
    expected = training.whole_state()
    with store_in(tmp_path, agreement, asynchronous=True) as store:
        store.save(1, *training.parts, record={})
        with torch.no_grad():
            for parameter in training.policy.parameters():
                parameter.zero_()
    load_newest(tmp_path, agreement, training)
    assert_same_state(training.whole_state(), expected)


def test_who_writes_copies_does_not_wait_for_what_training_has_a_gpu_do(
    world, agreement, tmp_path, monkeypatch
):
    # of torch; for each 10 MB it waits for the stream that training computes on
    monkeypatch.setattr(filesystem, "_OverlappingCpuLoader", None)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    save_once(tmp_path, agreement, SmallTraining(world), 0, asynchronous=True)


def test_a_forward_without_backward_leaves_nothing_gathered_in_the_checkpoint(
    world, agreement, tmp_path
):
    training = SmallTraining(world)
    training.train(0, 2)
    with torch.no_grad():
        training.policy(torch.zeros(1, dtype=torch.int64, device=DEVICE))
    save_once(tmp_path, agreement, training, 2)
    resumed = SmallTraining(world)
    load_newest(tmp_path, agreement, resumed)
    assert_same_state(resumed.whole_state(), training.whole_state())
    assert resumed.policy.head.weight is resumed.policy.embedding.weight


def test_a_tied_weight_is_saved_once_and_a_frozen_one_not_at_all(world, agreement, tmp_path):
    training = SmallTraining(world)
    names = {name for name in training.whole_state() if name.startswith("weights.")}
    assert "weights.embedding.weight" in names
    assert "weights.num_forwards" in names
    assert not names & {"weights.head.weight", "weights.frozen.weight", "weights.frozen.bias"}


def test_one_save_is_in_flight_at_a_time_and_the_newest_are_kept(world, agreement, tmp_path):
    training = SmallTraining(world)
    with store_in(tmp_path, agreement, asynchronous=True, keep=2) as store:
        for step in range(1, 6):
            training.train(step - 1, step)
            store.save(step, *training.parts, record={})
        reports = store.wait()
    assert [report.step for report in reports] == [1, 2, 3, 4, 5]
    assert [report.error for report in reports] == [None] * 5
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [
        "latest",
        "step-00000004",
        "step-00000005",
    ]
    assert (tmp_path / "checkpoints" / "latest").read_text() == "step-00000005\n"


def test_the_same_step_is_saved_once(world, agreement, tmp_path):
    training = SmallTraining(world)
    with store_in(tmp_path, agreement) as store:
        store.save(1, *training.parts, record={})
        store.save(1, *training.parts, record={})
        assert len(store.wait()) == 1
    resumed_from = find_checkpoint("auto", tmp_path, agreement)
    with store_in(tmp_path, agreement, resumed_from=resumed_from) as store:
        store.save(1, *training.parts, record={})
        assert store.wait() == []
    assert sorted(os.listdir(tmp_path / "checkpoints")) == ["latest", "step-00000001"]


def test_checkpoints_of_an_abandoned_history_are_set_aside(world, agreement, tmp_path, caplog):
    training = SmallTraining(world)
    with store_in(tmp_path, agreement) as store:
        for step in (1, 2, 3):
            store.save(step, *training.parts, record={})
    (tmp_path / "checkpoints" / "step-00000004.partial").mkdir()
    (tmp_path / "checkpoints" / "step-00000003.deleted").mkdir()
    first = find_checkpoint(str(tmp_path / "checkpoints" / "step-00000001"), tmp_path, agreement)
    with caplog.at_level(logging.WARNING), store_in(tmp_path, agreement, resumed_from=first):
        pass
    assert sorted(os.listdir(tmp_path / "checkpoints")) == [
        "latest",
        "step-00000001",
        "step-00000002.abandoned",
        "step-00000003.abandoned",
    ]
    assert "step-00000003.abandoned" in caplog.text
    # the pointer is stale by now
    assert find_checkpoint("auto", tmp_path, agreement).step == 1


def test_a_start_from_elsewhere_sets_everything_aside(world, agreement, tmp_path):
    training = SmallTraining(world)
    for name, step in (("here", 1), ("elsewhere", 2)):
        save_once(tmp_path / name, agreement, training, step)
    elsewhere = find_checkpoint(str(tmp_path / "elsewhere"), tmp_path / "here", agreement)
    save_once(tmp_path / "here", agreement, training, 2, resumed_from=elsewhere)
    assert sorted(os.listdir(tmp_path / "here" / "checkpoints")) == [
        "latest",
        "step-00000001.abandoned",
        "step-00000002",
    ]


def test_the_best_checkpoint_is_kept_by_the_metric_of_its_weights(world, agreement, tmp_path):
    training = SmallTraining(world)
    best = Best("loss", higher_is_better=False)
    with store_in(tmp_path, agreement, keep=1, best=best) as store:
        for step, loss in enumerate([0.9, 0.4, 0.7, float("nan"), 0.5], start=1):
            store.save(step, *training.parts, record={}, metrics={"loss": loss})
    kept = {path.name for path in (tmp_path / "checkpoints").glob("step-*")}
    assert kept == {"step-00000002", "step-00000005"}


def test_auto_starts_anew_where_there_is_nothing(agreement, tmp_path):
    assert find_checkpoint("auto", tmp_path, agreement) is None
    assert find_checkpoint("auto", tmp_path / "no such folder", agreement) is None


def test_the_record_is_read_without_a_model(world, agreement, tmp_path):
    record = {"step": 1, "examples": 8, "fingerprints": {"model": "abc"}, "best": None, "lr": 1e-7}
    with store_in(tmp_path, agreement) as store:
        store.save(1, *SmallTraining(world).parts, record=record)
    assert read_record(find_checkpoint("auto", tmp_path, agreement), agreement) == record


def test_another_learning_rate_applies_at_the_checkpoints_place_in_the_schedule(
    world, agreement, tmp_path
):
    training = SmallTraining(world, lr=0.01)
    training.train(0, 3)
    save_once(tmp_path, agreement, training, 3)
    resumed = SmallTraining(world, lr=0.02)
    load_newest(tmp_path, agreement, resumed)
    for step in range(3, 6):
        [rate], [expected] = resumed.scheduler.get_last_lr(), training.scheduler.get_last_lr()
        assert rate == resumed.optimizer.param_groups[0]["lr"]
        assert rate == pytest.approx(2 * expected, rel=1e-12)
        resumed.train(step, step + 1)
        training.train(step, step + 1)


def test_momentum_that_was_switched_on_since_begins_at_nothing(world, agreement, tmp_path):
    training = SmallTraining(world, "RMSprop")
    training.train(0, 3)
    save_once(tmp_path, agreement, training, 3)
    resumed = SmallTraining(world, "RMSprop")
    for each in (training, resumed):
        each.optimizer.param_groups[0]["momentum"] = 0.9
    load_newest(tmp_path, agreement, resumed)
    # by itself an optimizer that has begun makes no further state
    for kept in training.optimizer.state.values():
        kept["momentum_buffer"] = torch.zeros_like(kept["square_avg"])
    for each in (training, resumed):
        each.train(3, 5)
    assert_same_state(resumed.whole_state(), training.whole_state())


def test_what_does_not_fit_is_refused_by_name(world, agreement, tmp_path):
    save_once(tmp_path, agreement, SmallTraining(world), 1)
    with pytest.raises(CheckpointError, match=r"holds state of AdamW, not of RMSprop"):
        load_newest(tmp_path, agreement, SmallTraining(world, "RMSprop"))
    with pytest.raises(CheckpointError, match=r"scales has shape \(2, 5\) in it, \(2, 6\)"):
        load_newest(tmp_path, agreement, SmallTraining(world, width=6))
    thawed = SmallTraining(world)
    thawed.policy.frozen.requires_grad_(True)
    with pytest.raises(CheckpointError, match=r"it has no frozen\.weight"):
        load_newest(tmp_path, agreement, thawed)
    frozen = SmallTraining(world)
    frozen.policy.scales.requires_grad_(False)
    with pytest.raises(CheckpointError, match=r"it has scales, which is not trained here"):
        load_newest(tmp_path, agreement, frozen)


def test_an_optimizer_that_keeps_lists_is_refused_by_name(world, agreement, tmp_path):
    training = SmallTraining(world)
    training.train(0, 1)
    parameter = training.policy.scales
    training.optimizer.state[parameter]["history"] = [torch.zeros(1)]
    message = "AdamW keeps history of scales as a list"
    with store_in(tmp_path, agreement) as store:
        store.save(1, *training.parts, record={})
        assert message in store.wait()[0].error


@pytest.mark.parametrize("optimizer", ["AdamW", "RMSprop", "SGD", "Adafactor"])
def test_the_size_is_known_before_the_first_step(world, agreement, tmp_path, optimizer):
    training = SmallTraining(world, optimizer, width=300)
    estimated = estimate_bytes(training.policy, training.optimizer, world.size)
    training.train(0, 1)
    save_once(tmp_path, agreement, training, 1)
    actual = find_checkpoint("auto", tmp_path, agreement).manifest.num_bytes
    assert actual <= estimated <= 1.1 * actual


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device")
def test_copies_of_what_is_on_a_gpu_are_pinned_and_used_again():
    copies, tensor = HostCopies(), torch.randn(1000, device=DEVICE)
    copy = copies.fill({"weight": tensor})["weight"]
    assert copy.is_pinned() and torch.equal(copy, tensor.cpu())
    assert copies.fill({"weight": 2 * tensor})["weight"] is copy
    assert torch.equal(copy, 2 * tensor.cpu())
