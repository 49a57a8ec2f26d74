"""The checkpoint folders of a run: find the newest complete one, delete those not to be kept."""

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
"""Name of the folder in a run folder that holds its checkpoints."""
LATEST = "latest"
"""File with the name of the newest checkpoint, for people; `find_newest` does not rely on it."""
MARK = ".has-checkpoints"
"""File in the folder of a run that has saved checkpoints: if none is left, they were lost."""
SIGN = ".seen-by-all-"
"""Prefix of the file by which ranks check that they share one disk."""
PARTIAL, DELETED, ABANDONED = ".partial", ".deleted", ".abandoned"
"""Suffixes of folders that are not checkpoints: being written, being deleted, set aside."""

_NAME = re.compile(r"step-(\d{8,})")


@dataclass(frozen=True, slots=True)
class Best:
    """The metric by which the best checkpoint is chosen."""

    metric: str
    """Name of one of the metrics given with each save."""
    higher_is_better: bool
    since: int = 0
    """The first step that counts: before it the metric was measured on other rows."""

    def value(self, checkpoint: Checkpoint) -> float:
        """The score to maximize; minus infinity if the metric is missing, not finite, or of other
        rows."""
        value = checkpoint.manifest.metrics.get(self.metric, math.nan)
        if checkpoint.step < self.since or not math.isfinite(value):
            return -math.inf
        return value if self.higher_is_better else -value


def folder_name(step: int) -> str:
    """Name of the checkpoint after `step` optimizer steps."""
    return f"step-{step:08d}"


def step_of(path: Path) -> int | None:
    """The step in a checkpoint folder's name; None if the path is not named like one."""
    match = _NAME.fullmatch(path.name)
    return int(match[1]) if match else None


def step_folders(folder: Path) -> list[Path]:
    """The folders in `checkpoints/` that are named like checkpoints, newest first; complete or
    not."""
    if not folder.is_dir():
        return []
    steps = {path: step for path in folder.iterdir() if (step := step_of(path)) is not None}
    return [path for path in sorted(steps, key=steps.__getitem__, reverse=True) if path.is_dir()]


def open_checkpoint(folder: Path, *, digests: bool = True) -> Checkpoint:
    """Open a checkpoint and verify its files against its manifest.

    Args:
        folder: The checkpoint's own folder.
        digests: Also read every byte and compare digests; False: compare sizes only.

    Raises:
        CheckpointError: naming the file that is missing, truncated or altered.
    """
    manifest = read_manifest(folder)
    if step_of(folder) not in (None, manifest.step):
        raise CheckpointError(f"its manifest is that of step {manifest.step}")
    check_files(folder, manifest, digests=digests)
    return Checkpoint(folder, manifest)


def find_newest(folder: Path) -> Checkpoint | None:
    """The newest complete checkpoint in `checkpoints/`; broken ones are skipped with a warning.

    Args:
        folder: `<run_dir>/checkpoints`; need not exist.

    Returns:
        None if no folder in it is named like a checkpoint.

    Raises:
        CheckpointError: there are such folders, but none is complete.
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
    """The checkpoint that a path given by the user refers to.

    Args:
        path: A checkpoint, which must be complete itself; or a run folder, its `checkpoints/` or
            the file `latest` in it, for the newest complete checkpoint there.

    Raises:
        CheckpointError: there is none, or none is complete; the message says where it looked.
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
    """Delete all checkpoints but the newest ones and the best one.

    Incomplete folders do not count and are left alone, so that their damage can be looked into.

    Args:
        folder: `<run_dir>/checkpoints`.
        keep: Number of newest checkpoints to keep, > 0.
        best: How the best one is chosen; the earliest wins a tie. None: keep no best one.
        protected: A checkpoint that is never deleted: the one this run was resumed from.

    Returns:
        The deleted folders.
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
    """Delete a checkpoint after renaming it, so that if the process is killed the remains are not
    named like a checkpoint."""
    doomed = path.with_name(path.name + DELETED)
    shutil.rmtree(doomed, ignore_errors=True)
    path.rename(doomed)
    sync(path.parent)
    shutil.rmtree(doomed)


def clear_leftovers(folder: Path) -> None:
    """Remove the folders and files that a killed process was writing or deleting."""
    for path in folder.iterdir():
        if path.name.startswith("step-") and path.suffix in (PARTIAL, DELETED):
            shutil.rmtree(path)
    for path in (folder / f"{LATEST}{PARTIAL}", *folder.glob(f"{SIGN}*")):
        path.unlink(missing_ok=True)


def set_aside(path: Path) -> Path:
    """Rename a checkpoint that is not part of this run's history, so that it is never found.

    Returns:
        Its new path, in the same folder.
    """
    attempt = 1
    while True:
        target = path.with_name(path.name + ABANDONED + (f"-{attempt}" if attempt > 1 else ""))
        if not target.exists():
            path.rename(target)
            sync(path.parent)
            return target
        attempt += 1
