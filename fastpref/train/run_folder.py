"""The folder of a run: where it may lie, and how it is made."""

import datetime
import getpass
import logging
import os
import shutil
import tempfile
from pathlib import Path

from fastpref.complete_files import writing
from fastpref.config import Config, computed_exp_name, config_to_yaml
from fastpref.distributed import World
from fastpref.errors import ConfigError
from fastpref.model.paths import EXPORT_FOLDER

logger = logging.getLogger("fastpref")


def check_run_root(config: Config) -> None:
    """Refuse, before anything is loaded, a place where no run folder can be made.

    Raises:
        ConfigError: it is a file, is not writable, or the named run folder holds another run.
    """
    if not config.run_dir:
        check_writable("output_dir", run_root(config))
        check_writable("exp_name", run_root(config) / run_name(config))
        return
    folder = Path(config.run_dir)
    check_writable("run_dir", folder)
    if folder.is_dir() and any(folder.iterdir()) and not took_no_step(folder):
        raise ConfigError(f"run_dir: {folder} is not empty; name a new folder")


LEFT_AT_THE_START = (
    *("config.yaml", "metrics.jsonl", "samples.jsonl", "curves.png", "tensorboard", "wandb"),
    *(EXPORT_FOLDER, f"{EXPORT_FOLDER}.partial"),
)
"""What a run may have written before its first step, by name."""


def took_no_step(run_dir: Path) -> bool:
    """Whether a folder holds what a run leaves that ended before its first step, and no more."""
    names = {child.name for child in run_dir.iterdir()}
    if "config.yaml" not in names or not names <= set(LEFT_AT_THE_START):
        return False
    if "metrics.jsonl" not in names:
        # a model without numbers may be one that somebody kept
        return EXPORT_FOLDER not in names
    with (run_dir / "metrics.jsonl").open(encoding="utf-8", errors="replace") as lines:
        return not any('"split": "train"' in line for line in lines)


def check_writable(key: str, folder: Path) -> None:
    """Refuse a folder that cannot be made or written to.

    Raises:
        ConfigError: naming the option, and the path that stands in the way.
    """
    try:
        existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    # a name that is too long, a parent that may not be read, a current folder that is gone
    except OSError as error:
        raise ConfigError(f"{key}: {folder}: {error.strerror}") from None
    if not existing.is_dir():
        raise ConfigError(f"{key}: {existing} is a file, expected a folder")
    try:
        # permissions do not tell: the disk may be mounted read-only, or full, or belong to others
        os.rmdir(tempfile.mkdtemp(prefix=".fastpref-", dir=existing))
    except OSError as error:
        raise ConfigError(f"{key}: {existing} is not writable: {error.strerror}") from None


def run_root(config: Config) -> Path:
    """The folder that holds the run folders: `output_dir`, or `<local dir>/<user>` as the DPO
    repository has it: the first of `local_dirs` that exists, else the last."""
    if not config.local_dirs:
        return Path(config.output_dir)
    existing = [name for name in config.local_dirs if Path(name).is_dir()]
    return Path((existing or config.local_dirs[-1:])[0]) / user_name()


def user_name() -> str:
    """Who runs this; the number where a container gives it no name."""
    try:
        return getpass.getuser()
    # KeyError until Python 3.12
    except (KeyError, OSError):
        return str(os.getuid())


def run_name(config: Config) -> str:
    """The name of a run folder that the user did not name, made of the time of asking."""
    timestamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
    return f"{config.exp_name or computed_exp_name(config)}_{timestamp}"


def create_run_dir(config: Config, world: World) -> Path:
    """A new run folder with the config in it, on every rank the same one.

    Two starts in one second get two folders: making a folder is what claims its name.
    """
    return world.on_main(lambda: make_run_dir(config))


def make_run_dir(config: Config) -> Path:
    """`create_run_dir` on the rank that writes.

    Raises:
        CheckpointError: the folder cannot be made.
    """
    with writing(Path(config.run_dir) if config.run_dir else run_root(config)):
        if config.run_dir:
            run_dir = Path(config.run_dir)
            run_dir.mkdir(parents=True, exist_ok=True)
            if any(run_dir.iterdir()):
                clear_start(run_dir)
        else:
            run_dir = _claim(run_root(config), run_name(config))
        (run_dir / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    return run_dir


def clear_start(run_dir: Path) -> None:
    """Remove what a run that ended before its first step has left; its numbers are not ours."""
    logger.info("%s: what a start without a single step has left there is replaced", run_dir)
    for name in LEFT_AT_THE_START:
        path = run_dir / name
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink(missing_ok=True)


def _claim(root: Path, name: str) -> Path:
    attempt = 1
    while True:
        run_dir = root / (name if attempt == 1 else f"{name}_{attempt}")
        # exp_name may hold folders of its own
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        try:
            run_dir.mkdir()
            return run_dir
        except FileExistsError:
            attempt += 1
