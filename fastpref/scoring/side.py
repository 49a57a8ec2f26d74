"""One of the two models that token weights are estimated from; checks of its rows and scores."""

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
    """One of the two contrastive models that token weights are estimated from."""

    label: str
    """positive or negative."""
    model: ModelConfig
    twin: Any
    """The model on the meta device: its modules and shapes without weights."""
    origin: ModelOrigin
    """Name and digest of the model, and the text of its template, "" for none."""
    quantized: bool
    """Its adapter runs beside 4-bit layers, as in training."""


def check_rows(rows: Rows, encoded: Sequence[EncodedRow], side: Side) -> None:
    """Refuse, before a model is loaded, token ids beyond its embedding and rows longer than its
    position table.

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
    """Refuse log-probabilities that are NaN or infinite; every rank checks the same numbers.

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
