"""What the log of a run says by itself."""

import math

import pytest
import torch

from fastpref.train.metrics import MetricsLog, PendingStep, first_loss_tolerance


@pytest.mark.parametrize(
    ("loss", "step", "warns"),
    [
        (math.log(2), 1, False),
        # two models that differ by rounding in 16 bits, where nothing is to differ
        (0.6952, 1, True),
        (4.2, 1, True),
        (math.nan, 1, True),
        (4, 2, False),
    ],
)
def test_a_first_loss_that_is_not_log_two_is_said_loudly_once(tmp_path, caplog, loss, step, warns):
    log = MetricsLog(
        path=tmp_path / "metrics.jsonl",
        min_interval_seconds=0,
        device=torch.device("cpu"),
        first_loss_tolerance=first_loss_tolerance(exact=True),
    )
    for number in (step, step + 1):
        log.add_step(
            PendingStep(
                step=number,
                examples=8,
                num_examples=8,
                num_tokens=100,
                num_computed=60,
                lr=1e-6,
                names=["loss/train"],
                values=torch.tensor([float(loss)]),
            )
        )
    log.flush()
    assert len([m for m in caplog.messages if "FIRST LOSS" in m]) == warns
