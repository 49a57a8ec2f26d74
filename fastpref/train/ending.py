"""The end of a run, wherever it comes: state, model, curves and table, and why it was not later."""

import torch.distributed as dist

from fastpref.signals import StopRequest
from fastpref.train.checkpoints import Checkpoints
from fastpref.train.export.latest import export_model
from fastpref.train.logs.report import show_results
from fastpref.train.non_finite import raise_if_not_finite
from fastpref.train.run import Run


def finish(run: Run, checkpoints: Checkpoints, stop: StopRequest, *, command: str) -> float:
    """Save and say what there is.

    Args:
        run: That ends.
        checkpoints, stop: Of the run.
        command: What goes on with it, in words.

    Returns:
        Its seconds, those of earlier starts included.

    Raises:
        NonFiniteError: a step was not finite; nothing was saved since.
        CheckpointError: a file could not be written, though the model was.
        InterruptionError, PreemptionError: a signal came, and everything was saved.
    """
    raise_if_not_finite(run)
    with stop.if_unwritable():
        run.log.flush()
    # first what cannot be had again
    checkpoints.finish(stop)
    what_is_saved, lost = f"the model so far is in {run.run_dir / 'LATEST'}", None
    seconds = run.state.seconds + run.seconds()
    try:
        export_model(run.policy, run.export, run.run_dir, run.world)
        # curves take longer than ranks may wait for one another in a collective
        run.world.on_main(lambda: show_results(run.log.records, run.run_dir, seconds))
    except dist.DistError as error:
        # a torchrun that was killed has taken the ranks' store along
        what_is_saved, lost = f"the state is saved in {run.run_dir}", error
    checkpoints.raise_if_unsaved()
    stop.raise_if_requested(
        f"{what_is_saved}, {command} goes on after step {run.state.step}", run.world
    )
    if lost is not None:
        raise lost
    return seconds
