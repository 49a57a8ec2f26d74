"""The folder of a run: where it may lie, and how it is made."""

import datetime
import fcntl
import getpass
import logging
import os
import re
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO

from fastpref.checkpoint.folders import CHECKPOINTS, PARTIAL, step_folders
from fastpref.complete_files import LOCK, remove, writing
from fastpref.config import Config
from fastpref.distributed import World
from fastpref.errors import ConfigError
from fastpref.model.files.paths import EXPORT_FOLDER, MERGED_FOLDER

logger = logging.getLogger("fastpref")

OPTIONS = "config.yaml"
"""In every run folder: the options of its last start."""
AUDIT_PAGE = "audit.html"
"""What `task=audit` leaves: it may lie in the folder of a run that is to begin."""
PROBE = ".fastpref-"
"""How a file's name begins that is made to see whether one can be, where the file system knows none
without a name; it goes at once."""
TIME = r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d"
"""In the name of a run folder."""
ORIGIN = "branched-off-from"
"""In the folder of a run that began with another run's checkpoint: that checkpoint's path."""
LEFT_AT_THE_START = (
    *("metrics.jsonl", "samples.jsonl", "curves.png", "tensorboard", "wandb", "wandb-id"),
    *(CHECKPOINTS, EXPORT_FOLDER, f"{EXPORT_FOLDER}.partial", f"{EXPORT_FOLDER}.old"),
    *(MERGED_FOLDER, f"{MERGED_FOLDER}.partial", f"{MERGED_FOLDER}.old"),
    *(f"wandb-id{PARTIAL}", f"{ORIGIN}{PARTIAL}", f"{OPTIONS}{PARTIAL}", LOCK, OPTIONS),
)
"""What a run may have written before its first step, by name. The options come last, by which
a folder is known for a run's: a kill while the others are removed leaves it one."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlace:
    """Where a run's folder is, or will be."""

    run_dir: Path | None
    """The folder that the user named."""
    root: Path
    """Else: the folder that holds the run folders."""
    name: str
    """And the run's own name there, to which the time is added."""

    def check(self, *, may_go_on: bool = False) -> None:
        """Refuse, before anything is loaded, a place where no run folder can be made.

        Args:
            may_go_on: Whether the named folder may hold a run, which is gone on with.

        Raises:
            ConfigError: it is a file, is not writable, or the named run folder holds another run.
        """
        folder = self.run_dir
        if folder is None:
            check_writable("output_dir", self.root)
            check_writable("exp_name", self.root / self._timed_name())
            return
        check_writable("run_dir", folder)
        if not folder.is_dir() or not names_in(folder) or took_no_step(folder):
            return
        is_run = (folder / OPTIONS).is_file() or bool(step_folders(folder / CHECKPOINTS))
        if not (may_go_on and is_run):
            advice = " or set resume=auto to go on with the run in it" if is_run else ""
            raise ConfigError(f"run_dir: {folder} is not empty; name a new folder{advice}")

    def create(self, options: str) -> Path:
        """A new run folder with the options in it as `config.yaml`.

        Two starts in one second get two folders: making a folder is what claims its name.

        Raises:
            CheckpointError: the folder cannot be made.
        """
        with writing(self.run_dir or self.root):
            run_dir = self._claim()
            (run_dir / OPTIONS).write_text(options, encoding="utf-8")
        return run_dir

    def newest_with(self, name: str) -> Path | None:
        """Of this name's run folders that hold `name` the one that was made last, by their names:
        a folder's time changes with what is put into it."""
        named = self.root / self.name
        made = re.compile(rf"{re.escape(named.name)}_({TIME})(?:_(\d+))?")
        folders = named.parent.iterdir() if named.parent.is_dir() else ()
        found = [
            (match[1], int(match[2] or 1), folder)
            for folder in folders
            if (match := made.fullmatch(folder.name)) and os.path.lexists(folder / name)
        ]
        return max(found)[2] if found else None

    def references(self, cache_dir: str | None) -> Path:
        """Where log-probabilities of references are kept: the folder that was named, or one among
        those of runs."""
        return Path(cache_dir) if cache_dir else self.root / "reference-logps"

    def _claim(self) -> Path:
        """The folder, made or emptied, as this process's own."""
        if self.run_dir is None:
            return _make_new(self.root, self._timed_name())
        self.run_dir.mkdir(parents=True, exist_ok=True)
        lock(self.run_dir)
        # again: while models were loaded another start may have come, saved and gone
        self.check()
        if names_in(self.run_dir):
            logger.info("%s: what a start without a single step has left is replaced", self.run_dir)
            clear_start(self.run_dir)
        return self.run_dir

    def _timed_name(self) -> str:
        timestamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        return f"{self.name}_{timestamp}"


def run_place(config: Config) -> RunPlace:
    """Where the folder of a config's run is to be."""
    return RunPlace(
        run_dir=Path(config.run_dir) if config.run_dir else None,
        root=run_root(config.output_dir, config.local_dirs),
        name=config.exp_name or config.computed_exp_name(),
    )


def names_in(run_dir: Path) -> set[str]:
    """What a run has left in its folder, but for its lock."""
    names = {child.name for child in run_dir.iterdir()} - {AUDIT_PAGE, LOCK}
    return {name for name in names if not name.startswith(PROBE)}


def took_no_step(run_dir: Path) -> bool:
    """Whether a folder holds what a run leaves that ended before its first step, and no more."""
    names = names_in(run_dir)
    if OPTIONS not in names or not names <= set(LEFT_AT_THE_START):
        return False
    if step_folders(run_dir / CHECKPOINTS):
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
        ways = (folder, *folder.absolute().parents)
        existing = next(path for path in ways if path.exists() or path.is_symlink())
        for name in folder.absolute().relative_to(existing.absolute()).parts:
            # in a folder that is not there no name is too long
            (existing / name).exists()
    # a name that is too long, a parent that may not be read, a current folder that is gone
    except OSError as error:
        raise ConfigError(f"{key}: {folder}: {error.strerror}") from None
    if existing.is_symlink() and not existing.exists():
        where = f"a link to {existing.readlink()}, which is not there"
        raise ConfigError(f"{key}: {existing} is {where}")
    if not existing.is_dir():
        raise ConfigError(f"{key}: {existing} is a file, expected a folder")
    try:
        # permissions do not tell: the disk may be mounted read-only, or full, or belong to others
        tempfile.TemporaryFile(prefix=PROBE, dir=existing).close()
    except OSError as error:
        raise ConfigError(f"{key}: {existing} is not writable: {error.strerror}") from None


_locks: dict[Path, IO[str]] = {}
"""Open files of the run folders that this process has locked."""


@contextmanager
def keeping_locks() -> Iterator[None]:
    """Run folders that are locked while this is entered are let go of when it is left."""
    before = set(_locks)
    try:
        yield
    finally:
        for run_dir in _locks.keys() - before:
            _locks.pop(run_dir).close()


@contextmanager
def locked(run_dir: Path, world: World, *, key: str = "run_dir") -> Iterator[None]:
    """While entered, no other process can open the run folder, or what `key` names.

    Raises:
        ConfigError: another one writes there.
    """
    world.on_main(lambda: lock(run_dir, key=key))
    try:
        yield
    finally:
        file = _locks.pop(run_dir.resolve(), None)
        if file is not None:
            file.close()


def lock(run_dir: Path, *, key: str = "run_dir") -> None:
    """Keep other processes out of a run folder, before anything is changed there; the system lets
    go of it when this process ends, however it does.

    Raises:
        ConfigError: another one writes there.
    """
    if run_dir.resolve() in _locks:
        return
    with writing(run_dir):
        file = (run_dir / LOCK).open("a", encoding="utf-8")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        raise ConfigError(f"{key}: another process is writing to {run_dir}") from None
    except OSError as error:
        # a file system without locks
        logger.warning("%s cannot be locked: %s", run_dir, error.strerror)
    _locks[run_dir.resolve()] = file


def run_root(output_dir: str, local_dirs: Sequence[str] | None) -> Path:
    """The folder that holds the run folders: `output_dir`, or `<local dir>/<user>` as the DPO
    repository has it: the first of `local_dirs` that exists, else the last."""
    if not local_dirs:
        return Path(output_dir)
    existing = [name for name in local_dirs if Path(name).is_dir()]
    return Path((existing or local_dirs[-1:])[0]) / user_name()


def user_name() -> str:
    """Who runs this; the number where a container gives it no name."""
    try:
        return getpass.getuser()
    # KeyError until Python 3.12
    except (KeyError, OSError):
        return str(os.getuid())


def clear_start(run_dir: Path, *, keep_model: bool = False) -> None:
    """Remove what a run has left that is not gone on with; its numbers are not ours.

    Args:
        keep_model: Leave its model, and the options that are about to be replaced.
    """
    kept = (LOCK, OPTIONS, EXPORT_FOLDER, MERGED_FOLDER, CHECKPOINTS) if keep_model else (LOCK,)
    for name in LEFT_AT_THE_START:
        if name not in kept:
            remove(run_dir / name)


def _make_new(root: Path, name: str) -> Path:
    """A folder of that name, or of that name and a number, which no other start has made."""
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
