"""The run that a checkpoint belongs to, and the checkpoint that a run branched off from."""

import os
from pathlib import Path

from fastpref.checkpoint.folders import CHECKPOINTS, LATEST
from fastpref.complete_files import complete_file, writing
from fastpref.train.run_folder import OPTIONS, ORIGIN, RunPlace


def run_of(path: Path) -> Path | None:
    """The run folder that a path, or the checkpoint at a path, belongs to; None if there is none.

    `checkpoints` may be a link to another disk, so the path as given is tried before the resolved
    one.
    """
    for way in (path.absolute(), path.resolve()):
        runs = [way, *(folder.parent for folder in (way, way.parent) if folder.name == CHECKPOINTS)]
        found = next((run for run in runs if (run / OPTIONS).is_file()), None)
        if found is not None:
            return found
    return None


def run_to_go_on_with(resume: str, place: RunPlace) -> Path | None:
    """The run folder that `resume` refers to, which need not exist; None if there is none, or if a
    named checkpoint is in no run folder."""
    if resume == "auto":
        return place.run_dir or place.newest_with(CHECKPOINTS)
    return None if resume == "never" else run_of(Path(resume))


def keep_origin(run_dir: Path, checkpoint: Path) -> None:
    """Record in a new run folder the checkpoint that it branches off from: the run resumes from it
    until it has a checkpoint of its own.

    Raises:
        CheckpointError: it cannot be written.
    """
    with writing(run_dir):
        # a run with metrics but without this folder counts as one that has lost its checkpoints
        (run_dir / CHECKPOINTS).mkdir(exist_ok=True)
    with complete_file(run_dir / ORIGIN, "wb") as file:
        file.write(os.fsencode(checkpoint.resolve()) + b"\n")


def origin_of(run_dir: Path) -> Path | None:
    """The checkpoint that a run branched off from, which may be gone; None if it did not."""
    path = run_dir / ORIGIN
    return Path(os.fsdecode(path.read_bytes().strip())) if path.is_file() else None


def is_branch_of(run_dir: Path, path: Path) -> bool:
    """Whether a run branched off from the checkpoint at a path, or from one below that path."""
    origin = origin_of(run_dir)
    below = path.parent if path.name == LATEST else path
    return origin is not None and origin.is_relative_to(below.resolve())
