"""The folder of a run: where it may be, how it is created, and its lock."""

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
"""File in every run folder with the options of its last start."""
AUDIT_PAGE = "audit.html"
"""Output of `task=audit`, which a folder may hold before its run begins."""
PROBE = ".fastpref-"
"""Prefix of the temporary file that tests whether a folder is writable, on file systems without
unnamed temporary files; it is deleted at once."""
TIME = r"\d{4}-\d\d-\d\d_\d\d-\d\d-\d\d"
"""Pattern of the timestamp in a run folder's name."""
ORIGIN = "branched-off-from"
"""File in the folder of a run that began from another run's checkpoint: the checkpoint's path."""
LEFT_AT_THE_START = (
    *("metrics.jsonl", "samples.jsonl", "curves.png", "tensorboard", "wandb", "wandb-id"),
    *(CHECKPOINTS, EXPORT_FOLDER, f"{EXPORT_FOLDER}.partial", f"{EXPORT_FOLDER}.old"),
    *(MERGED_FOLDER, f"{MERGED_FOLDER}.partial", f"{MERGED_FOLDER}.old"),
    *(f"wandb-id{PARTIAL}", f"{ORIGIN}{PARTIAL}", f"{OPTIONS}{PARTIAL}", LOCK, OPTIONS),
)
"""Names of what a run may write before its first step, in the order of removal. The options come
last: they mark a run folder, which it stays if a kill interrupts the removal."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RunPlace:
    """Where a run's folder is, or will be created."""

    run_dir: Path | None
    """The folder named by the user; None: a new one in `root`."""
    root: Path
    """The folder that holds the run folders."""
    name: str
    """Name of the run, followed in the folder's name by a timestamp."""

    def check(self, *, may_go_on: bool = False) -> None:
        """Refuse, before anything is loaded, a place where no run folder can be created.

        Args:
            may_go_on: Whether the named folder may hold a run to resume.

        Raises:
            ConfigError: it is a file, is not writable, or the named folder holds another run.
        """
        folder = self.run_dir
        if folder is None:
            check_writable("output_dir", self.root)
            check_writable("exp_name", self.root / self._timed_name())
            self.check_name()
            return
        check_writable("run_dir", folder)
        if not folder.is_dir() or not names_in(folder) or took_no_step(folder):
            return
        is_run = (folder / OPTIONS).is_file() or bool(step_folders(folder / CHECKPOINTS))
        if not (may_go_on and is_run):
            advice = " or set resume=auto to go on with the run in it" if is_run else ""
            raise ConfigError(f"run_dir: {folder} is not empty; name a new folder{advice}")

    def check_name(self) -> None:
        """Refuse a `name` whose folder would be outside of `root`.

        Raises:
            ConfigError: the name is an absolute path, or leads out of `root`.
        """
        if os.path.isabs(self.name) or os.path.normpath(self.name).split(os.sep)[0] == "..":
            raise ConfigError(
                f"exp_name must stay in output_dir ({self.root}), got {self.name!r}; run_dir names "
                "a folder elsewhere"
            )

    def create(self, options: str) -> Path:
        """Create a run folder with `options` as its `config.yaml`.

        Two starts in the same second get two folders: creating a folder is what claims its name.

        Raises:
            CheckpointError: the folder cannot be created.
        """
        with writing(self.run_dir or self.root):
            run_dir = self._claim()
            (run_dir / OPTIONS).write_text(options, encoding="utf-8")
        return run_dir

    def newest_with(self, name: str) -> Path | None:
        """The newest of this run name's folders that contain a file or folder `name`. Timestamps in
        names decide: a folder's modification time changes with its contents."""
        found = [made for made in self._made() if os.path.lexists(made[2] / name)]
        return max(found)[2] if found else None

    def _made(self) -> list[tuple[str, int, Path]]:
        """Timestamp, number and path of each run folder of this run name."""
        named = self.root / self.name
        made = re.compile(rf"{re.escape(named.name)}_({TIME})(?:_(\d+))?")
        folders = named.parent.iterdir() if named.parent.is_dir() else ()
        found = ((made.fullmatch(folder.name), folder) for folder in folders)
        return [(match[1], int(match[2] or 1), folder) for match, folder in found if match]

    def references(self, cache_dir: str | None) -> Path:
        """Folder of cached reference log-probabilities: `cache_dir`, by default one beside the run
        folders."""
        return Path(cache_dir) if cache_dir else self.root / "reference-logps"

    def _claim(self) -> Path:
        """Create the folder, or lock and empty the one that was named."""
        if self.run_dir is None:
            return _make_new(self.root, self._timed_name())
        self.run_dir.mkdir(parents=True, exist_ok=True)
        lock(self.run_dir)
        # checked again: another start may have used the folder while models were loaded
        self.check()
        if names_in(self.run_dir):
            logger.info("%s: what a start without a single step has left is replaced", self.run_dir)
            clear_start(self.run_dir)
        return self.run_dir

    def _timed_name(self) -> str:
        now = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        # at least the newest timestamp: names keep the order of runs if the clock was set back
        return f"{self.name}_{max([now, *(time for time, _, _ in self._made())])}"


def run_place(config: Config) -> RunPlace:
    """Where a config puts its run folder."""
    return RunPlace(
        run_dir=Path(config.run_dir) if config.run_dir else None,
        root=run_root(config.output_dir, config.local_dirs),
        name=config.exp_name or config.computed_exp_name(),
    )


def names_in(run_dir: Path) -> set[str]:
    """Names of what a run has written to its folder, without lock, probes and the audit page."""
    names = {child.name for child in run_dir.iterdir()} - {AUDIT_PAGE, LOCK}
    return {name for name in names if not name.startswith(PROBE)}


def took_no_step(run_dir: Path) -> bool:
    """Whether a folder holds only what a run writes that ends before its first step."""
    names = names_in(run_dir)
    if OPTIONS not in names or not names <= set(LEFT_AT_THE_START):
        return False
    if step_folders(run_dir / CHECKPOINTS):
        return False
    if "metrics.jsonl" not in names:
        # a model without metrics may be one that the user kept
        return EXPORT_FOLDER not in names
    with (run_dir / "metrics.jsonl").open(encoding="utf-8", errors="replace") as lines:
        return not any('"split": "train"' in line for line in lines)


def check_writable(key: str, folder: Path) -> None:
    """Refuse a folder that cannot be created or written to.

    Raises:
        ConfigError: naming the option `key`, and the offending path.
    """
    try:
        ways = (folder, *folder.absolute().parents)
        existing = next(path for path in ways if path.exists() or path.is_symlink())
        for name in folder.absolute().relative_to(existing.absolute()).parts:
            # tested in an existing folder: in a missing one no name counts as too long
            (existing / name).exists()
    # a name that is too long, an unreadable parent, a current directory that was deleted
    except OSError as error:
        raise ConfigError(f"{key}: {folder}: {error.strerror}") from None
    if existing.is_symlink() and not existing.exists():
        where = f"a link to {existing.readlink()}, which is not there"
        raise ConfigError(f"{key}: {existing} is {where}")
    if not existing.is_dir():
        raise ConfigError(f"{key}: {existing} is a file, expected a folder")
    try:
        # permissions are not enough: the disk may be read-only, full or restricted otherwise
        tempfile.TemporaryFile(prefix=PROBE, dir=existing).close()
    except OSError as error:
        raise ConfigError(f"{key}: {existing} is not writable: {error.strerror}") from None


def check_cache(folder: Path) -> None:
    """Refuse a cache folder of reference log-probabilities that is neither writable nor filled.

    Raises:
        ConfigError: see `check_writable`.
    """
    try:
        check_writable("reference.cache_dir", folder)
    except ConfigError:
        # a shared, read-only cache may hold every row; only the loaded data and model tell
        if not any(folder.glob("*/*.npz")):
            raise


_locks: dict[Path, IO[str]] = {}
"""Open lock files of the run folders that this process has locked, by folder."""


@contextmanager
def keeping_locks() -> Iterator[None]:
    """Unlock on exit the run folders that were locked in this block."""
    before = set(_locks)
    try:
        yield
    finally:
        for run_dir in _locks.keys() - before:
            _locks.pop(run_dir).close()


@contextmanager
def locked(run_dir: Path, world: World, *, key: str = "run_dir") -> Iterator[None]:
    """While entered, no other process can lock the folder.

    Args:
        key: The option that names the folder, for the message.

    Raises:
        ConfigError: another process writes there.
    """
    world.on_main(lambda: lock(run_dir, key=key))
    try:
        yield
    finally:
        file = _locks.pop(run_dir.resolve(), None)
        if file is not None:
            file.close()


def lock(run_dir: Path, *, key: str = "run_dir") -> None:
    """Lock a run folder against other processes before anything in it is changed; the system
    releases the lock when this process ends, for whatever reason.

    Raises:
        ConfigError: another process writes there.
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
    """The folder that holds the run folders: `output_dir`, or as in the DPO repository
    `<local dir>/<user>` in the first of `local_dirs` that exists, else in the last."""
    if not local_dirs:
        return Path(output_dir)
    existing = [name for name in local_dirs if Path(name).is_dir()]
    return Path((existing or local_dirs[-1:])[0]) / user_name()


def user_name() -> str:
    """Name of the user; the user id in a container that has no name for it."""
    try:
        return getpass.getuser()
    # KeyError until Python 3.12
    except (KeyError, OSError):
        return str(os.getuid())


def clear_start(run_dir: Path, *, keep_model: bool = False) -> None:
    """Remove the output of a run that is not resumed, so that its metrics are not mixed with ours.

    Args:
        keep_model: Keep its model and checkpoints, and the options that are about to be replaced.
    """
    kept = (LOCK, OPTIONS, EXPORT_FOLDER, MERGED_FOLDER, CHECKPOINTS) if keep_model else (LOCK,)
    for name in LEFT_AT_THE_START:
        if name not in kept:
            remove(run_dir / name)


def _make_new(root: Path, name: str) -> Path:
    """Create a new folder of that name, with a number added if it is taken."""
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
