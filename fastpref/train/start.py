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
from fastpref.config import ModelConfig
from fastpref.distributed import World
from fastpref.errors import CheckpointError
from fastpref.model.scorer import TokenScorer
from fastpref.train.data import Data
from fastpref.train.differences import Difference, effect_of, is_among, list_differences
from fastpref.train.fingerprints import take_fingerprints
from fastpref.train.run_folder import OPTIONS, RunPlace
from fastpref.train.state import RunState
from fastpref.train.updates import Updates

logger = logging.getLogger("fastpref")

FORMAT = 1
"""Of the record in a checkpoint."""


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
    """What `make_record` put into the checkpoint."""

    @property
    def state(self) -> RunState:
        """Where the run is gone on with."""
        return RunState.from_json(self.record["state"]) if self.record else RunState()

    def check(
        self,
        options: dict[str, Any],
        model: ModelConfig,
        data: Data,
        world: World,
        *,
        allow: Sequence[str],
    ) -> dict[str, str]:
        """Refuse to go on with other options, data or model than the checkpoint's, where numbers
        depend on them; say what else differs.

        Args:
            options: All of this start.
            model: Its own, again.
            data: What was read.
            world: Whoever runs.
            allow: Names of what may differ all the same.

        Returns:
            Fingerprints of data, tokenizer and model.

        Raises:
            CheckpointError: with a table of what differs.
        """
        fingerprints = take_fingerprints(model, data, world)._asdict()
        if self.checkpoint is None:
            return fingerprints
        if self.record.get("format") != FORMAT:
            raise CheckpointError(
                f"{self.checkpoint.folder}: its record has format {self.record.get('format')}, "
                f"this version reads {FORMAT}"
            )
        schedule = options["optim"]["schedule"]
        found = [
            (difference, effect_of(difference, schedule))
            for difference in list_differences(self.record["options"], options)
        ]
        before = self.record["fingerprints"]
        found += [
            (Difference(name, before[name][:12], digest[:12]), "")
            for name, digest in fingerprints.items()
            if before[name] != digest
        ]
        lines = [_line(difference, effect, allow) for difference, effect in found]
        refused = [d.key for d, effect in found if not effect and not is_among(d.key, allow)]
        if refused:
            raise CheckpointError(
                f"{self.checkpoint.folder} is of a run with other numbers:\n  "
                + "\n  ".join(lines)
                + "\nset them back, name a new run_dir with resume=never, or accept them with "
                f"resume.allow=[{','.join(refused)}]"
            )
        for line in lines:
            logger.warning("going on with other options: %s", line)
        return fingerprints

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


def _line(difference: Difference, effect: str, allow: Sequence[str]) -> str:
    if not effect:
        effect = "allowed" if is_among(difference.key, allow) else "CHANGES THE NUMBERS"
    return f"{difference}: {effect}"


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
        logger.info("resume=auto: no checkpoint in %s, a new start", run_dir or place.root)
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
