"""Optimizer and learning-rate schedule, both torch's own."""

import inspect
import math
from collections.abc import Iterable
from typing import Any

import torch
from torch.distributed.tensor import DTensor
from torch.nn import Parameter
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastpref.checks import hint
from fastpref.errors import ConfigError

ON_LOCAL_SHARDS = ("Adafactor", "Rprop")
"""Rprop looks at one element at a time, so shards change nothing; Adafactor needs one rank."""


def build_optimizer(
    name: str, parameters: Iterable[Parameter], *, lr: float, options: dict[str, Any]
) -> Optimizer:
    """A `torch.optim` class by name, fused where the class can be.

    Args:
        name: Class name, such as "AdamW" or "RMSprop".
        parameters: What is trained.
        lr: Peak learning rate.
        options: Further constructor arguments; None values mean torch's default.

    Raises:
        ConfigError: no such class, or it does not take an option.
    """
    optimizer_class: Any = check_optimizer(name, options)
    given = {key: value for key, value in options.items() if value is not None}
    # one kernel for all parameters instead of several a parameter; sharded parameters (DTensor)
    # have no fused kernel of any other optimizer
    if name in ("Adam", "AdamW"):
        given["fused"] = True
    if name in ON_LOCAL_SHARDS:
        return _on_local_shards(optimizer_class, list(parameters), lr=lr, **given)
    return optimizer_class(list(parameters), lr=lr, **given)


def _on_local_shards(
    optimizer_class: Any, parameters: list[Parameter], **options: Any
) -> Optimizer:
    """An optimizer of each rank's own shards, for classes whose operations DTensor lacks."""
    shards = [Parameter(p.to_local() if isinstance(p, DTensor) else p) for p in parameters]
    optimizer = optimizer_class(shards, **options)

    def lend_gradients(*_: Any) -> None:
        for shard, parameter in zip(shards, parameters, strict=True):
            grad = parameter.grad
            shard.grad = grad.to_local() if isinstance(grad, DTensor) else grad

    def drop_gradients(*_: Any) -> None:
        for parameter in parameters:
            parameter.grad = None

    optimizer.register_step_pre_hook(lend_gradients)
    optimizer.register_step_post_hook(drop_gradients)
    return optimizer


def check_optimizer(name: str, options: dict[str, Any], world_size: int = 1) -> type[Optimizer]:
    """The class `build_optimizer` would use, before there is anything to train.

    Raises:
        ConfigError: no such class, it does not take an option, or it needs whole matrices and
            there are several ranks.
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
        ConfigError: there is none, or it cannot be driven by one gradient a step.
    """
    classes = {
        key: value
        for key, value in vars(torch.optim).items()
        if inspect.isclass(value) and issubclass(value, Optimizer) and value is not Optimizer
    }
    # LBFGS evaluates the loss several times a step, SparseAdam wants sparse gradients, Muon
    # trains matrices alone
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
        num_steps: Optimizer steps of the whole run; where linear and cosine end.
        min_lr_ratio: What they end at, as a share of the peak, in [0, 1].
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
