"""The checkpoints of a run beside one another: which is the newest whole one, which may go."""

import logging
import math
import re
import shutil
from dataclasses import dataclass
from pathlib import Path

from fastpref.checkpoint.manifest import MANIFEST, Checkpoint, check_files, read_manifest
from fastpref.complete_files import sync
from fastpref.errors import CheckpointError

logger = logging.getLogger("fastpref")

CHECKPOINTS = "checkpoints"
"""Folder of a run that holds them."""
LATEST = "latest"
"""File that holds the newest one's name, for whoever looks; finding does not rely on it."""
MARK = ".has-checkpoints"
"""In the folder of a run that has saved one: where none is left, they were lost."""
SIGN = ".seen-by-all-"
"""How a file's name begins by which ranks find out that they see one disk."""
PARTIAL, DELETED, ABANDONED = ".partial", ".deleted", ".abandoned"
"""Suffixes of folders that are not checkpoints: being written, being deleted, set aside."""

_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True)
class Best:
    """Which checkpoint is the best one."""

    metric: str
    """Name among the metrics given with each save."""
    higher_is_better: bool

    def value(self, checkpoint: Checkpoint) -> float:
        """What to maximize; minus infinity where the metric was not measured or is not finite."""
        value = checkpoint.manifest.metrics.get(self.metric, math.nan)
        if not math.isfinite(value):
            return -math.inf
        return value if self.higher_is_better else -value


def folder_name(step: int) -> str:
    """Of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step that a path's name says; None if it is not named like a checkpoint."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def step_folders(folder: Path) -> list[Path]:
    """What is named like a checkpoint in `checkpoints/`, newest first; whole or not."""
    if not folder.is_dir():
        return []
    steps = {path: step for path in folder.iterdir() if (step := step_of(path)) is not None}
    return [path for path in sorted(steps, key=steps.__getitem__, reverse=True) if path.is_dir()]


def open_checkpoint(folder: Path, *, digests: bool = True) -> Checkpoint:
    """A checkpoint whose manifest holds.

    Args:
        folder: The checkpoint's own.
        digests: Also read every byte; without it, sizes are compared.

    Raises:
        CheckpointError: which file is missing, cut short or altered.
    """
    manifest = read_manifest(folder)
    if step_of(folder) not in (None, manifest.step):
        raise CheckpointError(f"its manifest is that of step {manifest.step}")
    check_files(folder, manifest, digests=digests)
    return Checkpoint(folder, manifest)


def find_newest(folder: Path) -> Checkpoint | None:
    """The newest whole checkpoint in `checkpoints/`; a broken one is passed over with a warning.

    Args:
        folder: `<run_dir>/checkpoints`; need not exist.

    Returns:
        None if there is nothing that is named like a checkpoint.

    Raises:
        CheckpointError: there are some, and none is whole.
    """
    problems = []
    for candidate in step_folders(folder):
        try:
            return open_checkpoint(candidate)
        except CheckpointError as error:
            problems.append(f"{candidate.name}: {error}")
            logger.warning("%s is passed over: %s", candidate, error)
    if problems:
        raise CheckpointError(f"no whole checkpoint in {folder}: {'; '.join(problems)}")
    return None


def find_named(path: Path) -> Checkpoint:
    """The checkpoint that a user means by a path.

    Args:
        path: One checkpoint, a run folder, its `checkpoints/` or the `latest` in there; the newest
            whole one counts, but a checkpoint that is named itself has no substitute.

    Raises:
        CheckpointError: there is none, or none is whole; the message says what was looked at.
    """
    if path.name == LATEST and path.is_file():
        path = path.parent
    if not path.is_dir():
        what = "a file" if path.exists() else "not there"
        raise CheckpointError(f"resume: {path} is {what}, expected a run folder or a checkpoint")
    if (path / MANIFEST).exists() or path.name.startswith("step-"):
        try:
            return open_checkpoint(path)
        except CheckpointError as error:
            raise CheckpointError(f"resume: {path} is no whole checkpoint: {error}") from error
    folder = path / CHECKPOINTS if (path / CHECKPOINTS).is_dir() else path
    checkpoint = find_newest(folder)
    if checkpoint is None:
        raise CheckpointError(f"resume: no checkpoint in {path}; looked for {folder}/step-*")
    return checkpoint


def retain(
    folder: Path, *, keep: int, best: Best | None = None, protected: Path | None = None
) -> list[Path]:
    """Delete all but the newest checkpoints and the best one.

    Folders that are not whole are left alone: they do not count, and what happened to them may
    matter to whoever finds them.

    Args:
        folder: `<run_dir>/checkpoints`.
        keep: How many of the newest stay, > 0.
        best: What makes one the best; of equals the earliest stays. None: nothing does.
        protected: One that stays in any case, the one a run was resumed from.

    Returns:
        What was deleted.
    """
    assert keep > 0, keep
    whole = []
    for candidate in step_folders(folder):
        try:
            whole.append(open_checkpoint(candidate, digests=False))
        except CheckpointError:
            continue
    kept = {checkpoint.folder for checkpoint in whole[:keep]}
    if best is not None and whole:
        winner = max(whole, key=lambda checkpoint: (best.value(checkpoint), -checkpoint.step))
        if best.value(winner) > -math.inf:
            kept.add(winner.folder)
    doomed = [
        checkpoint.folder
        for checkpoint in whole
        if checkpoint.folder not in kept
        and not (protected and protected.exists() and checkpoint.folder.samefile(protected))
    ]
    for path in doomed:
        delete(path)
    return doomed


def delete(path: Path) -> None:
    """Delete a checkpoint; killed on the way, nothing of it looks like a checkpoint."""
    doomed = path.with_name(path.name + DELETED)
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    sync(path.parent)
    shutil.rmtree(doomed)


def clear_leftovers(folder: Path) -> None:
    """Remove what a killed process was writing or deleting."""
    for path in folder.iterdir():
        if path.name.startswith("step-") and path.suffix in (PARTIAL, DELETED):
            shutil.rmtree(path)
    for path in (folder / f"{LATEST}{PARTIAL}", *folder.glob(f"{SIGN}*")):
        path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint that is not part of this run's history, so that none finds it.

    Returns:
        Its new place, beside the old one.
    """
    attempt = 1
    while True:
        target = path.with_name(path.name + ABANDONED + (f"-{attempt}" if attempt > 1 else ""))
        if not target.exists():
            path.rename(target)
            sync(path.parent)
            return target
        attempt += 1
