"""Mixed precision on one rank: master weights, and a working copy in the compute dtype.

Bit-identical to FSDP2's mixed precision on several ranks, but parameters are cast once per
optimizer step, not in every micro-batch.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn


class _Place(NamedTuple):
    """Where a module holds a parameter."""

    holder: dict[str, nn.Parameter | None]
    name: str
    master: nn.Parameter
    working: nn.Parameter


class MasterWeights:
    """A model's master weights, and their working copy in the compute dtype.

    Between steps the model holds the masters, the only weights that optimizer, export and
    checkpoints see; from `lend()` to `take_back()`, that is from a forward to the end of its
    backward, it holds the copy. As soon as a gradient of the copy is complete, it is added to its
    master's and freed.

    Args:
        model: On its device.
        dtype: Compute dtype; parameters that have it already are left alone.
    """

    def __init__(self, model: nn.Module, dtype: torch.dtype) -> None:
        copies: dict[nn.Parameter, nn.Parameter] = {}
        self._places: list[_Place] = []
        for module in model.modules():
            for name, master in module._parameters.items():
                if master is None or not master.is_floating_point() or master.dtype == dtype:
                    continue
                if master not in copies:
                    copies[master] = _working_copy(master, dtype)
                self._places.append(_Place(module._parameters, name, master, copies[master]))
        self._masters: list[Tensor] = list(copies)
        self._copies: list[Tensor] = list(copies.values())
        model.register_load_state_dict_post_hook(lambda *_: self.refresh())

    @torch.no_grad()
    def refresh(self) -> None:
        """Update the copy after the masters have changed."""
        if self._copies:
            torch._foreach_copy_(self._copies, self._masters)

    def lend(self) -> None:
        """Put the working copy into the model."""
        for place in self._places:
            place.holder[place.name] = place.working

    def forget_gradients(self) -> None:
        """Drop gradients of the copy that a failed backward has left behind."""
        for copy in self._copies:
            copy.grad = None

    def take_back(self) -> None:
        """Put the masters back into the model."""
        for place in self._places:
            place.holder[place.name] = place.master


def _working_copy(master: nn.Parameter, dtype: torch.dtype) -> nn.Parameter:
    working = nn.Parameter(master.detach().to(dtype), requires_grad=master.requires_grad)

    def hand_over(parameter: Tensor) -> None:
        assert parameter.grad is not None
        if master.grad is None:
            master.grad = parameter.grad.to(master.dtype)
        else:
            master.grad.add_(parameter.grad)
        parameter.grad = None

    if master.requires_grad:
        working.register_post_accumulate_grad_hook(hand_over)
    return working
