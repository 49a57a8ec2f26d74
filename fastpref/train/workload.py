"""How much a run computes at once: as much as its memory holds, found out before the first step."""

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
    """What a run computes, and how much of it at once."""

    step_loss: StepLoss
    layout: RowLayout
    repetition: Repetition
    useful: UsefulWork | None
    """What a step needs, where that is known."""


def build_workload(
    objective: Objective,
    pair: Pair,
    training: TrainingOptions,
    world: World,
    *,
    limit: int | None,
    longest: int,
) -> Workload:
    """What a run computes, with as many tokens at once as the device holds.

    Args:
        pair: Policy and reference, loaded, on their device.
        training: The options, before it was found out whether blocks are compiled.
        limit: Tokens at once that were asked for; None leaves them to us.
        longest: Tokens of the longest sequence.
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
