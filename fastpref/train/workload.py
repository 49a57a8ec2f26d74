"""How many tokens a run computes at once: as many as fit in memory, measured before the first
step."""

from typing import NamedTuple

from fastpref.batches.layouts import RowLayout
from fastpref.config import TrainingOptions
from fastpref.distributed import World
from fastpref.memory.fitting import Fitting
from fastpref.memory.planning import Measured
from fastpref.memory.repetition import Repetition
from fastpref.memory.worst_rows import Rows
from fastpref.model.pair import Pair
from fastpref.objectives.objective import Objective
from fastpref.objectives.step_loss import StepLoss
from fastpref.train.logs.utilization import UsefulWork, useful_work
from fastpref.train.optim import state_bytes


class Workload(NamedTuple):
    """The computation of a run, and its division into micro-batches."""

    step_loss: StepLoss
    layout: RowLayout
    repetition: Repetition
    useful: UsefulWork | None
    """Operations that a step needs; None if unknown."""


def build_workload(
    objective: Objective,
    pair: Pair,
    training: TrainingOptions,
    world: World,
    *,
    limit: int | None,
    longest: int,
) -> Workload:
    """Build the computation of a run, with as many tokens per micro-batch as the device holds.

    Args:
        pair: Policy and reference, loaded, on their device.
        training: The options; `compile` is replaced by whether blocks were in fact compiled.
        limit: Requested tokens per micro-batch; None: measure how many fit.
        longest: Length of the longest sequence, in tokens.
    """
    training = training._replace(compile=str(pair.compiled).lower())
    step_loss = StepLoss(objective, pair.policy, pair.reference)
    attention = pair.policy.attention
    gathers_keys = attention is not None and attention.gathers_keys
    fitting = Fitting(
        policy=pair.policy,
        step_loss=step_loss,
        training=training,
        measured=Measured(
            body=pair.policy.path.body,
            rows=Rows(pair.layout, longest, training.loss.needs.pairs, gathers_keys),
            state_bytes=state_bytes(training),
        ),
        replicated=pair.replicated,
        world=world,
    )
    layout = pair.layout.limited_to(fitting.fit(limit))
    useful = useful_work(pair, training.model, world)
    return Workload(step_loss, layout, Repetition(num_ranks=world.size), useful)
