"""One optimizer step on a global batch."""

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor

from fastpref.batches.loader import StepBatches
from fastpref.errors import NON_FINITE, NonFiniteError
from fastpref.train.metrics import (
    name_for_split,
    sum_over_examples,
)
from fastpref.train.run import Run


def train_step(run: Run, step_batches: StepBatches, step: int) -> tuple[list[str], Tensor]:
    """One optimizer step on a global batch.

    The loss is summed over pairs and divided by their global number, whatever the split into
    micro-batches and ranks; gradients are summed over ranks.

    Returns:
        Metric names, and their means over the batch before the update (K,), on the device.
    """
    run.optimizer.zero_grad()
    metrics = []
    for host_batch in step_batches.batches:
        batch = host_batch.to(run.world.device)
        losses, values = run.step_loss.compute(batch, step)
        (losses.sum() / step_batches.num_examples).backward()
        run.step_loss.done()
        metrics.append(values)
    grad_norm = clip_gradients(run, step)
    run.optimizer.step()
    names, sums = sum_over_examples(metrics)
    means = run.world.sum(sums) / step_batches.num_examples
    names = [name_for_split(name, "train") for name in names]
    return [*names, "grad_norm"], torch.cat([means, grad_norm[None]])


def clip_gradients(run: Run, step: int) -> Tensor:
    """Clip the global gradient norm; a norm that is not finite stops the run before the update.

    On a GPU the check runs on the device, so nothing waits for it.

    Returns:
        The norm before clipping, a float32 scalar on the device.
    """
    parameters = list(run.policy.parameters())
    norm = torch.nn.utils.clip_grad_norm_(parameters, run.config.max_grad_norm)
    if isinstance(norm, DTensor):
        norm = norm.full_tensor()
    if run.world.device.type == "cuda":
        torch._assert_async(torch.isfinite(norm), f"{NON_FINITE} {step + 1}")
    elif not torch.isfinite(norm):
        raise NonFiniteError(
            f"{NON_FINITE} {step + 1}: {norm.item()}; the weights are those after step {step}"
        )
    return norm.float()
