"""A model that scores, and what its numbers must be."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from fastpref.batch import EncodedRow
from fastpref.config import ModelConfig
from fastpref.data.source import Rows
from fastpref.data.weights_file import ModelOrigin
from fastpref.errors import CheckpointError, DataError
from fastpref.model.positions import position_limit
from fastpref.scoring.shards import PairLogps


@dataclass(frozen=True, slots=True)
class Side:
    """One of the two models."""

    label: str
    """positive or negative."""
    model: ModelConfig
    twin: Any
    """The model without memory."""
    origin: ModelOrigin
    """What it is, and the text of its template, "" for none."""
    quantized: bool
    """Its adapter stands beside layers in 4 bits, as it was trained."""


def check_rows(rows: Rows, encoded: Sequence[EncodedRow], side: Side) -> None:
    """Refuse, before a model is loaded, tokens that have no row in its embedding, and rows that run
    off its table of positions.

    Raises:
        CheckpointError: naming the file, the row and the token.
        DataError: naming the file and the row.
    """
    vocab_size = side.twin.get_input_embeddings().weight.shape[0]
    limit = position_limit(side.twin)
    for i, ids in enumerate(encoded):
        highest = max(int(part.max(initial=0)) for part in map(np.asarray, ids[:3]))
        if highest >= vocab_size:
            raise CheckpointError(
                f"weights.{side.label}: {rows.place(i)} has token id {highest}, the embedding "
                f"of {side.origin.name_or_path} has {vocab_size} rows; the tokenizer belongs to "
                "another model"
            )
        length = len(ids.prompt_ids) + max(len(ids.chosen_ids), len(ids.rejected_ids))
        if limit is not None and length > limit:
            raise DataError(
                f"{rows.place(i)}: {length} tokens, {side.origin.name_or_path} has positions for "
                f"{limit}; weights are estimated for whole rows, so leave this one out"
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
