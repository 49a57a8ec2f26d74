"""Opening a run's folder and log: new ones, or those of the run that is resumed."""

import logging
from functools import partial
from pathlib import Path
from typing import Any

from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException
from yaml import YAMLError

from fastpref.complete_files import complete_file, writing
from fastpref.config import TrackerOptions
from fastpref.distributed import World
from fastpref.errors import ConfigError
from fastpref.train.logs.metrics import MetricsLog, first_loss_tolerance
from fastpref.train.logs.trackers import build_trackers
from fastpref.train.logs.utilization import UsefulWork
from fastpref.train.resume.differences import (
    Difference,
    dotted,
    effect_of,
    is_among,
    list_differences,
)
from fastpref.train.resume.history import METRICS, bring_history, read_records
from fastpref.train.resume.origin import keep_origin
from fastpref.train.resume.start import Start
from fastpref.train.run_folder import OPTIONS, clear_start, lock, names_in, took_no_step

logger = logging.getLogger("fastpref")


def open_run_dir(start: Start, options: str, world: World) -> Path:
    """Open the folder of a run, the same one on every rank.

    Args:
        start: What the run starts from, and where its folder is to be.
        options: The text of its `config.yaml`.

    Raises:
        CheckpointError: it cannot be created or written to.
    """
    if start.checkpoint is None:
        return world.on_main(partial(_open_without_checkpoint, start, options))
    return world.on_main(partial(_open_with_checkpoint, start, start.checkpoint.folder, options))


def _open_without_checkpoint(start: Start, options: str) -> Path:
    run_dir = start.run_dir
    if run_dir is None or not _begun(run_dir) or changes_of_numbers(run_dir, options):
        return _open_new(start, options)
    begin_anew(run_dir, options)
    return run_dir


def check_run_dir(start: Start, options: str) -> None:
    """Refuse a `run_dir` that holds another run without a checkpoint.

    Args:
        start, options: See `open_run_dir`.

    Raises:
        ConfigError: naming the options that differ.
    """
    run_dir = start.place.run_dir
    if start.checkpoint is not None or run_dir is None or not _begun(run_dir):
        return
    changed = changes_of_numbers(run_dir, options)
    if changed:
        raise ConfigError(
            f"run_dir: {run_dir} holds another run, without a checkpoint to go on from: "
            f"{'; '.join(map(str, changed))}; name a new folder, or begin anew in this one with "
            f"resume.allow=[{','.join(change.key for change in changed)}]"
        )


def _begun(run_dir: Path) -> bool:
    """Whether a folder holds a run that completed a step."""
    return run_dir.is_dir() and bool(names_in(run_dir)) and not took_no_step(run_dir)


def _open_with_checkpoint(start: Start, checkpoint: Path, options: str) -> Path:
    """The folder of the resumed run, or a new one with the history of the checkpoint's run."""
    run_dir = start.run_dir
    if run_dir is None:
        run_dir = _open_new(start, options)
        keep_origin(run_dir, checkpoint)
    with writing(run_dir):
        keep_options(run_dir, options, start.state.step)
        if start.source is not None:
            bring_history(start.source, run_dir, start.state, start.unwritten)
    return run_dir


def _open_new(start: Start, options: str) -> Path:
    run_dir = start.place.create(options)
    lock(run_dir)
    return run_dir


def changes_of_numbers(run_dir: Path, options: str) -> list[Difference]:
    """Options that differ from those of the run in a folder and change its results, without those
    in `resume.allow`."""
    now: Any = OmegaConf.to_container(OmegaConf.create(options))
    return [
        difference
        for difference in list_differences(read_options(run_dir / OPTIONS), now)
        if not effect_of(difference, now["optim"]["schedule"])
        and not is_among(difference.key, now["resume"]["allow"])
    ]


def begin_anew(run_dir: Path, options: str) -> None:
    """Restart in the folder of a run that ended before its first checkpoint; a model in it stays
    until a new one replaces it."""
    logger.info("%s: the run in it ended before its first checkpoint and begins anew", run_dir)
    clear_start(run_dir, keep_model=True)
    with complete_file(run_dir / OPTIONS) as file:
        file.write(options)


def read_options(path: Path) -> dict[Any, Any]:
    """The options in a run folder's `config.yaml`; {} if it cannot be read."""
    try:
        options = OmegaConf.to_container(OmegaConf.load(path))
    except (YAMLError, OmegaConfBaseException, UnicodeDecodeError):
        return {}
    except OSError as error:
        if error.errno is not None:
            raise
        # OmegaConf raises this for a file that holds a bare number
        return {}
    return options if isinstance(options, dict) else {}


def names_of_starts(run_dir: Path) -> set[str]:
    """Dotted names of all options that the starts of a run had, including options of other versions
    of fastpref; see `keep_options`."""
    return {name for path in run_dir.glob("config*.yaml") for name in dotted(read_options(path))}


def keep_options(run_dir: Path, options: str, step: int) -> None:
    """Write this start's options; the last ones, if they differ, become
    `config-until-step-<step>.yaml`."""
    path = run_dir / OPTIONS
    # copied as bytes: the file may be damaged
    before = path.read_bytes() if path.is_file() else options.encode()
    if before != options.encode():
        with complete_file(run_dir / f"config-until-step-{step}.yaml", "wb") as file:
            file.write(before)
    with complete_file(path) as file:
        file.write(options)


def open_log(
    run_dir: Path,
    world: World,
    *,
    followers: TrackerOptions,
    options: dict[str, Any],
    min_interval_seconds: float,
    starts_at_log_two: bool,
    exactly: bool,
    examples: int,
    work: UsefulWork | None,
) -> MetricsLog:
    """The log of a run, which continues the metrics in its folder.

    Args:
        world: The ranks, of which rank 0 writes.
        followers: Options of the trackers.
        options: All options of the run, which trackers record.
        min_interval_seconds: Least time between two writes of training steps.
        starts_at_log_two: Whether the first loss is ln 2 if policy and reference are equal.
        exactly: Whether they are then bit-identical.
        examples: Examples seen before this start.
        work: Operations that a step needs, for MFU; None if unknown.
    """
    return MetricsLog(
        path=run_dir / METRICS,
        records=read_records(run_dir) if world.is_main else [],
        min_interval_seconds=min_interval_seconds,
        world=world,
        first_loss_tolerance=first_loss_tolerance(exact=exactly) if starts_at_log_two else None,
        work=work,
        trackers=build_trackers(followers, run_dir, options, examples) if world.is_main else [],
    )
