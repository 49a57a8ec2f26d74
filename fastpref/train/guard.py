"""Keeps non-finite steps out of the weights, without synchronizing with the device.

Whether a step's loss and gradient are finite is a flag on the device, which a fused Adam or AdamW
reads there: if it is set, weights and optimizer state stay unchanged. The host looks at it when it
fetches metrics anyway; steps computed in between were not applied either.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

MOST_IN_A_ROW = 10
"""Number of consecutive skipped steps that ends a run with on_nonfinite=skip."""


class GuardState(NamedTuple):
    """State of a `FiniteGuard` in a checkpoint."""

    skipped: int = 0
    """Steps skipped so far."""
    in_a_row: int = 0
    """Steps skipped since the last one that was applied."""


class FiniteGuard:
    """Applies an optimizer's steps as long as they are finite.

    Every rank gets the same values, so every rank decides the same.

    Args:
        optimizer: Makes the steps. With fused Adam and AdamW no step waits for the device; with
            other classes the host reads the flag before each step.
        skip: Skip non-finite steps, up to `MOST_IN_A_ROW` - 1 of them in a row. False: apply
            nothing from the first one on.
        device: Device of losses and gradients.
        await_device: Called before a value is copied from the device.
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
        # steps skipped, steps skipped in a row, first step of a row that grew too long (0: none)
        self._counts = torch.zeros(3, dtype=torch.int64, device=device)

    def apply(self, step: int, values: Tensor) -> None:
        """Make the optimizer's step unless it is to be skipped.

        Args:
            step: Number of the step, counted from 1.
            values: Loss and gradient norm, which must be finite; the same on every rank.
        """
        skipped, in_a_row, stopped = self._counts.unbind()
        is_bad = ~torch.isfinite(values).all()
        in_a_row = (in_a_row + 1) * is_bad
        too_many = (stopped == 0) & (in_a_row >= self._most)
        stopped = torch.where(too_many, step - self._most + 1, stopped)
        self._counts = torch.stack([skipped + is_bad, in_a_row, stopped])
        is_left_out = is_bad | (stopped != 0)
        if self._reads_flag:
            # the attributes by which torch's GradScaler tells a fused optimizer to skip a step
            self._optimizer.found_inf = is_left_out.float()
            self._optimizer.grad_scale = None
            self._optimizer.step()
            return
        self._await_device()
        if not is_left_out:
            self._optimizer.step()

    def first_bad_step(self) -> int:
        """The first step, counted from 1, of those that are no longer applied; 0 while steps are
        applied or skipped one by one. Waits for the device."""
        self._await_device()
        return int(self._counts[2])

    @property
    def num_skipped(self) -> Tensor:
        """Steps skipped so far, a float32 scalar on the device."""
        return self._counts[0].float()

    def state(self) -> GuardState:
        """The state for a checkpoint. Waits for the device."""
        skipped, in_a_row, _ = self._counts.tolist()
        return GuardState(skipped, in_a_row)

    def load_state(self, state: GuardState) -> None:
        """Restore the counts of a checkpoint."""
        self._counts = torch.tensor([*state, 0], device=self._counts.device)
