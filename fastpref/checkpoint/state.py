"""A policy's weights and its optimizer's state as the named tensors of a checkpoint.

Everything is saved as it is in memory: sharded, in its own dtype. Torch's distributed state_dict
functions are not used: they step an optimizer that has not stepped yet, and cast its state to the
parameters' dtype.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastpref.errors import CheckpointError

WEIGHTS, OPTIMIZER = "weights", "optimizer"
"""Prefixes of the tensors' names."""

SHARD, WHOLE = "shard", "whole"
"""Layout of a tensor in an optimizer's state: that of its parameter, or whole on every rank."""

OF_THE_MACHINE = ("params", "foreach", "fused", "capturable", "differentiable")
"""Optimizer options that depend on this machine and are left out of a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """The saved state of a policy, its optimizer and its schedule."""

    tensors: dict[str, Tensor]
    """By name; sharded ones are DTensors. They share memory with the policy and the optimizer."""
    description: dict[str, Any]
    """JSON: the state that is no tensor, and the layouts of the optimizer's tensors."""


def collect_state(policy: nn.Module, optimizer: Optimizer, scheduler: LambdaLR) -> TrainingState:
    """Everything that training resumes from, except random states and the caller's record.

    Args:
        policy: The trained model; sharded by FSDP2 or not.
        optimizer: Its optimizer.
        scheduler: The learning-rate schedule.

    Raises:
        CheckpointError: the optimizer's state has an entry that is neither a tensor nor a number.
    """
    tensors = {f"{WEIGHTS}.{name}": weight for name, weight in policy_weights(policy).items()}
    entries: dict[str, dict[str, Any]] = {}
    for name, parameter in trained_parameters(policy, optimizer).items():
        for key, value in optimizer.state.get(parameter, {}).items():
            what = f"{type(optimizer).__name__} keeps {key} of {name}"
            tensor, layout = _describe_entry(value, parameter, what)
            entries.setdefault(name, {})[key] = layout
            if tensor is not None:
                tensors[f"{OPTIMIZER}.{name}.{key}"] = tensor
    description = {
        "optimizer": {
            "class": type(optimizer).__name__,
            "groups": [_options(group) for group in optimizer.param_groups],
            "entries": entries,
        },
        "scheduler": scheduler.state_dict(),
    }
    return TrainingState(tensors=tensors, description=description)


def policy_weights(policy: nn.Module) -> dict[str, Tensor]:
    """Trained parameters and persistent buffers by name; a tied one once, under its first name.

    Frozen parameters are unchanged from the model that the run starts from, and are not saved.
    """
    # FSDP2 leaves parameters gathered after a forward without backward; state_dict reshards them
    persistent = policy.state_dict().keys()
    weights = {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}
    buffers = {name: buffer for name, buffer in policy.named_buffers() if name in persistent}
    return weights | buffers


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard of a tensor, detached; all of it if it is not sharded."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def trained_parameters(policy: nn.Module, optimizer: Optimizer) -> dict[str, Parameter]:
    """The parameters that the optimizer steps, by their names in the policy.

    Raises:
        CheckpointError: one of them is not the policy's.
    """
    names = {parameter: name for name, parameter in policy.named_parameters()}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not all(parameter in names for parameter in trained):
        raise CheckpointError(
            f"{type(optimizer).__name__} trains parameters that are not the policy's"
        )
    return {names[parameter]: parameter for parameter in trained}


def _describe_entry(value: Any, parameter: Tensor, what: str) -> tuple[Tensor | None, Any]:
    """A tensor to save and its layout; or None and {"value": a plain value}."""
    if value is None or isinstance(value, bool | int | float):
        return None, {"value": value}
    if not isinstance(value, Tensor):
        raise CheckpointError(f"{what} as a {type(value).__name__}, which cannot be saved")
    if isinstance(value, DTensor) or not isinstance(parameter, DTensor):
        if value.shape == parameter.shape and _placements(value) == _placements(parameter):
            return value, SHARD
        if isinstance(value, DTensor):
            raise CheckpointError(f"{what} sharded in another way, which cannot be saved")
    return value, WHOLE


def _placements(tensor: Tensor) -> Any:
    return tensor.placements if isinstance(tensor, DTensor) else None


def _options(group: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in group.items() if key not in OF_THE_MACHINE}
