"""What a run starts from: nothing, or a checkpoint that it may go on with."""

import logging
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from fastpref.checkpoint.agreement import Agreement
from fastpref.checkpoint.folders import CHECKPOINTS, find_named, find_newest
from fastpref.checkpoint.load import load_checkpoint, read_record
from fastpref.checkpoint.manifest import Checkpoint
from fastpref.errors import CheckpointError
from fastpref.model.scorer import TokenScorer
from fastpref.train.comparison import check_same_run
from fastpref.train.run_folder import OPTIONS, RunPlace
from fastpref.train.state import RunState
from fastpref.train.updates import Updates

logger = logging.getLogger("fastpref")


@dataclass(frozen=True, slots=True, kw_only=True)
class Start:
    """What a run starts from."""

    agreement: Agreement
    """Of the ranks."""
    place: RunPlace
    """Where a new run folder is made."""
    run_dir: Path | None = None
    """The run folder to go on in; None: a new one."""
    checkpoint: Checkpoint | None = None
    record: dict[str, Any] = field(default_factory=dict)
    """What the run said of itself when it was saved: state, options, fingerprints."""

    @property
    def state(self) -> RunState:
        """Where the run is gone on with."""
        return RunState.from_json(self.record["state"]) if self.record else RunState()

    def check(
        self, options: dict[str, Any], fingerprints: dict[str, str], *, allow: Sequence[str]
    ) -> None:
        """Refuse a checkpoint of another run, see `check_same_run`.

        Raises:
            CheckpointError: there is one, and it is.
        """
        if self.checkpoint is not None:
            folder = self.checkpoint.folder
            check_same_run(folder, self.record, options, fingerprints, allow=allow)

    def load(
        self, policy: TokenScorer, updates: Updates, device: torch.device, *, num_steps: int
    ) -> RunState:
        """Put the checkpoint's state in place, if there is one.

        Raises:
            CheckpointError: it does not fit, or the run has fewer steps.
        """
        state = self.state
        if self.checkpoint is None:
            return state
        if state.step > num_steps:
            raise CheckpointError(
                f"{self.checkpoint.folder} is of step {state.step}, the run has {num_steps} steps"
            )
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
    """What `resume` asks to go on with, found by rank 0 for all.

    Args:
        resume: "never", "auto" or a path, see `ResumeConfig.path`.
        place: Where the run's folder is to be.
        agreement: Of the ranks.

    Raises:
        CheckpointError: on every rank: what was asked for is not there, or nothing is whole.
    """
    if resume == "never":
        return Start(agreement=agreement, place=place)
    run_dir, checkpoint = agreement.on_main(lambda: _find(resume, place))
    if checkpoint is None:
        looked_in = run_dir or place.run_dir or place.root
        logger.info("resume=auto: no checkpoint in %s, a new start", looked_in)
        return Start(agreement=agreement, place=place, run_dir=run_dir)
    record = read_record(checkpoint, agreement)
    return Start(
        agreement=agreement, place=place, run_dir=run_dir, checkpoint=checkpoint, record=record
    )


def _find(resume: str, place: RunPlace) -> tuple[Path | None, Checkpoint | None]:
    """The run folder to go on in, if it is there, and the checkpoint."""
    if resume == "auto":
        run_dir = place.run_dir or place.newest_with(CHECKPOINTS)
        if run_dir is None or not run_dir.is_dir():
            return None, None
        return run_dir, find_newest(run_dir / CHECKPOINTS)
    checkpoint = find_named(Path(resume).expanduser())
    own = checkpoint.folder.resolve().parents[1]
    is_run = (own / OPTIONS).is_file()
    return place.run_dir or (own if is_run else None), checkpoint
