"""The loop over optimizer steps, with evaluations and checkpoints between them."""

import logging

from fastpref.batches.loader import StepBatches
from fastpref.errors import first_line, is_failed_compilation
from fastpref.progress import Progress
from fastpref.signals import StopRequest
from fastpref.train.checkpoints import Checkpoints
from fastpref.train.evaluation import evaluate
from fastpref.train.logs.metrics import PendingStep, Record, format_metrics
from fastpref.train.non_finite import stop_if_not_finite
from fastpref.train.run import Run
from fastpref.train.step import train_step

logger = logging.getLogger("fastpref")


def run_loop(run: Run, checkpoints: Checkpoints, stop: StopRequest) -> None:
    """Run the remaining optimizer steps; ends early if any rank is asked to stop."""
    try:
        run_steps(run, checkpoints, stop)
    except Exception as error:
        # a signal to all processes of a job also ends the compiler at work: that step is not made
        is_of_signal = stop.requested and is_failed_compilation(error)
        # of several ranks the others wait for this one's step
        if not is_of_signal or run.world.size > 1:
            raise
        logger.warning("stopping in the middle of a step: %s", first_line(error))


def run_steps(run: Run, checkpoints: Checkpoints, stop: StopRequest) -> None:
    """The steps of `run_loop`."""
    order, state = run.train.order, run.state
    eval_steps = order.num_steps
    if run.eval is not None:
        eval_steps = steps_between_evals(run.config.eval_every, run.config.batch_size)
    if is_evaluation_due(run, eval_steps):
        checkpoints.after_evaluation(evaluate(run, stop), stop)
    progress = Progress(total=order.num_steps, visible=run.world.is_main)
    progress.advance(state.step)
    with progress, run.train.steps(run.world, state.step) as steps:
        for batches in steps:
            if stop.agreed(run.world):
                return
            step_and_log(run, batches, progress, stop)
            evaluation = evaluate(run, stop) if is_evaluation_due(run, eval_steps) else None
            checkpoints.after_step(evaluation, stop)


def is_evaluation_due(run: Run, eval_steps: int) -> bool:
    """Whether the current step is due for an evaluation that has not been done yet."""
    step = run.state.step
    if step == run.state.evaluated or (step == 0 and not run.config.do_first_eval):
        return False
    return step % eval_steps == 0 or step == run.train.order.num_steps


def step_and_log(run: Run, batches: StepBatches, progress: Progress, stop: StopRequest) -> None:
    """Make one optimizer step; write and show the log's lines if they are due."""
    state, lr = run.state, run.updates.lr
    names, values, num_computed = train_step(run, batches, state.step)
    state.step += 1
    state.examples += batches.num_examples
    due = run.log.add_step(
        PendingStep(
            step=state.step,
            examples=state.examples,
            num_examples=batches.num_examples,
            num_tokens=batches.num_tokens,
            num_computed=num_computed,
            num_scored=batches.num_scored,
            lr=lr,
            names=names,
            values=values,
        )
    )
    if due or run.world.device.type == "cpu":
        # no extra wait: the metrics are fetched now anyway, or are in host memory already
        stop_if_not_finite(run, stop)
    if due:
        with stop.if_unwritable():
            show_step(progress, run.log.flush())
    progress.advance()


def show_step(progress: Progress, record: Record | None) -> None:
    """Show the latest training record on rank 0: in short beside the bar, or as a full log line."""
    if record is None:
        return
    if not progress.on_terminal:
        logger.info("train stats after %d examples: %s", record["examples"], format_metrics(record))
        return
    numbers = f"loss {record['loss/train']:.3f}"
    if "rewards_train/accuracies" in record:
        numbers += f"  accuracy {record['rewards_train/accuracies']:.2f}"
    progress.show(f"{numbers}  {record['tokens_per_second']:,.0f} tokens/s")


def steps_between_evals(eval_every: int, batch_size: int) -> int:
    """`eval_every` examples in whole optimizer steps, >= 1; warns if that is rounded."""
    steps = max(1, eval_every // batch_size)
    if steps * batch_size != eval_every:
        logger.warning(
            "eval_every=%d is no multiple of batch_size=%d: evaluating every %d examples",
            eval_every,
            batch_size,
            steps * batch_size,
        )
    return steps
