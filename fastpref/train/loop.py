"""The training run: one loop over optimizer steps, over objects that were built before it."""

import logging
import random
import time
from contextlib import closing

import numpy as np
import torch

from fastpref.config import Config
from fastpref.distributed import World
from fastpref.progress import Progress
from fastpref.signals import StopRequest, say_if_stopped
from fastpref.train.advice import advise
from fastpref.train.build import build_run
from fastpref.train.evaluation import evaluate
from fastpref.train.export import export_model
from fastpref.train.metrics import (
    PendingStep,
    Record,
    format_metrics,
)
from fastpref.train.report import show_results
from fastpref.train.run import Run
from fastpref.train.step import train_step

logger = logging.getLogger("fastpref")


def train(config: Config, world: World) -> None:
    """`task=train`: from rows and a model to a trained model.

    Raises:
        FastprefError: with the exit code of what went wrong; InterruptionError, PreemptionError
            and the CheckpointError of a file that cannot be written after the model was saved.
    """
    seed_everything(config.seed)
    run = build_run(config, world)
    for line in advise(run):
        logger.warning(line)
    started = time.perf_counter()
    # the log is closed last: a tracker may wait for its service, and a model is not to wait for it
    with (
        say_if_stopped(f"what there is lies in {run.run_dir}"),
        closing(run.log),
        StopRequest() as stop,
    ):
        run_loop(run, stop)
        with stop.if_unwritable():
            run.log.flush()
        export_model(run.policy, run.export, run.run_dir, world)
        if world.is_main:
            show_results(run.log.records, run.run_dir, time.perf_counter() - started)
        stop.raise_if_requested(run.run_dir, world)


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random. The order of the data depends on its own generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)


def run_loop(run: Run, stop: StopRequest) -> None:
    """Every optimizer step, with evaluations before, between and after; ends early on a signal."""
    config, world, order = run.config, run.world, run.train.order
    eval_steps = steps_between_evals(config.eval_every, config.batch_size)
    examples = 0
    progress = Progress(total=order.num_steps, visible=world.is_main)
    with progress, run.train.steps(world) as steps:
        for step, batches in enumerate(steps):
            if step % eval_steps == 0 and (step > 0 or config.do_first_eval):
                evaluate(run, step, examples, stop)
            if stop.agreed(world):
                return
            examples += batches.num_examples
            lr = float(run.scheduler.get_last_lr()[0])
            names, values = train_step(run, batches, step)
            run.scheduler.step()
            due = run.log.add_step(
                PendingStep(
                    step=step + 1,
                    examples=examples,
                    num_examples=batches.num_examples,
                    num_tokens=batches.num_tokens,
                    num_computed=batches.num_computed,
                    lr=lr,
                    names=names,
                    values=values,
                )
            )
            if due:
                with stop.if_unwritable():
                    show_step(progress, run.log.flush(), visible=world.is_main)
            progress.advance()
    evaluate(run, order.num_steps, examples, stop)


def show_step(progress: Progress, record: Record | None, *, visible: bool) -> None:
    """The latest training record: beside the bar in short, or as a log line in full."""
    if record is None or not visible:
        return
    if not progress.on_terminal:
        logger.info("train stats after %d examples: %s", record["examples"], format_metrics(record))
        return
    numbers = f"loss {record['loss/train']:.3f}"
    if "rewards_train/accuracies" in record:
        numbers += f"  accuracy {record['rewards_train/accuracies']:.2f}"
    progress.show(f"{numbers}  {record['tokens_per_second']:,.0f} tokens/s")


def steps_between_evals(eval_every: int, batch_size: int) -> int:
    """`eval_every` examples as whole optimizer steps, at least one; says so where it rounds."""
    steps = max(1, eval_every // batch_size)
    if steps * batch_size != eval_every:
        logger.warning(
            "eval_every=%d is no multiple of batch_size=%d: evaluating every %d examples",
            eval_every,
            batch_size,
            steps * batch_size,
        )
    return steps
