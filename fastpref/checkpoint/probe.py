"""The tensors in an optimizer's state and their devices, found by trying it on a small matrix."""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

PROBE_SIZE = 64
"""Number of rows and of columns of that matrix."""


def probe_state(optimizer: Optimizer, device: torch.device) -> dict[str, Tensor]:
    """State tensors that an optimizer of the same class and options has for a matrix after one
    step.

    Args:
        optimizer: Gives class and options; it is not changed.
        device: The matrix's device.
    """
    optimizer_class: Any = type(optimizer)
    accepted = inspect.signature(optimizer_class.__init__).parameters
    group = optimizer.param_groups[0]
    options = {key: group[key] for key in group.keys() & accepted.keys() - {"params"}}
    matrix = Parameter(torch.zeros(PROBE_SIZE, PROBE_SIZE, device=device))
    probe = optimizer_class([matrix], **options)
    matrix.grad = torch.zeros_like(matrix)
    probe.step()
    return {key: value for key, value in probe.state[matrix].items() if isinstance(value, Tensor)}
