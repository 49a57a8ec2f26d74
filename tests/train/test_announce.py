"""What a run says before its first step."""

import pytest
import torch
from torch import nn

from fastpref.train.announce import (
    share_unmoved,
    warn_of_held_out,
    warn_of_rounding,
    warn_of_warmup,
)


def test_a_warmup_that_never_ends_is_said_with_the_rate_that_is_reached(caplog):
    warn_of_warmup(150, 151, 3.02e-7)
    assert not caplog.messages
    warn_of_warmup(150, 100, 3.02e-7)
    assert "never reaches lr=3.02e-07, its highest is 2e-07" in caplog.text


def test_a_test_split_that_is_smaller_than_asked_for_is_said(caplog):
    warn_of_held_out(256, 256)
    assert not caplog.messages
    warn_of_held_out(10, 256)
    assert "the test split has 10 rows" in caplog.text


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("lr", [3e-7, 1e-5, 1e-3])
def test_the_share_of_weights_that_a_step_rounds_away_is_what_adding_it_shows(dtype, lr):
    generator = torch.Generator().manual_seed(0)
    weights = (0.02 * torch.randn(20_000, generator=generator)).to(dtype)
    # torch adds in float32 and rounds to the nearest number
    stepped = (weights.float() + lr * weights.float().sign()).to(dtype)
    unmoved = ((stepped == weights) & (weights != 0)).float().mean().item()
    assert share_unmoved([weights], lr) == pytest.approx(unmoved, abs=0.01)
    assert share_unmoved([weights.float()], lr) == 0


def test_master_weights_too_coarse_for_the_rate_are_said(caplog):
    model = nn.Linear(64, 64)
    warn_of_rounding(model, "AdamW", 1e-7)
    warn_of_rounding(model.bfloat16(), "SGD", 1e-7)
    warn_of_rounding(model, "AdamW", 1e-1)
    assert not caplog.messages
    warn_of_rounding(model, "AdamW", 1e-7)
    assert "rounded away; model.policy_dtype=float32" in caplog.text
