"""Which run a checkpoint is of, and which checkpoint a run branched off from."""

import os
from pathlib import Path

from fastpref.checkpoint.folders import CHECKPOINTS, LATEST
from fastpref.complete_files import complete_file, writing
from fastpref.train.run_folder import OPTIONS, ORIGIN, RunPlace


def run_of(path: Path) -> Path | None:
    """The run folder that a path names, or names a checkpoint of; None: it is in none.

    Checkpoints may be links to another disk, so the path as it was given comes first.
    """
    for way in (path.absolute(), path.resolve()):
        runs = [way, *(folder.parent for folder in (way, way.parent) if folder.name == CHECKPOINTS)]
        found = next((run for run in runs if (run / OPTIONS).is_file()), None)
        if found is not None:
            return found
    return None


def run_to_go_on_with(resume: str, place: RunPlace) -> Path | None:
    """The run folder that `resume` means, which need not be there; None: there is none, or a
    checkpoint lies in none."""
    if resume == "auto":
        return place.run_dir or place.newest_with(CHECKPOINTS)
    return None if resume == "never" else run_of(Path(resume))


def keep_origin(run_dir: Path, checkpoint: Path) -> None:
    """Write into a new run folder which checkpoint it begins with: until it has one of its own that
    is what it goes on from.

    Raises:
        CheckpointError: it cannot be written.
    """
    with writing(run_dir):
        # a run with numbers and without a folder of checkpoints is one that has lost them
        (run_dir / CHECKPOINTS).mkdir(exist_ok=True)
    with complete_file(run_dir / ORIGIN, "wb") as file:
        file.write(os.fsencode(checkpoint.resolve()) + b"\n")


def origin_of(run_dir: Path) -> Path | None:
    """The checkpoint that a run branched off from, if it did; it may be gone."""
    path = run_dir / ORIGIN
    return Path(os.fsdecode(path.read_bytes().strip())) if path.is_file() else None


def is_branch_of(run_dir: Path, path: Path) -> bool:
    """Whether a run branched off from the checkpoint that a path names, or one below it."""
    origin = origin_of(run_dir)
    below = path.parent if path.name == LATEST else path
    return origin is not None and origin.is_relative_to(below.resolve())
