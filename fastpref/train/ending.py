"""The end of a run, complete or stopped: save state and model, show results, raise its cause."""

import torch.distributed as dist

from fastpref.errors import CheckpointError
from fastpref.signals import StopRequest
from fastpref.train.checkpoints import Checkpoints
from fastpref.train.export.latest import export_model
from fastpref.train.logs.report import show_results
from fastpref.train.non_finite import raise_if_not_finite
from fastpref.train.run import Run


def finish(run: Run, checkpoints: Checkpoints, stop: StopRequest, *, command: str) -> float:
    """Save the last state, export the model, and show the results.

    Args:
        run: The run that ends.
        checkpoints, stop: Those of the run.
        command: How to resume the run, for the message.

    Returns:
        Wall time of the training in seconds, earlier starts included.

    Raises:
        NonFiniteError: a step was not finite; nothing was saved since.
        CheckpointError: a file could not be written, or the last state not saved.
        InterruptionError, PreemptionError: the run was asked to stop, and everything was saved.
    """
    raise_if_not_finite(run)
    with stop.if_unwritable():
        run.log.flush()
    # the state first: it is the one thing that cannot be recovered
    checkpoints.finish(stop)
    what_is_saved, lost = f"the model so far is in {run.run_dir / 'LATEST'}", None
    seconds = run.state.seconds + run.seconds()
    try:
        export_model(run.policy, run.export, run.run_dir, run.world)
        # on_main: drawing curves may take longer than the timeout of a collective
        run.world.on_main(lambda: show_results(run.log.records, run.run_dir, seconds))
    except dist.DistError as error:
        # the ranks' store is lost: it was in a torchrun that was killed
        what_is_saved, lost = f"the state is saved in {run.run_dir}", error
    except CheckpointError as error:
        raise type(error)(explain_export(error, run, checkpoints, stop, command)) from error
    checkpoints.raise_if_unsaved()
    stop.raise_if_requested(
        f"{what_is_saved}, {command} goes on after step {run.state.step}", run.world
    )
    if lost is not None:
        raise lost
    return seconds


def explain_export(
    error: CheckpointError, run: Run, checkpoints: Checkpoints, stop: StopRequest, command: str
) -> str:
    """The message of a model that cannot be written: also what ended the training before its last
    step, if that was a file too, and what became of the state."""
    saved = "the state is saved, " if run.state.step else ""
    state = f"{saved}{command} goes on after step {run.state.step}"
    parts = [stop.failure, error, checkpoints.unsaved or state]
    return "; ".join(str(part) for part in parts if part is not None)
