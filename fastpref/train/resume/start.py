"""What a run starts from: its initial model, or a checkpoint that it may resume from.

run_dir holds                   resume=never  auto                   PATH
nothing, or a run of no step    new run       new run                branches off from PATH
a run with checkpoints          refused       resumes                resumes if PATH belongs to it,
                                                                     or it branched off from PATH
a run without a checkpoint      refused       restarts, if options   refused
                                              are the same or allowed
anything else                   refused       refused                refused
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import torch

from fastpref.checkpoint.agreement import Agreement
from fastpref.checkpoint.folders import CHECKPOINTS, MARK, find_named, find_newest, step_folders
from fastpref.checkpoint.load import load_checkpoint, read_record
from fastpref.checkpoint.manifest import Checkpoint
from fastpref.errors import CheckpointError
from fastpref.model.scorer import TokenScorer
from fastpref.train.resume.comparison import check_record, check_same_run
from fastpref.train.resume.differences import list_differences, may_change_memory
from fastpref.train.resume.origin import is_branch_of, origin_of, run_of, run_to_go_on_with
from fastpref.train.run_folder import RunPlace, lock, names_in, took_no_step
from fastpref.train.state import RunState
from fastpref.train.updates import Updates

logger = logging.getLogger("fastpref")


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a run starts from."""

    agreement: Agreement
    """Connects the ranks."""
    place: RunPlace
    """Where a new run folder is created."""
    run_dir: Path | None = None
    """The existing run folder to continue in, locked; None: a new one."""
    checkpoint: Checkpoint | None = None
    """The checkpoint to resume from; None: the initial model."""
    source: Path | None = None
    """The run folder that the checkpoint belongs to: `run_dir`, or the one that the run branches
    off from; None: the checkpoint is in no run folder."""
    record: dict[str, Any] = field(default_factory=dict)
    """The checkpoint's record: state, options and fingerprints of the run when it was saved."""

    @property
    def state(self) -> RunState:
        """The state to resume from; a fresh one without a checkpoint."""
        return RunState.from_json(self.record["state"]) if self.record else RunState()

    @property
    def unwritten(self) -> list[str]:
        """Lines of metrics that could not be written to their file when the run was saved."""
        return self.record.get("unwritten", [])

    def tokens_found(self, place: str, options: dict[str, Any]) -> int | None:
        """Tokens to compute at once, if the run that is resumed found this number on the same
        devices and with the same options, as far as they change a step's memory; else None.

        Args:
            place: See `place_of`.
            options: All options of this start.
        """
        differences = list_differences(self.record["options"], options) if self.record else []
        changed = any(may_change_memory(difference) for difference in differences)
        return None if changed else self.state.tokens_found(place)

    def check_length(self, num_steps: int) -> None:
        """Refuse a checkpoint of a step beyond the end of this run.

        Raises:
            CheckpointError: its step is larger than `num_steps`.
        """
        if self.checkpoint is not None and self.state.step > num_steps:
            raise CheckpointError(
                f"{self.checkpoint.folder} is of step {self.state.step}, the run has {num_steps} "
                "steps"
            )

    def check(
        self,
        options: dict[str, Any],
        fingerprints: dict[str, str],
        *,
        allow: Sequence[str],
        quiet: bool = False,
    ) -> None:
        """Refuse a checkpoint of another run, see `check_same_run`.

        Raises:
            CheckpointError: the checkpoint, if there is one, is of another run.
        """
        if self.checkpoint is not None:
            folder = self.checkpoint.folder
            check_same_run(folder, self.record, options, fingerprints, allow=allow, quiet=quiet)

    def load(self, policy: TokenScorer, updates: Updates, device: torch.device) -> RunState:
        """Load the checkpoint, if there is one, and return the run's state.

        Raises:
            CheckpointError: it does not fit the policy or the optimizer.
        """
        state = self.state
        if self.checkpoint is None:
            return state
        load_checkpoint(
            self.checkpoint,
            policy,
            updates.optimizer,
            updates.scheduler,
            agreement=self.agreement,
            device=device,
        )
        policy.refresh()
        updates.guard.load_state(state.guard)
        logger.info("going on after step %d: %s", state.step, self.checkpoint.folder)
        return state


def find_start(resume: str, place: RunPlace, agreement: Agreement) -> Start:
    """Find what `resume` asks for, on rank 0 for all ranks.

    Args:
        resume: "never", "auto" or a path, see `ResumeConfig.path`.
        place: Where the run's folder is to be.
        agreement: Connects the ranks.

    Raises:
        CheckpointError: on every rank: the checkpoint asked for is missing, none is complete, or it
            cannot be read by this version.
    """
    if resume == "never":
        return Start(agreement=agreement, place=place)
    found = agreement.on_main(lambda: _find(resume, place))
    if found.checkpoint is None:
        looked_in = found.run_dir or place.run_dir or place.root
        logger.info("resume=auto: no checkpoint in %s, a new start", looked_in)
        return Start(agreement=agreement, place=place, run_dir=found.run_dir)
    record = read_record(found.checkpoint, agreement)
    check_record(found.checkpoint.folder, record)
    return Start(agreement=agreement, place=place, record=record, **found._asdict())


class Found(NamedTuple):
    """What was found to resume from, see `Start`."""

    run_dir: Path | None = None
    checkpoint: Checkpoint | None = None
    source: Path | None = None


def _find(resume: str, place: RunPlace) -> Found:
    """Find a run folder and its checkpoint. The folder is locked before it is searched: a process
    that writes there might save a newer checkpoint, or delete the one that was found."""
    if resume == "auto":
        run_dir = run_to_go_on_with(resume, place)
        return _find_in(run_dir) if run_dir and run_dir.is_dir() else Found()
    path = Path(resume)
    source, run_dir = run_of(path), place.run_dir
    if run_dir and run_dir.is_dir() and is_branch_of(run_dir, path):
        return _find_in(run_dir)
    if source and (run_dir is None or (run_dir.is_dir() and run_dir.samefile(source))):
        lock(source)
        return Found(source, find_named(path), source)
    # refused now rather than after models were loaded
    place.check()
    return Found(None, find_named(path), source)


def _find_in(run_dir: Path) -> Found:
    """The newest checkpoint in a run folder, else the one that the run branched off from."""
    lock(run_dir)
    check_not_lost(run_dir)
    checkpoint = find_newest(run_dir / CHECKPOINTS)
    if checkpoint is not None:
        return Found(run_dir, checkpoint, run_dir)
    origin = origin_of(run_dir)
    return Found(run_dir, find_named(origin), run_of(origin)) if origin else Found(run_dir)


def check_not_lost(run_dir: Path) -> None:
    """Refuse a run folder whose checkpoints were lost, which must not be mistaken for a run that
    never had one and restarted.

    Raises:
        CheckpointError: they were deleted, or are on a disk that is not mounted.
    """
    folder = run_dir / CHECKPOINTS
    is_there = folder.is_dir()
    # a run that ended before its first checkpoint has an empty folder and no mark
    if step_folders(folder) or (is_there and not (run_dir / MARK).is_file()):
        return
    if not names_in(run_dir) or took_no_step(run_dir):
        return
    where = "empty" if is_there else "gone"
    if folder.is_symlink() and not is_there:
        where = f"a link to {folder.readlink()}, which is not there"
    raise CheckpointError(
        f"resume: {folder} is {where}, and {run_dir} holds the numbers of a run that had it: "
        "bring it back, or name a new run_dir"
    )
