"""One optimizer step on a global batch."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastpref.batches.loader import StepBatches
from fastpref.train.metrics import name_for_split, sum_over_examples
from fastpref.train.run import Run

LOSS = "loss/train"


def train_step(run: Run, step_batches: StepBatches, step: int) -> tuple[list[str], Tensor]:
    """One optimizer step on a global batch, left out where its loss or gradient is not finite.

    The loss is summed over pairs and divided by their global number, whatever the split into
    micro-batches and ranks; gradients are summed over ranks.

    Args:
        run: The run.
        step_batches: What the step computes.
        step: Steps before this one.

    Returns:
        Metric names, and their means over the batch before the update (K,), on the device.
    """
    updates = run.updates
    updates.optimizer.zero_grad()
    metrics = []
    for host_batch in step_batches.batches:
        batch = host_batch.to(run.world.device)
        losses, of_examples = run.step_loss.compute(batch, step)
        (losses.sum() / step_batches.num_examples).backward()
        run.step_loss.done()
        metrics.append(of_examples)
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
    return names, values


def clip_gradients(run: Run) -> Tensor:
    """Clip the global gradient norm.

    Returns:
        The norm before clipping, a float32 scalar on the device.
    """
    parameters = list(run.policy.parameters())
    norm = torch.nn.utils.clip_grad_norm_(parameters, run.updates.max_grad_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    return norm.float()
