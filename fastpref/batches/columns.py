"""Encoded rows in columnar numpy form, for fast construction of batches (thousands per second)."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from fastpref.batch import IGNORED, EncodedRow


class Ranges(NamedTuple):
    """Ranges [start, start + length) of each row's list in a flat array of values."""

    starts: np.ndarray
    """(rows,) int64."""
    lengths: np.ndarray
    """(rows,) int64."""

    def take(self, rows: np.ndarray) -> "Ranges":
        """Ranges of the given rows."""
        return Ranges(self.starts[rows], self.lengths[rows])

    def flat(self) -> np.ndarray:
        """Indices of all ranges, concatenated: [5, 7), [0, 3) -> [5 6 0 1 2]."""
        ends = np.cumsum(self.lengths)
        return np.arange(self.lengths.sum()) + np.repeat(
            self.starts - ends + self.lengths, self.lengths
        )


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedColumns:
    """Encoded rows in columns.

    Raises:
        ValueError: a prompt or a response has no tokens, or only some rows have a rejected
            response.
    """

    ids: np.ndarray
    """int64: the token ids of all lists."""
    prompt: Ranges
    chosen: Ranges
    rejected: Ranges
    """All empty in SFT."""
    weights: np.ndarray | None = None
    """float32: the token weights of all responses; None if all weights are 1."""
    chosen_weights: Ranges | None = None
    rejected_weights: Ranges | None = None
    reference_logps: np.ndarray | None = None
    """float32, parallel to `ids`: precomputed log-probability of each response token under the
    reference, in nats; values at prompt tokens are unused. None if not precomputed."""
    scored: np.ndarray | None = None
    """bool, parallel to `ids`: whether each response token is in the loss; values at prompt tokens
    are unused. None if all are."""

    def __post_init__(self) -> None:
        for name in ("prompt", "chosen"):
            lengths = getattr(self, name).lengths
            if not lengths.all():
                row = int(np.argmin(lengths))
                raise ValueError(f"{name}_ids must not be empty, row {row} has none")
        has_rejected = self.rejected.lengths > 0
        if has_rejected.any() and not has_rejected.all():
            row = int(np.argmin(has_rejected))
            raise ValueError(f"rejected_ids must be given in all rows or none, row {row} has none")

    @classmethod
    def of_rows(cls, rows: Sequence[EncodedRow]) -> "EncodedColumns":
        """Build from a list of rows."""
        columns = zip(*rows, strict=True) if rows else [()] * len(EncodedRow._fields)
        lists = dict(zip(EncodedRow._fields, columns, strict=True))
        return cls._of_lists(
            {
                name: (
                    np.concatenate([[], *(values for values in column if values is not None)]),
                    np.array(
                        [len(values) if values is not None else 0 for values in column], np.int64
                    ),
                )
                for name, column in lists.items()
                if name.endswith("ids") or any(values is not None for values in column)
            }
        )

    @classmethod
    def of_arrow(cls, table: pa.Table) -> "EncodedColumns":
        """Build from an arrow table with the columns of `PreferenceSplit.dataset`."""
        return cls._of_lists(
            {
                name: (
                    pc.list_flatten(table[name]).to_numpy(),
                    pc.list_value_length(table[name]).fill_null(0).to_numpy().astype(np.int64),
                )
                for name in EncodedRow._fields
                if name in table.column_names
            }
        )

    @classmethod
    def _of_lists(cls, columns: dict[str, tuple[np.ndarray, np.ndarray]]) -> "EncodedColumns":
        """Build from flat values and list lengths of each column, by its name in `EncodedRow`."""
        ids, of_ids = _join({k: v for k, v in columns.items() if k.endswith("ids")}, np.int64)
        weights, of_weights = _join(
            {k: v for k, v in columns.items() if k.endswith("weights")}, np.float32
        )
        return cls(
            ids=ids,
            prompt=of_ids["prompt_ids"],
            chosen=of_ids["chosen_ids"],
            rejected=of_ids["rejected_ids"],
            weights=weights if of_weights else None,
            chosen_weights=of_weights.get("chosen_weights"),
            rejected_weights=of_weights.get("rejected_weights"),
            scored=_scored(ids, of_ids, columns),
        )

    def __len__(self) -> int:
        return len(self.prompt.lengths)

    @property
    def has_pairs(self) -> bool:
        """Whether rows have a rejected response; False if there are no rows."""
        return bool(self.rejected.lengths.any())

    @property
    def num_sides(self) -> int:
        """Responses per row: 2 for pairs, 1 in SFT."""
        return 2 if self.has_pairs else 1

    def take(self, rows: np.ndarray) -> "EncodedColumns":
        """The given rows, in that order."""
        ranges: dict[str, Any] = {
            field.name: value.take(rows)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Ranges)
        }
        return replace(self, **ranges)

    def responses(self, rows: np.ndarray) -> Ranges:
        """The chosen responses of the given rows, then their rejected ones, if any."""
        sides = (self.chosen, self.rejected)[: self.num_sides]
        return concatenate([side.take(rows) for side in sides])

    @property
    def branch_tokens(self) -> np.ndarray:
        """(rows,) response tokens to compute: the last of each response is not an input."""
        tokens = self.chosen.lengths - 1
        return tokens + self.rejected.lengths - 1 if self.has_pairs else tokens

    @property
    def num_tokens(self) -> np.ndarray:
        """(rows,) tokens in the data: prompt + chosen, and prompt + rejected of a pair."""
        prompts = self.prompt.lengths * self.num_sides
        return prompts + self.chosen.lengths + self.rejected.lengths

    @property
    def num_scored(self) -> int:
        """Number of response tokens in the loss."""
        if self.scored is None:
            return int(self.chosen.lengths.sum() + self.rejected.lengths.sum())
        return int(self.scored[self.responses(np.arange(len(self))).flat()].sum())

    def targets(self, rows: np.ndarray) -> torch.Tensor:
        """(N,) int64: token ids of `responses`, `IGNORED` for tokens that are not in the loss."""
        tokens = self.responses(rows).flat()
        ids = self.ids[tokens]
        return torch.from_numpy(
            ids if self.scored is None else np.where(self.scored[tokens], ids, IGNORED)
        )

    def in_loss(self, rows: np.ndarray) -> torch.Tensor | None:
        """(M,) int64: indices of the `targets` that are in the loss; None if all are."""
        if self.scored is None:
            return None
        is_scored = self.scored[self.responses(rows).flat()]
        return None if is_scored.all() else torch.from_numpy(np.flatnonzero(is_scored))

    def token_weights(self, rows: np.ndarray) -> torch.Tensor | None:
        """(N,) float32: weights of the tokens of `responses`; None if all weights are 1."""
        if self.weights is None:
            return None
        sides = (self.chosen_weights, self.rejected_weights)
        ranges = concatenate([side.take(rows) for side in sides if side is not None])
        return torch.from_numpy(self.weights[ranges.flat()])


def _join(
    columns: dict[str, tuple[np.ndarray, np.ndarray]], dtype: type
) -> tuple[np.ndarray, dict[str, Ranges]]:
    """Concatenate the values of several columns; returns them and the ranges of each column."""
    ranges, offset = {}, 0
    for name, (_, lengths) in columns.items():
        ranges[name] = Ranges(offset + np.cumsum(lengths) - lengths, lengths)
        offset += int(lengths.sum())
    values = [np.zeros(0, dtype), *(values for values, _ in columns.values())]
    return np.concatenate(values, dtype=dtype, casting="unsafe"), ranges


def _scored(
    ids: np.ndarray, of_ids: dict[str, Ranges], columns: dict[str, tuple[np.ndarray, np.ndarray]]
) -> np.ndarray | None:
    """Loss mask parallel to `ids`, from the `*_scored` columns; True where a row has no mask."""
    if not any(name.endswith("scored") for name in columns):
        return None
    scored = np.ones(len(ids), bool)
    for side in ("chosen", "rejected"):
        values, lengths = columns.get(f"{side}_scored", ((), np.zeros(0, np.int64)))
        told = np.flatnonzero(lengths)
        scored[of_ids[f"{side}_ids"].take(told).flat()] = values
    return scored


def concatenate(parts: Sequence[Ranges]) -> Ranges:
    return Ranges(*map(np.concatenate, zip(*parts, strict=True)))


def alternate(first: Ranges, second: Ranges) -> Ranges:
    """Interleave two lists of ranges: first[0], second[0], first[1], …"""
    return Ranges(*(np.stack(pair, axis=1).ravel() for pair in zip(first, second, strict=True)))


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])
