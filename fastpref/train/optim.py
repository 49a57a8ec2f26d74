"""Optimizer and learning-rate schedule, both from `torch.optim`."""

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastpref.checkpoint.state import local_part
from fastpref.checks import hint
from fastpref.config import TrainingOptions
from fastpref.errors import ConfigError

ON_LOCAL_SHARDS = ("Adafactor", "Adam", "AdamW", "Rprop")
"""Classes that step on local shards: DTensor lacks operations of Adafactor and Rprop, and for fused
Adam and AdamW it takes time that grows with the square of the number of parameters. All but
Adafactor are elementwise, so sharding changes nothing; Adafactor is refused on several ranks."""


def build_optimizer(
    name: str, parameters: Iterable[Parameter], *, lr: float, options: dict[str, Any]
) -> Optimizer:
    """Build an optimizer of `torch.optim` by name; Adam and AdamW are fused.

    Args:
        name: Class name, such as "AdamW" or "RMSprop".
        parameters: The trained parameters.
        lr: Peak learning rate.
        options: Further constructor arguments; None values mean torch's default.

    Raises:
        ConfigError: there is no such class, or it does not take an option.
    """
    optimizer_class: Any = check_optimizer(name, options)
    given = {key: value for key, value in options.items() if value is not None}
    # one kernel for all parameters instead of several per parameter; no other optimizer has a fused
    # kernel for sharded parameters (DTensor)
    if name in ("Adam", "AdamW"):
        given["fused"] = True
    if name == "Adafactor" and "eps" in given:
        # Adafactor takes a pair: eps of the denominator, and the least weight RMS that scales steps
        _, least = inspect.signature(optimizer_class).parameters["eps"].default
        given["eps"] = (given["eps"], least)
    trained = list(parameters)
    optimizer: Optimizer = optimizer_class(trained, lr=lr, **given)
    if name in ON_LOCAL_SHARDS and any(isinstance(parameter, DTensor) for parameter in trained):
        _step_on_local_shards(optimizer)
    return optimizer


def state_bytes(options: TrainingOptions) -> int:
    """Bytes of optimizer state per trained weight, measured on a small matrix."""
    dtype = torch.float32 if options.adapter.trained else getattr(torch, options.model.policy_dtype)
    parameter = Parameter(torch.zeros(64, 64, dtype=dtype))
    parameter.grad = torch.zeros_like(parameter)
    arguments = options.optim.arguments()
    optimizer = build_optimizer(options.optimizer, [parameter], lr=0.0, options=arguments)
    optimizer.step()
    states = [x for x in optimizer.state[parameter].values() if isinstance(x, Tensor)]
    # state smaller than the matrix, such as Adafactor's rows and columns, is negligible
    return sum(x.dtype.itemsize for x in states if x.shape == parameter.shape)


def _step_on_local_shards(optimizer: Optimizer) -> None:
    """Let an optimizer's steps see each rank's local shards. Outside of them it holds the model's
    parameters, and its state is sharded like them."""
    lent: list[tuple[Parameter, Tensor]] = []
    states: dict[Tensor, Tensor] = {}

    @torch.no_grad()
    def lend(*_: Any) -> None:
        for group in optimizer.param_groups:
            owners = group["params"]
            group["params"] = [local_shard(parameter) for parameter in owners]
            lent.extend(zip(owners, group["params"], strict=True))
        for parameter, shard in lent:
            if parameter in optimizer.state:
                state = optimizer.state.pop(parameter)
                optimizer.state[shard] = {name: local_part(value) for name, value in state.items()}
                states.update(zip(optimizer.state[shard].values(), state.values(), strict=True))

    @torch.no_grad()
    def give_back(*_: Any) -> None:
        owners = {shard: parameter for parameter, shard in lent}
        for group in optimizer.param_groups:
            group["params"] = [owners[shard] for shard in group["params"]]
        for parameter, shard in lent:
            if shard in optimizer.state:
                state = optimizer.state.pop(shard)
                optimizer.state[parameter] = {
                    name: states[value] if value in states else _sharded_like(parameter, value)
                    for name, value in state.items()
                }
        lent.clear()
        states.clear()

    optimizer.register_step_pre_hook(lend)
    optimizer.register_step_post_hook(give_back)


def local_shard(parameter: Parameter) -> Tensor:
    """This rank's shard of a parameter, sharing its memory, with the gradient's shard; one that is
    not sharded as it is."""
    if not isinstance(parameter, DTensor):
        return parameter
    shard = local_part(parameter)
    if parameter.grad is not None:
        shard.grad = local_part(parameter.grad)
    return shard


def _sharded_like(parameter: Parameter, value: Any) -> Any:
    """A shard's state tensor as one of the parameter's; one of another shape is left as it is."""
    if not isinstance(parameter, DTensor) or value.shape != parameter.to_local().shape:
        return value
    return DTensor.from_local(
        value,
        parameter.device_mesh,
        parameter.placements,
        run_check=False,
        shape=parameter.shape,
        stride=parameter.stride(),
    )


def check_optimizer(name: str, options: dict[str, Any], world_size: int = 1) -> type[Optimizer]:
    """The class that `build_optimizer` would use, checked before any model is loaded.

    Raises:
        ConfigError: there is no such class, it does not take an option, or it needs whole matrices
            and there are several ranks.
    """
    if name == "Adafactor" and world_size > 1:
        raise ConfigError(
            f"optimizer=Adafactor looks at whole matrices, which {world_size} ranks do not hold; "
            "use AdamW, or one process"
        )
    optimizer_class = optimizer_class_of(name)
    accepted = inspect.signature(optimizer_class.__init__).parameters
    for key, value in options.items():
        if value is not None and key not in accepted:
            raise ConfigError(f"optim.{key}: torch.optim.{name} takes no {key}")
    return optimizer_class


def optimizer_class_of(name: str) -> type[Optimizer]:
    """The `torch.optim` class of that name.

    Raises:
        ConfigError: there is none, or it cannot train a language model by itself.
    """
    classes = {
        key: value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
    }
    # LBFGS evaluates the loss several times per step, SparseAdam needs sparse gradients, Muon
    # trains only matrices
    unusable = {"LBFGS", "SparseAdam", "Muon"}
    usable = sorted(classes.keys() - unusable)
    if name not in usable:
        rule = "cannot train a language model by itself" if name in classes else "no such class"
        raise ConfigError(
            f"optimizer={name}: {rule}{hint(name, usable)}; usable are {', '.join(usable)}"
        )
    return classes[name]


def build_scheduler(
    optimizer: Optimizer,
    *,
    schedule: str,
    warmup_steps: int,
    num_steps: int,
    min_lr_ratio: float,
) -> LambdaLR:
    """Linear warm-up to the peak, then the schedule.

    Args:
        schedule: "constant", "linear" or "cosine".
        warmup_steps: Step s (from 0) of the warm-up has (s + 1) / (warmup_steps + 1) of the peak,
            as in the seed repositories.
        num_steps: Optimizer steps of the whole run, at the end of which linear and cosine reach
            their minimum.
        min_lr_ratio: That minimum as a share of the peak, in [0, 1].
    """

    def share_of_peak(step: int) -> float:
        warmup = min(1.0, (step + 1) / (warmup_steps + 1))
        if schedule == "constant":
            return warmup
        # the last step, num_steps - 1, gets the floor itself
        decay_steps = max(1, num_steps - 1 - warmup_steps)
        progress = min(1.0, max(0.0, (step - warmup_steps) / decay_steps))
        remaining = 1 - progress if schedule == "linear" else (1 + math.cos(math.pi * progress)) / 2
        return warmup * (min_lr_ratio + (1 - min_lr_ratio) * remaining)

    return LambdaLR(optimizer, share_of_peak)
