"""What an optimizer keeps, and where: found out by trying it on a small matrix."""

import inspect
from typing import Any

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.optim import Optimizer

PROBE_SIZE = 64
"""Rows and columns of the matrix that an optimizer is tried on."""


def probe_state(optimizer: Optimizer, device: torch.device) -> dict[str, Tensor]:
    """The tensors that an optimizer of this class and with these options keeps of a matrix after
    one step.

    Args:
        optimizer: It is not touched.
        device: Of the matrix.
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
