"""Scores the response tokens of all rows under each side's model, shard by shard, on all ranks."""

import logging
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from fastpref.batches.loader import pad_token_id
from fastpref.config import PackingConfig
from fastpref.data.source import Rows
from fastpref.deadline import Deadline
from fastpref.distributed import World
from fastpref.model.positions import warn_beyond_training
from fastpref.scoring.models import SideModels
from fastpref.scoring.progress import ScoringProgress
from fastpref.scoring.ranks import Ranks, repeat_scoring
from fastpref.scoring.shards import Shards
from fastpref.scoring.side import Side, check_finite
from fastpref.signals import StopRequest, end_if_past

logger = logging.getLogger("fastpref")

KEPT = "shards that are complete are kept; the same command goes on there"
"""Message for a weight estimation that is stopped."""


def score_sides(
    sides: Sequence[Side],
    sources: Sequence[tuple[Rows, Mapping[str, Shards]]],
    world: World,
    *,
    tokenizer: Any,
    packing: PackingConfig,
    batch_size: int | None,
    deadline_seconds: int | None,
) -> None:
    """Score the missing shards of every side, one model at a time.

    Args:
        sources: Rows of each source, and their shards by side label.
        batch_size: Rows per batch; None: chosen by the row layout.
        deadline_seconds: Time since the start of the command by which scores must be saved.

    Raises:
        CheckpointError: a log-probability is not finite.
        InterruptionError, PreemptionError: a stop signal arrived, or the deadline is near.
    """
    longest = max((part.longest for _, parts in sources for part in parts.values()), default=0)
    models = SideModels(sides, packing, world, longest=longest)
    for side in sides:
        score_missing(
            side,
            [(rows, parts[side.label]) for rows, parts in sources],
            world,
            models=models,
            tokenizer=tokenizer,
            batch_size=batch_size,
            deadline_seconds=deadline_seconds,
        )
        # one model at a time: half the memory of the two together
        models.release(side)


@torch.no_grad()
def score_missing(
    side: Side,
    sources: Sequence[tuple[Rows, Shards]],
    world: World,
    *,
    models: SideModels,
    tokenizer: Any,
    batch_size: int | None,
    deadline_seconds: int | None,
) -> None:
    """Score one side's missing shards; its model is loaded only if there are any.

    Raises:
        CheckpointError, InterruptionError, PreemptionError: see `score_sides`.
    """
    # rank 0 decides: another node may see new files of the folder later
    missing = world.on_main(lambda: [shards.missing() for _, shards in sources])
    num_shards = sum(len(shards) for _, shards in sources)
    num_missing = sum(map(len, missing))
    if num_missing < num_shards:
        done = num_shards - num_missing
        logger.info("%s model: %d of %d shards are there already", side.label, done, num_shards)
    if num_missing == 0:
        return
    end_if_past(deadline_seconds, world, KEPT)
    longest = max(shards.longest for _, shards in sources)
    scorer, layout = models.load(side)
    warn_beyond_training(scorer.model, longest)
    wanted = zip(sources, missing, strict=True)
    num_tokens = sum(shards.num_tokens(of_source) for (_, shards), of_source in wanted)
    progress = ScoringProgress(
        f"{side.label} model", num_tokens, num_shards=num_missing, visible=world.is_main
    )
    with StopRequest(Deadline(deadline_seconds)) as stop, progress:
        ranks = Ranks(
            scorer=scorer,
            layout=layout,
            pad_token_id=pad_token_id(tokenizer, scorer.num_embeddings),
            world=world,
            stop=stop,
            progress=progress,
            repetition=repeat_scoring(world, batch_size),
            batch_size=batch_size,
        )
        for (rows, shards), shards_to_score in zip(sources, missing, strict=True):
            for shard in shards_to_score:
                places = shards.rows_of(shard)
                parts = ranks.score_rows([shards.rows[i] for i in places])
                check_finite(parts, places, rows, side)
                logps = np.concatenate([x for pair in parts for x in pair])
                world.on_main(partial(shards.write, shard, logps))
                progress.shard_is_done()
        # a signal during the last shard would else be forgotten when its handler is removed
        stop.raise_if_requested(ranks.kept, world)
