"""`task=tisdpo`: TIS-DPO from a base or SFT model to the trained policy, stage after stage.

Every stage is one of the tasks that exist by themselves, with a config derived from the run's, in a
subfolder of the run folder. A stage that is done leaves `stage.json` in its subfolder and is never
done again; the same command with the same `run_dir` goes on with the first one that is not.
"""

import contextlib
import gc
import io
import logging
import time
from pathlib import Path

import torch

from fastpref.config import Config
from fastpref.distributed import World
from fastpref.errors import InterruptionError, PreemptionError
from fastpref.signals import say_if_stopped
from fastpref.tisdpo.closing_report import (
    MARKER,
    close_run,
    describe_training,
    describe_weights,
    mark_done,
)
from fastpref.tisdpo.estimate import estimate_weights
from fastpref.tisdpo.recipe_folder import find_place, open_run_dir
from fastpref.tisdpo.report import WeightsReport
from fastpref.tisdpo.stages import Stage, build_stages
from fastpref.train.run_folder import locked, run_place
from fastpref.train.task import train

logger = logging.getLogger("fastpref")


def run_tisdpo(config: Config, world: World) -> None:
    """Every stage that is not done yet, then the closing report.

    Raises:
        FastprefError: whatever a stage raises; what was done before it stays done.
    """
    place = world.on_main(lambda: find_place(run_place(config), config.resume.path, config.stages))
    run_dir = open_run_dir(place, config.to_yaml(), world)
    stages = build_stages(config, run_dir)
    command = f"the same command with run_dir={run_dir}"
    go_on = f"stages that are done stay done, {command} goes on with the next one"
    try:
        with say_if_stopped(go_on), locked(run_dir, world):
            run_stages(stages, run_dir, world, command)
    except (InterruptionError, PreemptionError) as stopped:
        if command in str(stopped):
            raise
        raise type(stopped)(f"{stopped}; {go_on}") from None


def run_stages(stages: list[Stage], run_dir: Path, world: World, command: str) -> None:
    """What is left to do; `command` says in words how to go on once it was stopped."""
    for number, stage in enumerate(stages, start=1):
        folder = run_dir / stage.name
        place = f"stage {number} of {len(stages)}, {stage.name}"
        if world.on_main((folder / MARKER).is_file):
            logger.info("%s: done already", place)
            continue
        logger.info("%s: %s", place, stage.what)
        run_stage(stage, folder, world, command)
    world.on_main(lambda: close_run(run_dir, stages))


def run_stage(stage: Stage, folder: Path, world: World, command: str) -> None:
    """One stage, from where an earlier start has left it; its own closing table goes to
    `summary.txt`."""
    is_training = stage.config.task == "train"
    started = time.perf_counter()
    table = io.StringIO()
    reports: list[WeightsReport] = []
    try:
        with contextlib.redirect_stdout(table):
            if is_training:
                seconds = train(stage.config, world, command=command)
            else:
                reports = estimate_weights(stage.config, world)
                seconds = time.perf_counter() - started
    finally:
        free_memory()

    def close() -> None:
        result = describe_training(folder) if is_training else describe_weights(reports)
        mark_done(folder, what=stage.what, result=result, seconds=seconds, table=table.getvalue())

    # no rank starts on a stage whose input rank 0 has not finished
    world.on_main(close)


def free_memory() -> None:
    """Give a stage's models back before the next one loads its own."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
