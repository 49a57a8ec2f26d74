"""From gradients to new weights: optimizer, schedule, and a guard against non-finite steps."""

from dataclasses import dataclass
from functools import partial

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from fastpref.config import OptimConfig
from fastpref.distributed import World
from fastpref.heartbeat import await_device
from fastpref.model.scorer import TokenScorer
from fastpref.train.guard import FiniteGuard
from fastpref.train.optim import build_optimizer, build_scheduler


@dataclass(frozen=True, slots=True, kw_only=True)
class Updates:
    """Optimizer, schedule and guard of a run."""

    optimizer: Optimizer
    scheduler: LambdaLR
    guard: FiniteGuard
    max_grad_norm: float

    @property
    def lr(self) -> float:
        """Learning rate of the next step."""
        return float(self.scheduler.get_last_lr()[0])


def build_updates(
    policy: TokenScorer,
    world: World,
    *,
    optimizer: str,
    lr: float,
    options: OptimConfig,
    warmup_steps: int,
    num_steps: int,
    max_grad_norm: float,
    skip_nonfinite: bool,
) -> Updates:
    """Build a policy's optimizer, schedule and guard.

    Args:
        policy: The model to train; it refreshes its working copies after every optimizer step.
        optimizer, lr, options, warmup_steps: See `build_optimizer` and `build_scheduler`.
        skip_nonfinite: Skip non-finite steps, see `FiniteGuard`.
    """
    built = build_optimizer(optimizer, policy.trained(), lr=lr, options=options.arguments())
    policy.follow(built)
    scheduler = build_scheduler(
        built,
        schedule=options.schedule,
        warmup_steps=warmup_steps,
        num_steps=num_steps,
        min_lr_ratio=options.min_lr_ratio,
    )
    guard = FiniteGuard(
        built,
        skip=skip_nonfinite,
        device=world.device,
        await_device=partial(await_device, world),
    )
    return Updates(optimizer=built, scheduler=scheduler, guard=guard, max_grad_norm=max_grad_norm)
