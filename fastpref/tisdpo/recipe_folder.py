"""The run folder of `task=tisdpo`: a new one, or that of an earlier start, which is resumed."""

import logging
import shlex
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf

from fastpref.complete_files import LOCK, complete_file
from fastpref.config import StagesConfig
from fastpref.distributed import World
from fastpref.errors import ConfigError
from fastpref.tisdpo.stages import first_stage
from fastpref.train.opening import read_options
from fastpref.train.resume.differences import Difference, is_among, list_differences
from fastpref.train.run_folder import OPTIONS, RunPlace, lock, took_no_step

logger = logging.getLogger("fastpref")

DATE_FILE = "chat-date"
"""File in the folder of a run whose chat template prints the date: the day of its first start."""
MAY_CHANGE = (
    *("run_dir", "output_dir", "local_dirs", "exp_name", "trainer", "fsdp_port", "debug"),
    *("minimum_log_interval_secs", "wandb", "tensorboard", "checkpoint", "resume", "parallel"),
    *("data.cache_dir", "data.num_proc", "reference.cache_dir"),
)
"""Options that may differ between two starts of a run, as no result depends on them."""


def find_place(place: RunPlace, resume: str, stages: StagesConfig) -> RunPlace:
    """Where a recipe runs: in `run_dir` if given, else with `resume=auto` in the newest folder of
    its name whose first stage has begun, else in a new one.

    Args:
        place: The place given by the run's options.
        resume: "never" or "auto", see `ResumeConfig.path`.
        stages: Decide which stage comes first.
    """
    if place.run_dir is not None or resume != "auto":
        return place
    return replace(place, run_dir=place.newest_with(first_stage(stages)))


def check_run_folder(place: RunPlace, options: str, *, allow: Sequence[str]) -> None:
    """Refuse, before anything is loaded, a run folder that is not this run's.

    Args:
        place: Where the folder is to be.
        options: The text of this run's `config.yaml`.
        allow: Names of options that may differ from those the run was started with.

    Raises:
        ConfigError: it cannot be created, holds something else, or was started with other options.
    """
    run_dir = place.run_dir
    if run_dir is None or not (run_dir / OPTIONS).is_file():
        place.check()
        return
    before = read_options(run_dir / OPTIONS)
    if before.get("task") != "tisdpo":
        if not took_no_step(run_dir):
            raise ConfigError(f"run_dir: {run_dir} holds another run; name a new folder")
        return
    now = OmegaConf.to_container(OmegaConf.create(options))
    changes = [change for change in list_changes(before, now) if not is_among(change.key, allow)]
    if changes and has_begun(run_dir):
        raise ConfigError(
            f"run_dir: {run_dir} was started with other options: {'; '.join(map(str, changes))}; "
            "give the same ones to go on with it, name a new folder, or accept them with "
            f"resume.allow=[{','.join(change.key for change in changes)}]"
        )


def has_begun(run_dir: Path) -> bool:
    """Whether an earlier start has results: a training step or other output of a stage."""
    return any(_is_result(child) for child in run_dir.iterdir())


def _is_result(child: Path) -> bool:
    if not child.is_dir():
        return child.name not in (OPTIONS, LOCK, DATE_FILE)
    files = (path for path in child.rglob("*") if path.is_file())
    return not took_no_step(child) and any(path.name != LOCK for path in files)


def list_changes(before: Any, now: Any) -> list[Difference]:
    """Options that differ but must not."""
    return [
        difference
        for difference in list_differences(before, now)
        if not is_among(difference.key, MAY_CHANGE)
    ]


def open_run_dir(place: RunPlace, options: str, world: World) -> Path:
    """Open the run folder: that of an earlier start, or a new one.

    Args:
        place: Where the folder is to be, see `find_place`.
        options: The text of this run's `config.yaml`.
    """
    named = place.run_dir
    if named and world.on_main(lambda: go_on_in(named, options)):
        logger.info("run folder: %s, gone on with", named)
        return named
    run_dir = world.on_main(lambda: place.create(options))
    option = shlex.quote(f"run_dir={run_dir}")
    logger.info("run folder: %s; after an interruption add %s", run_dir, option)
    return run_dir


def go_on_in(run_dir: Path, options: str) -> bool:
    """Whether a folder is that of an earlier start of a recipe, which is then locked. If that has
    no results yet, its `config.yaml` is replaced by `options`."""
    path = run_dir / OPTIONS
    if not path.is_file() or read_options(path).get("task") != "tisdpo":
        return False
    lock(run_dir)
    if not has_begun(run_dir):
        with complete_file(path) as file:
            file.write(options)
    return True
