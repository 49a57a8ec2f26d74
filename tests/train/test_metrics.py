"""What the log of a run says by itself."""

import math
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from ranks import ALONE

from fastpref.errors import CheckpointError, DistributedError, NonFiniteError
from fastpref.train.guard import FiniteGuard
from fastpref.train.logs import metrics
from fastpref.train.logs.metrics import MetricsLog, PendingStep, first_loss_tolerance

LOG_TWO = math.log(2)


def step_of(number: int, loss: float) -> PendingStep:
    return PendingStep(
        step=number,
        examples=8,
        num_examples=8,
        num_tokens=100,
        num_computed=60,
        num_scored=30,
        lr=1e-6,
        names=["loss/train"],
        values=torch.tensor([loss]),
    )


@pytest.mark.parametrize(
    ("loss", "step", "exact", "warns"),
    [
        (LOG_TWO, 1, True, False),
        # what a mean of equal numbers is rounded by
        (LOG_TWO * (1 + 1e-6), 1, True, False),
        # router noise, a leak between rows: little of it is as wrong as much
        (LOG_TWO * (1 + 2e-5), 1, True, True),
        (0.69806, 1, True, True),
        (0.7055, 1, False, False),
        (4.2, 1, False, True),
        (math.nan, 1, False, True),
        (4, 2, True, False),
    ],
)
def test_a_first_loss_that_is_not_log_two_is_said_loudly_once(
    tmp_path, caplog, loss, step, exact, warns
):
    log = MetricsLog(
        path=tmp_path / "metrics.jsonl",
        min_interval_seconds=0,
        world=ALONE,
        first_loss_tolerance=first_loss_tolerance(exact=exact),
    )
    for number in (step, step + 1):
        log.add_step(step_of(number, float(loss)))
    log.flush()
    assert len([m for m in caplog.messages if "FIRST LOSS" in m]) == warns


class Untouched:
    """A number on a device that is waited for in vain."""

    def __getattr__(self, name):
        pytest.fail(f"{name} of a number that will never be there")


def test_numbers_that_a_lost_rank_keeps_from_coming_are_not_fetched(tmp_path, monkeypatch):
    def await_device(world=None):
        raise DistributedError("rank 1 ended: out of memory")

    monkeypatch.setattr(metrics, "await_device", await_device)
    log = MetricsLog(path=tmp_path / "metrics.jsonl", min_interval_seconds=0, world=ALONE)
    log.add_step(replace(step_of(1, LOG_TWO), values=Untouched()))
    guard = FiniteGuard(None, skip=False, device=ALONE.device, await_device=await_device)
    # also where the log is closed because of it
    for fetch in (guard.first_bad_step, log.flush, log.close):
        with pytest.raises(DistributedError, match="rank 1 ended"):
            fetch()


@pytest.mark.parametrize("rank", [0, 1])
def test_on_every_rank_steps_are_due_once_an_interval(tmp_path, monkeypatch, rank):
    now = 100.0
    monkeypatch.setattr(metrics.time, "perf_counter", lambda: now)
    log = MetricsLog(
        path=tmp_path / "metrics.jsonl",
        min_interval_seconds=1.0,
        world=replace(ALONE, rank=rank, size=2),
    )
    log.restart_clock()
    due = []
    for number in range(1, 7):
        now += 0.4
        due.append(log.add_step(step_of(number, LOG_TWO)))
        if due[-1]:
            log.flush()
    assert due == [False, False, True] * 2


def test_trackers_are_closed_although_the_last_lines_cannot_be_written():
    class Follower:
        name = "follower"
        is_closed = False

        def log(self, record: dict[str, int]) -> None:
            pass

        def close(self) -> None:
            self.is_closed = True

    follower = Follower()
    log = MetricsLog(
        path=Path("/dev/full"), min_interval_seconds=9, world=ALONE, trackers=[follower]
    )
    log.add_step(step_of(2, LOG_TWO))
    with pytest.raises(CheckpointError, match="/dev/full: cannot be written"):
        log.close()
    assert follower.is_closed


def test_the_error_that_ended_a_run_is_told_although_its_last_lines_cannot_be_written(caplog):
    for error in (NonFiniteError("the loss of step 3"), None):
        log = MetricsLog(path=Path("/dev/full"), min_interval_seconds=9, world=ALONE)
        with pytest.raises(NonFiniteError if error else CheckpointError), log:
            log.add_step(step_of(2, LOG_TWO))
            if error:
                raise error
    (told,) = caplog.messages
    assert told.startswith("full lacks the last lines: /dev/full: cannot be written: No space")
