"""`task=tisdpo`: TIS-DPO from a base or SFT model to the trained policy, stage by stage.

Each stage is a task that can also run on its own, with a config derived from the run's, in a
subfolder of the run folder. A stage that is done leaves `stage.json` in its subfolder and is not
repeated: the same command with the same `run_dir` resumes with the first one that is not done.
"""

import logging
import shlex
from functools import partial
from pathlib import Path

from fastpref.config import Config
from fastpref.distributed import World
from fastpref.errors import InterruptionError, PreemptionError
from fastpref.signals import end_if_past, say_if_stopped
from fastpref.tisdpo.beforehand import check_estimation
from fastpref.tisdpo.closing_report import link_model, print_report
from fastpref.tisdpo.recipe_folder import find_place, open_run_dir
from fastpref.tisdpo.run_stage import run_stage
from fastpref.tisdpo.stage_record import is_done, take_inputs
from fastpref.tisdpo.stages import Stage, build_stages
from fastpref.train.run_folder import locked, run_place

logger = logging.getLogger("fastpref")


def run_tisdpo(config: Config, world: World) -> None:
    """Run all stages that are not done yet, then print the closing report.

    Raises:
        FastprefError: raised by a stage; earlier stages stay done.
    """
    place = world.on_main(lambda: find_place(run_place(config), config.resume.path, config.stages))
    # an option that only a stage refuses leaves no folder behind
    build_stages(config, place.run_dir or place.root)
    run_dir = open_run_dir(place, config.to_yaml(), world)
    stages = build_stages(config, run_dir)
    command = "the same command with " + shlex.quote(f"run_dir={run_dir}")
    go_on = f"stages that are done stay done, {command} goes on with the next one"
    try:
        with say_if_stopped(go_on), locked(run_dir, world):
            run_stages(stages, run_dir, world, command)
    except (InterruptionError, PreemptionError) as stopped:
        if command in str(stopped):
            raise
        raise type(stopped)(f"{stopped}; {go_on}") from None


def run_stages(stages: list[Stage], run_dir: Path, world: World, command: str) -> None:
    """Run the stages that are not done, after checking that the others had the same inputs.

    Args:
        command: How to resume a stopped run, for the message.

    Raises:
        CheckpointError: data, tokenizer or model differ from those of the stages that are done.
        DataError: the estimation cannot score a row; raised before anything is trained.
        PreemptionError: the deadline has passed between two stages.
    """
    folders = [run_dir / stage.name for stage in stages]
    done = world.on_main(lambda: [folder for folder in folders if is_done(folder)])
    if len(done) == len(stages):
        take_inputs(stages, run_dir, done, world)
    if not done:
        world.on_main(partial(check_estimation, stages))
    for number, (stage, folder) in enumerate(zip(stages, folders, strict=True), start=1):
        place = f"stage {number} of {len(stages)}, {stage.name}"
        if folder in done:
            logger.info("%s: done already", place)
            continue
        end_if_past(stage.config.checkpoint.deadline_seconds(), world, f"{command} goes on")
        # checked again before each stage: a run may take days, and files may be replaced meanwhile
        inputs = take_inputs(stages, run_dir, done, world)
        logger.info("%s: %s", place, stage.what)
        run_stage(stage, folder, world, inputs=inputs, command=command)
        done.append(folder)
    world.on_main(partial(link_model, run_dir, stages[-1]))
    world.on_main(partial(print_report, run_dir, stages))
