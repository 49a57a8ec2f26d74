"""A cached reference: its log-probabilities are computed before the first step, and the loaders add
them to the rows."""

import hashlib
import json
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any, NamedTuple

from fastpref.config import ModelConfig
from fastpref.data.cache import code_digest
from fastpref.deadline import Deadline
from fastpref.distributed import World
from fastpref.errors import CheckpointError
from fastpref.memory.repetition import Repetition
from fastpref.model.scorer import TokenScorer
from fastpref.scoring.reference import ReferenceScoring, first_visits
from fastpref.scoring.row_cache import RowCache
from fastpref.train.data import Loaders
from fastpref.train.run_folder import check_writable


class Origin(NamedTuple):
    """Identity of a reference model, and how it computes."""

    model: ModelConfig
    digest: str
    """Digest of its weights."""
    quantized: bool
    """Whether its linear layers are quantized to 4 bits."""

    def facts(self, policy: TokenScorer) -> dict[str, Any]:
        """Everything besides a row's tokens that its log-probabilities depend on, except for
        rounding."""
        libraries = ["torch", "transformers"]
        # an adapter merged into 16-bit weights is rounded, so it computes another model
        beside = policy.adapters is not None and policy.adapters.continued
        libraries += ["peft"] * beside + ["bitsandbytes"] * self.quantized
        return {
            "weights": self.digest,
            "policy_dtype": self.model.policy_dtype,
            "compute_dtype": self.model.compute_dtype,
            "adapter": "beside the weights" if beside else "none, or in the weights",
            "in_four_bits": self.model.block_name or "blocks" if self.quantized else "",
            "code": code_digest("batches", "model", "scoring", "kernels"),
            "libraries": {name: version(name) for name in libraries},
        }


def know_reference(
    loaders: Loaders,
    world: World,
    *,
    policy: TokenScorer,
    origin: Origin,
    folder: Path,
    repetition: Repetition,
    deadline_seconds: int | None,
) -> Loaders:
    """Score the rows of a run that are not in the cache yet.

    Args:
        policy: The model before its first update, which is the reference.
        origin: Its identity.
        folder: The cache folder, shared by all models.
        repetition: Recomputes in smaller micro-batches when memory runs out.
        deadline_seconds: Deadline for saving, in seconds after the start of the command; None: no
            deadline.

    Returns:
        Loaders that add the reference's log-probabilities to their rows.

    Raises:
        CheckpointError: ranks see different contents of the folder.
        ConfigError: rows are missing, and the folder cannot be written to.
        CheckpointError, InterruptionError, PreemptionError: see `ReferenceScoring.complete`.
    """
    facts = origin.facts(policy)
    key = hashlib.sha256(json.dumps(facts, sort_keys=True).encode()).hexdigest()
    cache = RowCache(folder / key[:16])
    visits = [(loader, first_visits(loader)) for loader in loaders if loader is not None]
    wanted = {digest for _, steps in visits for step in steps for digest in step.digests}
    # rank 0 lists the files: on a network disk another node may see new ones later
    cache.read(world.on_main(cache.files), wanted)
    if world.agree_max(len(cache)) != -world.agree_max(-len(cache)):
        raise CheckpointError(
            f"{cache.folder}: processes find other rows in it than others do; name a folder that "
            "all machines share: reference.cache_dir"
        )
    if any(digest not in cache for digest in wanted):
        world.on_main(lambda: check_writable("reference.cache_dir", cache.folder))
    scoring = ReferenceScoring(
        policy=policy,
        cache=cache,
        world=world,
        repetition=repetition,
        about={"model": origin.model.name_or_path, **facts},
        # no time is reserved for the save: writing the rows is quick
        deadline=Deadline(deadline_seconds),
    )
    scoring.complete(visits)
    train, held_out = loaders
    return Loaders(
        replace(train, known=cache.beside),
        held_out and replace(held_out, known=cache.beside),
    )
