"""A reference that is known before the first step: what a run's loaders add to their rows."""

import hashlib
import json
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
import transformers

from fastpref.config import ModelConfig
from fastpref.data.cache import code_digest
from fastpref.distributed import World
from fastpref.errors import CheckpointError
from fastpref.memory.repetition import Repetition
from fastpref.model.scorer import TokenScorer
from fastpref.scoring.reference import ReferenceScoring
from fastpref.scoring.row_cache import RowCache
from fastpref.train.data import Loaders


class Origin(NamedTuple):
    """The model that a reference is, and how it computes."""

    model: ModelConfig
    digest: str
    """Of its weights."""
    in_four_bits: bool

    def facts(self) -> dict[str, str | bool]:
        """All that log-probabilities depend on beside a row's tokens, but for rounding."""
        return {
            "weights": self.digest,
            "policy_dtype": self.model.policy_dtype,
            "compute_dtype": self.model.compute_dtype,
            "in_four_bits": self.in_four_bits,
            "code": code_digest("batches", "model", "scoring"),
            "torch": torch.__version__,
            "transformers": transformers.__version__,
        }


def know_reference(
    loaders: Loaders,
    world: World,
    *,
    policy: TokenScorer,
    origin: Origin,
    folder: Path,
    repetition: Repetition,
) -> tuple[Loaders, bool]:
    """Score the rows of a run that no run before it scored.

    Args:
        loaders: Of the run.
        world: Whoever runs.
        policy: As training starts from it.
        origin: What that is.
        folder: Of all models' log-probabilities.
        repetition: What to do where memory runs out.

    Returns:
        Loaders whose rows have the reference's log-probabilities beside them, and whether this
        start computed all of these, in the micro-batches of this run.

    Raises:
        CheckpointError: processes see different folders.
        CheckpointError, InterruptionError, PreemptionError: see `ReferenceScoring.complete`.
    """
    facts = origin.facts()
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    cache = RowCache(folder.expanduser() / key[:16])
    # what rank 0 sees counts: another node may see the folder later
    names = world.on_main(cache.files)
    cache.read(names)
    if world.agree_max(len(cache)) != -world.agree_max(-len(cache)):
        raise CheckpointError(
            f"{cache.folder}: processes find other rows in it than others do; name a folder that "
            "all machines share: reference.cache_dir"
        )
    scoring = ReferenceScoring(
        policy=policy,
        cache=cache,
        world=world,
        repetition=repetition,
        about={"model": origin.model.name_or_path, **facts},
    )
    scoring.complete([loader for loader in loaders if loader is not None])
    train, held_out = loaders
    known = Loaders(
        replace(train, known=cache.beside),
        held_out and replace(held_out, known=cache.beside),
    )
    return known, not names
