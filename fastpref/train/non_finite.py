"""Finds the rows that made a step non-finite, by computing it again with the current weights."""

from typing import NamedTuple

import torch
import torch.distributed as dist

from fastpref.batches.loader import StepBatches
from fastpref.checks import listed
from fastpref.errors import NonFiniteError
from fastpref.heartbeat import await_device
from fastpref.signals import NON_FINITE, StopRequest
from fastpref.train.guard import MOST_IN_A_ROW
from fastpref.train.run import Run
from fastpref.train.step import add_gradients, clip_gradients, within_memory


class Finding(NamedTuple):
    """The non-finite rows of one rank."""

    losses: list[str]
    """`file:row` of the rows whose loss is not finite."""
    gradients: list[str]
    """`file:row` of all rows of a micro-batch with finite losses but a non-finite gradient or
    gradient norm. Sharded gradients are summed over the ranks, so every rank names its rows."""


def stop_if_not_finite(run: Run, stop: StopRequest) -> None:
    """If steps are no longer applied, drop them from the log and ask all ranks to stop. Waits for
    the device."""
    first_bad = run.updates.guard.first_bad_step()
    if first_bad:
        run.log.forget_from(first_bad)
        stop.ask(NON_FINITE)


def raise_if_not_finite(run: Run) -> None:
    """If steps are no longer applied, raise an error that names the first of them, with its rank
    and rows.

    Every rank calls this. The weights are still those before that step, and its rows are a function
    of its number, so computing it again reproduces the fault.

    Raises:
        NonFiniteError: the same on every rank.
    """
    step = run.updates.guard.first_bad_step()
    if not step:
        return
    run.log.forget_from(step)
    found: list[Finding] = [Finding([], [])] * run.world.size
    dist.all_gather_object(found, look_at(run, step - 1))
    in_a_row = ""
    if run.config.on_nonfinite == "skip":
        in_a_row = f", the first of {MOST_IN_A_ROW} in a row,"
    raise NonFiniteError(
        f"{describe(found)} is not finite at step {step}{in_a_row}; neither it nor what came after "
        f"it was applied: the weights are those after step {step - 1}"
    )


def describe(found: list[Finding]) -> str:
    """The findings of all ranks in words: "the loss of words/train.jsonl:17 on rank 1".

    Args:
        found: By rank.
    """
    losses = {rank: finding.losses for rank, finding in enumerate(found) if finding.losses}
    gradients = {rank: finding.gradients for rank, finding in enumerate(found) if finding.gradients}
    if not losses and not gradients:
        return "a loss or gradient, which computed again is finite (a fault of the device?),"
    what = "loss" if losses else "gradient"
    places = [f"{listed(rows)} on rank {rank}" for rank, rows in (losses or gradients).items()]
    return f"the {what} of {'; '.join(places)}"


def look_at(run: Run, index: int) -> Finding:
    """This rank's non-finite rows of step `index`, counted from 0."""
    step = run.train.step(index, run.world)
    # in the micro-batches that memory has turned out to have room for
    finding, _ = within_memory(
        run,
        run.train,
        step,
        lambda batches: look_through(run, batches, index),
        undo=run.policy.forget_gradients,
    )
    run.policy.forget_gradients()
    return finding


def look_through(run: Run, step: StepBatches, index: int) -> Finding:
    """The non-finite rows among this rank's micro-batches of step `index`."""
    finding = Finding([], [])
    rows = run.train.order.batch(index)
    for host_batch, micro_batch in zip(step.batches, step.micro_batches, strict=True):
        run.policy.forget_gradients()
        losses, _ = add_gradients(run, host_batch, index, step.num_examples)
        # as the step computes it, over all shards: one rank's own may be finite all the same
        norm = clip_gradients(run)
        await_device(run.world)
        is_bad = (~torch.isfinite(losses)).cpu().numpy()
        places = [run.train.data.places.name(int(row)) for row in rows[micro_batch.rows]]
        finding.losses.extend(place for place, bad in zip(places, is_bad, strict=True) if bad)
        if not is_bad.any() and not torch.isfinite(norm):
            finding.gradients.extend(places)
    return finding
