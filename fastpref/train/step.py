"""One optimizer step on a global batch."""

from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn.utils import clip_grads_with_norm_, get_total_norm

from fastpref.batch import Batch
from fastpref.batches.loader import Loader, StepBatches
from fastpref.objectives.objective import Metrics
from fastpref.train.logs.metrics import name_for_split, sum_over_examples
from fastpref.train.optim import local_shard
from fastpref.train.run import Run

Result = TypeVar("Result")

LOSS = "loss/train"


def train_step(run: Run, step_batches: StepBatches, step: int) -> tuple[list[str], Tensor, int]:
    """One optimizer step on a global batch, not applied if its loss or gradient is not finite.

    The loss is summed over pairs and divided by their global number, whatever the split into
    micro-batches and ranks; gradients are summed over ranks.

    Returns:
        Metric names; their values, (K,) float32 on the device: means over the batch before the
        update, the gradient norm and, with on_nonfinite=skip, the skipped steps so far; the number
        of tokens that the model's body computed, over all ranks.
    """
    updates = run.updates
    updates.optimizer.zero_grad()
    metrics, computed = within_memory(
        run,
        run.train,
        step_batches,
        lambda batches: accumulate_gradients(run, batches, step),
        undo=run.policy.forget_gradients,
    )
    run.policy.sum_gradients()
    names, sums = sum_over_examples(metrics)
    means = run.world.sum(sums) / step_batches.num_examples
    names = [*(name_for_split(name, "train") for name in names), "grad_norm"]
    grad_norm = clip_gradients(run)
    values = torch.cat([means, grad_norm[None]])
    updates.guard.apply(step + 1, torch.stack([means[names.index(LOSS)], grad_norm]))
    updates.scheduler.step()
    if run.config.on_nonfinite == "skip":
        names.append("skipped_steps")
        values = torch.cat([values, updates.guard.num_skipped[None]])
    return names, values, computed.num_computed


def accumulate_gradients(run: Run, step_batches: StepBatches, step: int) -> list[Metrics]:
    """Forward and backward of every micro-batch of a step; returns the metrics of each."""
    num_examples = step_batches.num_examples
    return [add_gradients(run, batch, step, num_examples)[1] for batch in step_batches.batches]


def add_gradients(
    run: Run, host_batch: Batch, step: int, num_examples: int
) -> tuple[Tensor, Metrics]:
    """Forward and backward of one micro-batch.

    Args:
        num_examples: Of the whole step.

    Returns:
        Losses (P,), detached, and metrics.
    """
    losses, metrics = run.step_loss.compute(host_batch.to(run.world.device), step)
    (losses.sum() / num_examples).backward()
    run.step_loss.done()
    return losses.detach(), metrics


def within_memory(
    run: Run,
    loader: Loader,
    step_batches: StepBatches,
    compute: Callable[[StepBatches], Result],
    *,
    undo: Callable[[], None] = lambda: None,
) -> tuple[Result, StepBatches]:
    """Apply `compute` to a step; if memory runs out, again with smaller micro-batches.

    A backward that fails halfway has added to some gradients and not to others. A separate buffer
    for each micro-batch's gradients would double their memory in every step. So all gradients of
    the step are discarded and computed again, at most once for each halving.

    Args:
        compute: Computes every micro-batch of a step.
        undo: Discards what a failed `compute` has left behind.

    Returns:
        The result, and the step as it was divided into micro-batches in the end.
    """

    def take_back() -> None:
        run.step_loss.done()
        undo()

    return run.repetition.compute(
        step_batches,
        compute,
        split=lambda batches, limit: loader.split(batches, limit, run.world),
        size=lambda batches: batches.most_tokens,
        undo=take_back,
    )


@torch.no_grad()
def clip_gradients(run: Run) -> Tensor:
    """Clip the global gradient norm.

    The local shards are clipped: for lists of DTensors torch takes time that grows with the square
    of their length.

    Returns:
        The norm before clipping, a float32 scalar on the device.
    """
    trained = run.policy.trained()
    shards = [local_shard(parameter) for parameter in trained]
    norm = get_total_norm([shard.grad for shard in shards if shard.grad is not None])
    if any(isinstance(parameter, DTensor) for parameter in trained):
        norm = run.world.sum(norm.double().square()).sqrt().to(norm.dtype)
    clip_grads_with_norm_(shards, run.updates.max_grad_norm, norm)
    return norm.float()
