"""What a run says before its first step: what will happen, and what a user may not expect."""

import logging

import torch
from torch import Tensor, nn

from fastpref.batches.loader import Split
from fastpref.config import Config
from fastpref.distributed import World
from fastpref.objectives.objective import Objective

logger = logging.getLogger("fastpref")

MOVES_BY_LR = ("Adam", "AdamW", "Adamax", "NAdam", "RAdam", "RMSprop")
"""Optimizers whose step moves a weight by about the learning rate, whatever its gradient is."""
TOO_MANY_STILL = 0.1
"""Share of weights that a step leaves as they are from which on it is said."""


def announce(config: Config, world: World, objective: Objective) -> None:
    """Say what is about to happen, and what in it a user may not expect."""
    logger.info(
        "%s of %s on %s: %d x %s, weights in %s, arithmetic in %s",
        objective.title,
        config.model.name_or_path,
        ", ".join(config.datasets),
        world.size,
        world.device.type,
        config.model.policy_dtype,
        config.model.compute_dtype,
    )
    transform = config.transform
    if objective.needs.weights and transform.method == "binary":
        logger.warning(
            "transform.method=binary at %g percent: %g percent of a response's tokens weigh 1, "
            "the others 0, whatever their estimated weights; transform=paper uses the estimates",
            transform.binary.top_percent,
            transform.binary.top_percent,
        )


def announce_tokens(split: Split, world: World) -> None:
    """Say what of the data the model's body will compute, by the first steps."""
    steps = min(32, split.order.num_steps)
    in_data, computed = split.savings(world.size, steps)
    logger.info(
        "first %d steps: %s tokens in the data, %s computed, %.0f %% %s",
        steps,
        f"{in_data:,}",
        f"{computed:,}",
        100 * abs(1 - computed / in_data),
        "saved" if computed <= in_data else "more, for padding",
    )


def warn_of_warmup(warmup_steps: int, num_steps: int, lr: float) -> None:
    """Say where the learning rate never gets to what was asked for."""
    if warmup_steps >= num_steps > 0:
        logger.warning(
            "warmup_steps=%d and the run has %d optimizer steps: the learning rate never reaches "
            "lr=%g, its highest is %.3g; a tenth of the steps is a usual warm-up",
            warmup_steps,
            num_steps,
            lr,
            lr * num_steps / (warmup_steps + 1),
        )


def warn_of_held_out(num_rows: int, wanted: int) -> None:
    """Say where there are fewer held-out rows than were asked for."""
    if num_rows < wanted:
        logger.warning(
            "n_eval_examples=%d and the test split has %d rows: evaluating on those",
            wanted,
            num_rows,
        )


def warn_of_rounding(model: nn.Module, optimizer: str, lr: float) -> None:
    """Say where master weights in 16 bits are too coarse for the learning rate.

    A weight moves by about `lr` a step and is rounded to the nearest number of its dtype: by less
    than half the distance to it, the step leaves the weight as it was.

    Args:
        model: With its master weights.
        optimizer: Name of its class.
        lr: Learning rate after warm-up.
    """
    share = share_unmoved(list(model.parameters()), lr)
    if optimizer in MOVES_BY_LR and share > TOO_MANY_STILL:
        logger.warning(
            "%.0f %% of the master weights are too large for a step of lr=%g to change them in 16 "
            "bits: it is rounded away; model.policy_dtype=float32 model.fsdp_policy_mp=bfloat16 "
            "keeps it and computes as fast",
            100 * share,
            lr,
        )


@torch.no_grad()
def share_unmoved(weights: list[Tensor], lr: float) -> float:
    """Share of the weights that adding `lr` leaves as they are, in [0, 1]; in float32 none."""
    unmoved, total = 0, 0
    for weight in weights:
        total += weight.numel()
        if weight.dtype in (torch.bfloat16, torch.float16):
            _, exponent = torch.frexp(weight.float())
            # numbers of the dtype are eps · 2^(exponent - 1) apart around the weight
            half_gap = torch.ldexp(torch.tensor(torch.finfo(weight.dtype).eps / 4), exponent)
            unmoved += int(((half_gap > lr) & (weight != 0)).sum())
    return unmoved / max(1, total)
