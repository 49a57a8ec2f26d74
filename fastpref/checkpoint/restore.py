"""Loading a checkpoint's tensors into a policy, its optimizer and its schedule."""

import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.state_dict_loader import load
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastpref.checkpoint.agreement import AgreedError, Agreement, describe, name_ranks
from fastpref.checkpoint.probe import PROBE_SIZE, probe_state
from fastpref.checkpoint.state import (
    OPTIMIZER,
    SHARD,
    WEIGHTS,
    local_part,
    policy_weights,
    trained_parameters,
)
from fastpref.errors import CheckpointError, MemoryExhaustedError, is_shortage

SavedTensors = dict[str, Any]
"""DCP's metadata of each tensor, its size and dtype, by name."""


def restore_state(
    folder: Path,
    description: dict[str, Any],
    policy: nn.Module,
    optimizer: Optimizer,
    scheduler: LambdaLR,
    *,
    agreement: Agreement,
) -> None:
    """Load a checkpoint's state; on any number of ranks, each reads only its own shards.

    Args:
        folder: A complete checkpoint.
        description: `TrainingState.description` when it was saved.
        policy, optimizer, scheduler: As built for this run; their state is overwritten. Learning
            rate, weight decay and the like stay those of this optimizer.
        agreement: Connects the ranks.

    Raises:
        CheckpointError: on every rank: names, shapes or the optimizer's class differ, or a file
            cannot be read.
        MemoryExhaustedError: on every rank: one lacks memory or file descriptors.
    """
    targets: dict[str, Tensor] = {}
    state: dict[Tensor, dict[str, Any]] = {}

    def prepare() -> None:
        saved = _read_metadata(folder)
        weights = policy_weights(policy)
        targets.update({f"{WEIGHTS}.{name}": weight for name, weight in weights.items()})
        _check_weights(targets, saved)
        _check_optimizer(optimizer, description["optimizer"])
        entries = description["optimizer"]["entries"]
        state.update(_empty_state(policy, optimizer, entries, saved, targets))

    try:
        agreement.each(prepare)
        load(
            targets,
            storage_reader=FileSystemReader(folder),
            planner=DefaultLoadPlanner(flatten_state_dict=False, flatten_sharded_tensors=False),
            process_group=agreement.group,
            no_dist=agreement.is_alone,
        )
    except (AgreedError, CheckpointException) as error:
        reason = reasons_of(error, agreement.size)
        kind = MemoryExhaustedError if is_of_shortage(error) else CheckpointError
        raise kind(f"{folder} cannot be loaded: {reason}") from error
    optimizer.state.clear()
    optimizer.state.update(state)
    _restore_scheduler(scheduler, description["scheduler"])


def reasons_of(error: BaseException, world_size: int) -> str:
    """The causes of a failed save or load on all ranks, errors in torch's DCP included, in one
    line."""
    if not isinstance(error, CheckpointException):
        return describe(error)
    reasons = {rank: describe(failure) for rank, (failure, _) in error.failures.items()}
    return name_ranks(reasons, world_size)


def is_of_shortage(error: BaseException) -> bool:
    """Whether a save or load failed because a rank lacked memory or file descriptors."""
    if isinstance(error, AgreedError):
        return error.is_shortage
    if isinstance(error, CheckpointException):
        return any(is_shortage(failure) for failure, _ in error.failures.values())
    return is_shortage(error)


def _read_metadata(folder: Path) -> SavedTensors:
    try:
        return dict(FileSystemReader(folder).read_metadata().state_dict_metadata)
    # the digest has shown that the file is intact, so it is torch that has changed
    except (pickle.UnpicklingError, AttributeError, ImportError, TypeError) as error:
        raise CheckpointError(f"torch {torch.__version__} cannot read it: {error}") from error


def _check_weights(targets: dict[str, Tensor], saved: SavedTensors) -> None:
    """Refuse the weights of another model.

    Raises:
        CheckpointError: naming the first weight that is missing, left over or of another shape or
            dtype.
    """
    prefix = f"{WEIGHTS}."
    for name, weight in targets.items():
        if name not in saved:
            raise CheckpointError(f"it has no {name.removeprefix(prefix)}")
        if saved[name].size != weight.shape:
            raise CheckpointError(
                f"{name.removeprefix(prefix)} has shape {tuple(saved[name].size)} in it, "
                f"{tuple(weight.shape)} in the model"
            )
        if saved[name].properties.dtype != weight.dtype:
            raise CheckpointError(
                f"{name.removeprefix(prefix)} is {saved[name].properties.dtype} in it, "
                f"{weight.dtype} in the model"
            )
    for name in saved:
        if name.startswith(prefix) and name not in targets:
            raise CheckpointError(f"it has {name.removeprefix(prefix)}, which is not trained here")


def _check_optimizer(optimizer: Optimizer, saved: dict[str, Any]) -> None:
    """Refuse the state of another optimizer.

    Raises:
        CheckpointError: it is of another class, or has another number of parameter groups.
    """
    name = type(optimizer).__name__
    if saved["class"] != name:
        raise CheckpointError(f"it holds state of {saved['class']}, not of {name}")
    if len(saved["groups"]) != len(optimizer.param_groups):
        raise CheckpointError(
            f"it has {len(saved['groups'])} groups of parameters, {name} has "
            f"{len(optimizer.param_groups)}"
        )


def _empty_state(
    policy: nn.Module,
    optimizer: Optimizer,
    entries: dict[str, dict[str, Any]],
    saved: SavedTensors,
    targets: dict[str, Tensor],
) -> dict[Tensor, dict[str, Any]]:
    """An optimizer state of zeros in the saved layout; its tensors are added to `targets`, for DCP
    to load into."""
    state: dict[Tensor, dict[str, Any]] = {}
    parameters = trained_parameters(policy, optimizer)
    # the step counter is in host memory or on its parameter's device, depending on the optimizer's
    # kernel: this machine may place it elsewhere than the one that saved it
    places = probe_state(optimizer, local_part(next(iter(parameters.values()))).device)
    # momentum that was switched on after the save starts at zero, as in a new optimizer
    begun = {key for key, kept in places.items() if kept.shape == (PROBE_SIZE, PROBE_SIZE)}
    for name, layouts in entries.items():
        if name not in parameters:
            raise CheckpointError(f"it has state of {name}, which is not trained here")
        parameter = parameters[name]
        state[parameter] = {}
        for key, layout in layouts.items():
            if isinstance(layout, dict):
                state[parameter][key] = layout["value"]
                continue
            full_name = f"{OPTIMIZER}.{name}.{key}"
            dtype = saved[full_name].properties.dtype
            if layout == SHARD:
                empty = torch.zeros_like(parameter, dtype=dtype, requires_grad=False)
            else:
                kept = places.get(key, local_part(parameter))
                empty = torch.zeros(saved[full_name].size, dtype=dtype, device=kept.device)
            targets[full_name] = state[parameter][key] = empty
        for key in begun - layouts.keys():
            state[parameter][key] = torch.zeros_like(parameter, requires_grad=False)
    return state


def _restore_scheduler(scheduler: LambdaLR, saved: dict[str, Any]) -> None:
    """Resume the schedule at the checkpoint's step, with the peak rate of the scheduler as
    built."""
    step = saved["last_epoch"]
    rates = [
        rate * share(step)
        for rate, share in zip(scheduler.base_lrs, scheduler.lr_lambdas, strict=True)
    ]
    scheduler.load_state_dict(saved | {"base_lrs": scheduler.base_lrs, "_last_lr": rates})
    for group, rate in zip(scheduler.optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
