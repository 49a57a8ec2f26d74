"""The end of a run, wherever it comes: state, model, curves and table, and why it was not later."""

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
    export_model(run.policy, run.export, run.run_dir, run.world)
    seconds = run.state.seconds + run.seconds()
    # curves take longer than ranks may wait for one another in a collective
    run.world.on_main(lambda: show_results(run.log.records, run.run_dir, seconds))
    checkpoints.raise_if_unsaved()
    what_is_saved = (
        f"the model so far is in {run.run_dir / 'LATEST'}, {command} goes on after step "
        f"{run.state.step}"
    )
    stop.raise_if_requested(what_is_saved, run.world)
    return seconds
