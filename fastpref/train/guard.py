"""Keeping what is not finite out of the weights, without waiting for the device.

Whether a step's loss and gradient are finite is a number on the device, and so is what follows from
it: a fused Adam or AdamW reads it there and leaves weights and state as they are. The host looks
when it fetches numbers anyway; what was computed since was not applied either.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_IN_A_ROW = 10
"""Steps left out one after another that end a run which leaves them out."""


class GuardState(NamedTuple):
    """What a checkpoint keeps of a guard."""

    skipped: int = 0
    """Steps left out so far."""
    in_a_row: int = 0
    """The last of them, without an applied step in between."""


class FiniteGuard:
    """Applies an optimizer's steps as long as they are finite.

    Every rank gets the same numbers, so every rank decides the same.

    Args:
        optimizer: Whose steps they are. Of the fused Adam family none waits for the device; for
            other classes the host looks at each step before it applies it.
        skip: Leave a step that is not finite out and go on, fewer than `MOST_IN_A_ROW` times in a
            row; else nothing is applied from the first one on.
        device: Where losses and gradients are.
        await_device: Called before a number is fetched from there.
    """

    def __init__(
        self,
        optimizer: Any,
        *,
        skip: bool,
        device: torch.device,
        await_device: Callable[[], None] = lambda: None,
    ) -> None:
        self._optimizer = optimizer
        self._await_device = await_device
        self._most = MOST_IN_A_ROW if skip else 1
        self._reads_flag = getattr(optimizer, "_step_supports_amp_scaling", False)
        # steps left out, of these in a row, the first step of a row that is too long or 0
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)

    def apply(self, step: int, values: Tensor) -> None:
        """Make the optimizer's step if it is to be made.

        Args:
            step: Its number, counted from 1.
            values: What must be finite: loss and gradient norm, the same on every rank.
        """
        skipped, in_a_row, stopped = self._counts.unbind()
        is_bad = ~torch.isfinite(values).all()
        in_a_row = (in_a_row + 1) * is_bad
        too_many = (stopped == 0) & (in_a_row >= self._most)
        stopped = torch.where(too_many, step - self._most + 1, stopped)
        self._counts = torch.stack([skipped + is_bad, in_a_row, stopped])
        is_left_out = is_bad | (stopped != 0)
        if self._reads_flag:
            # what torch's gradient scaler sets
            self._optimizer.found_inf = is_left_out.float()
            self._optimizer.grad_scale = None
            self._optimizer.step()
        elif not is_left_out:
            self._optimizer.step()

    def first_bad_step(self) -> int:
        """The step, counted from 1, from which on none was applied; 0 if all are, those aside that
        were left out. Waits for the device."""
        self._await_device()
        return int(self._counts[2])

    @property
    def num_skipped(self) -> Tensor:
        """Steps left out so far, a float32 scalar on the device."""
        return self._counts[0].float()

    def state(self) -> GuardState:
        """Waits for the device."""
        skipped, in_a_row, _ = self._counts.tolist()
        return GuardState(skipped, in_a_row)

    def load_state(self, state: GuardState) -> None:
        """Go on counting."""
        self._counts = torch.tensor([*state, 0], device=self._counts.device)
