"""What the log of a run says by itself."""

import math

import pytest
import torch

from fastpref.train.logs.metrics import MetricsLog, PendingStep, first_loss_tolerance

LOG_TWO = math.log(2)


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
        device=torch.device("cpu"),
        first_loss_tolerance=first_loss_tolerance(exact=exact),
    )
    for number in (step, step + 1):
        log.add_step(
            PendingStep(
                step=number,
                examples=8,
                num_examples=8,
                num_tokens=100,
                num_computed=60,
                num_scored=30,
                lr=1e-6,
                names=["loss/train"],
                values=torch.tensor([float(loss)]),
            )
        )
    log.flush()
    assert len([m for m in caplog.messages if "FIRST LOSS" in m]) == warns
