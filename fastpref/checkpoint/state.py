"""A policy's weights and its optimizer's state as named tensors, as a checkpoint holds them.

Everything is saved as it lies in memory: sharded, in its own dtype. Torch's own way to an
optimizer's state dict and back is not taken: it steps an optimizer that has not stepped yet, casts
state to the parameters' dtype.
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
"""First parts of the tensors' names."""

SHARD, WHOLE = "shard", "whole"
"""How a tensor of an optimizer's state lies: as its parameter does, or whole on every rank."""

OF_THE_MACHINE = ("params", "foreach", "fused", "capturable", "differentiable")
"""Options of an optimizer that say how it computes here; they are not part of a checkpoint."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainingState:
    """What is saved of a policy and of what trains it."""

    tensors: dict[str, Tensor]
    """By name; sharded ones are DTensors. They share memory with what they are the state of."""
    description: dict[str, Any]
    """JSON: what is no tensor, and how the optimizer's tensors lie."""


def collect_state(policy: nn.Module, optimizer: Optimizer, scheduler: LambdaLR) -> TrainingState:
    """Everything that training goes on from, but the random states and the caller's record.

    Args:
        policy: What is trained; sharded by FSDP2 or not.
        optimizer: What trains it.
        scheduler: Of its learning rate.

    Raises:
        CheckpointError: the optimizer keeps something that is no tensor and no number.
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
    """Trained parameters and persistent buffers by name; a tied one once, by its first name.

    Frozen parameters are those of the model that the run starts from, and are not saved.
    """
    # FSDP2 leaves parameters gathered after a forward without backward; this shards them again
    persistent = policy.state_dict().keys()
    weights = {name: p.detach() for name, p in policy.named_parameters() if p.requires_grad}
    buffers = {name: buffer for name, buffer in policy.named_buffers() if name in persistent}
    return weights | buffers


def local_part(tensor: Tensor) -> Tensor:
    """This rank's shard, without gradient; a tensor that is not sharded is its own."""
    return (tensor.to_local() if isinstance(tensor, DTensor) else tensor).detach()


def trained_parameters(policy: nn.Module, optimizer: Optimizer) -> dict[str, Parameter]:
    """What the optimizer steps, by the policy's names.

    Raises:
        CheckpointError: it trains something else.
    """
    names = {parameter: name for name, parameter in policy.named_parameters()}
    trained = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    if not all(parameter in names for parameter in trained):
        raise CheckpointError(
            f"{type(optimizer).__name__} trains parameters that are not the policy's"
        )
    return {names[parameter]: parameter for parameter in trained}


def _describe_entry(value: Any, parameter: Tensor, what: str) -> tuple[Tensor | None, Any]:
    """A tensor to save and how it lies; or no tensor, and the value in a dictionary."""
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
