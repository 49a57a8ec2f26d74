"""A model that scores, and what its numbers must be."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from fastpref.batch import EncodedRow
from fastpref.config import ModelConfig
from fastpref.data.source import Rows
from fastpref.data.weights_file import ModelOrigin
from fastpref.errors import CheckpointError, DataError
from fastpref.model.files.paths import named_model
from fastpref.model.scorer import TokenScorer
from fastpref.model.source import read_vocab_size
from fastpref.scoring.shards import PairLogps, Shards


@dataclass(frozen=True, slots=True, kw_only=True)
class Side:
    """One of the two models."""

    label: str
    """positive or negative."""
    model: ModelConfig
    origin: ModelOrigin
    """What it is, and the text of its template, "" for none."""
    quantized: bool
    """Its adapter stands beside layers in 4 bits, as it was trained."""


def check_ids(rows: Rows, encoded: Sequence[EncodedRow], side: Side) -> None:
    """Refuse tokens that have no row in a model's embedding, before it is loaded.

    Raises:
        CheckpointError: naming the file, the row and the token.
    """
    vocab_size = read_vocab_size(named_model(side.model, key=f"weights.{side.label}"))
    for i, ids in enumerate(encoded):
        highest = max(int(part.max(initial=0)) for part in map(np.asarray, ids[:3]))
        if highest >= vocab_size:
            raise CheckpointError(
                f"weights.{side.label}: {rows.place(i)} has token id {highest}, the embedding "
                f"of {side.origin.name_or_path} has {vocab_size} rows; the tokenizer belongs to "
                "another model"
            )


def check_positions(
    scorer: TokenScorer, side: Side, sources: Sequence[tuple[Rows, Shards]]
) -> None:
    """Refuse rows that run off a table of positions.

    Raises:
        DataError: naming the file and the row.
    """
    limit = scorer.num_positions
    if limit is None:
        return
    for rows, shards in sources:
        for i, ids in enumerate(shards.rows):
            length = len(ids.prompt_ids) + max(len(ids.chosen_ids), len(ids.rejected_ids))
            if length > limit:
                raise DataError(
                    f"{rows.place(i)}: {length} tokens, {side.origin.name_or_path} has "
                    f"positions for {limit}; weights are estimated for whole rows, "
                    "so leave this one out"
                )


def check_finite(
    parts: Sequence[PairLogps],
    places: Sequence[int],
    rows: Rows,
    side: Side,
) -> None:
    """Refuse a model that gives NaN or infinity; runs on every rank with the same outcome.

    Raises:
        CheckpointError: naming the file, the row and the token.
    """
    for i, pair in zip(places, parts, strict=True):
        for field, logps in zip(("chosen", "rejected"), pair, strict=True):
            wrong = np.flatnonzero(~np.isfinite(logps))
            if len(wrong):
                raise CheckpointError(
                    f"weights.{side.label}: {side.origin.name_or_path} gives a log-probability of "
                    f"{logps[wrong[0]]} at {rows.place(i)}:{field}, token "
                    f"{wrong[0] + 1}; shards that were complete before are kept"
                )
