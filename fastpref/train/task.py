"""`task=train`: trains a policy from its initial model, or resumes from a checkpoint."""

import logging
import random
import shlex

import numpy as np
import torch

from fastpref.checkpoint.agreement import Agreement
from fastpref.config import Config
from fastpref.deadline import Deadline
from fastpref.distributed import World
from fastpref.signals import StopRequest, say_if_stopped
from fastpref.train.build import build_run
from fastpref.train.checkpoints import open_checkpoints
from fastpref.train.ending import finish
from fastpref.train.logs.advice import advise
from fastpref.train.loop import run_loop
from fastpref.train.resume.start import find_start
from fastpref.train.run_folder import keeping_locks, run_place

logger = logging.getLogger("fastpref")


def train(
    config: Config, world: World, *, command: str | None = None, chat_date: str = ""
) -> float:
    """Train a policy.

    Args:
        command: How to resume a stopped run, for the message; None: `resume=auto`.
        chat_date: The date that a new run gives to a chat template that prints it; "": today.

    Returns:
        Wall time of the training in seconds, earlier starts included.

    Raises:
        FastprefError: with the exit code of its cause; InterruptionError, PreemptionError and the
            CheckpointError of a file that cannot be written come after the state was saved.
    """
    seed_everything(config.seed)
    with keeping_locks(), Agreement(world) as agreement:
        start = find_start(config.resume.path, run_place(config), agreement)
        run = build_run(config, world, start, chat_date)
        for line in advise(run):
            logger.warning(line)
        deadline = Deadline(config.checkpoint.deadline_seconds())
        # the log is closed last: a tracker may wait for its service, which must not delay the
        # export of the model
        with (
            say_if_stopped(f"what there is lies in {run.run_dir}"),
            run.log,
            StopRequest(deadline) as stop,
            open_checkpoints(run, deadline) as checkpoints,
        ):
            run_loop(run, checkpoints, stop)
            in_folder = shlex.quote(f"run_dir={run.run_dir}")
            command = command or f"resume=auto {in_folder}"
            return finish(run, checkpoints, stop, command=command)


def seed_everything(seed: int) -> None:
    """Seed torch, numpy and random; the order of the data has its own generators."""
    random.seed(seed)
    np.random.seed(seed)
    torch.manual_seed(seed)
