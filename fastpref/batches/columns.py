"""Encoded rows as numpy columns, from which thousands of them a second become batches."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from fastpref.batch import IGNORED, EncodedRow


class Ranges(NamedTuple):
    """Where the list of each row lies in an array of all values."""

    starts: np.ndarray
    """(rows,) int64."""
    lengths: np.ndarray
    """(rows,) int64."""

    def take(self, rows: np.ndarray) -> "Ranges":
        """Those of some rows."""
        return Ranges(self.starts[rows], self.lengths[rows])

    def flat(self) -> np.ndarray:
        """start, start + 1, … of each range, one after another: 5-6, 0-2 -> [5 6 0 1 2]."""
        ends = np.cumsum(self.lengths)
        total = int(ends[-1]) if len(ends) else 0
        return np.arange(total) + np.repeat(self.starts - ends + self.lengths, self.lengths)


@dataclass(frozen=True, slots=True, kw_only=True)
class EncodedColumns:
    """Encoded rows, column by column.

    Raises:
        ValueError: a prompt or a response without tokens, or rows with a rejected response beside
            rows without one.
    """

    ids: np.ndarray
    """int64: the token ids of all lists."""
    prompt: Ranges
    chosen: Ranges
    rejected: Ranges
    """Without tokens in SFT."""
    weights: np.ndarray | None = None
    """float32: the token weights of all responses; None when every token weighs 1."""
    chosen_weights: Ranges | None = None
    rejected_weights: Ranges | None = None
    reference_logps: np.ndarray | None = None
    """float32, beside `ids`: of every response token under the reference, in nats; a prompt's are
    not read. None where they are not known beforehand."""
    scored: np.ndarray | None = None
    """bool, beside `ids`: which response tokens are in the loss; a prompt's are not read. None
    where all are."""

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
        """From rows one by one."""
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
        """From an arrow table with the columns of `PreferenceSplit.dataset`."""
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
        """From the values and lengths of each column, by its name in `EncodedRow`."""
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
        """False in SFT, and without any row."""
        return bool(self.rejected.lengths.any())

    @property
    def num_sides(self) -> int:
        """Responses of a row: two of a pair, one in SFT."""
        return 2 if self.has_pairs else 1

    def take(self, rows: np.ndarray) -> "EncodedColumns":
        """Some rows, in that order."""
        ranges: dict[str, Any] = {
            field.name: value.take(rows)
            for field in fields(self)
            if isinstance(value := getattr(self, field.name), Ranges)
        }
        return replace(self, **ranges)

    def responses(self, rows: np.ndarray) -> Ranges:
        """The chosen responses of some rows, then the rejected ones of pairs."""
        sides = (self.chosen, self.rejected)[: self.num_sides]
        return concatenate([side.take(rows) for side in sides])

    @property
    def branch_tokens(self) -> np.ndarray:
        """(rows,) tokens computed beside the prompt: the last of a response predicts nothing."""
        tokens = self.chosen.lengths - 1
        return tokens + self.rejected.lengths - 1 if self.has_pairs else tokens

    @property
    def num_tokens(self) -> np.ndarray:
        """(rows,) tokens in the data: prompt + chosen, and prompt + rejected of a pair."""
        prompts = self.prompt.lengths * self.num_sides
        return prompts + self.chosen.lengths + self.rejected.lengths

    @property
    def num_scored(self) -> int:
        """Response tokens in the loss."""
        if self.scored is None:
            return int(self.chosen.lengths.sum() + self.rejected.lengths.sum())
        return int(self.scored[self.responses(np.arange(len(self))).flat()].sum())

    def targets(self, rows: np.ndarray) -> torch.Tensor:
        """(N,) int64: the tokens of `responses`, `IGNORED` where they are not in the loss."""
        tokens = self.responses(rows).flat()
        ids = self.ids[tokens]
        return torch.from_numpy(
            ids if self.scored is None else np.where(self.scored[tokens], ids, IGNORED)
        )

    def in_loss(self, rows: np.ndarray) -> torch.Tensor | None:
        """(M,) int64: which of `targets` are in the loss; None where all are."""
        if self.scored is None:
            return None
        is_scored = self.scored[self.responses(rows).flat()]
        return None if is_scored.all() else torch.from_numpy(np.flatnonzero(is_scored))

    def token_weights(self, rows: np.ndarray) -> torch.Tensor | None:
        """(N,) float32, beside the tokens of `responses`; None where every token weighs 1."""
        if self.weights is None:
            return None
        sides = (self.chosen_weights, self.rejected_weights)
        ranges = concatenate([side.take(rows) for side in sides if side is not None])
        return torch.from_numpy(self.weights[ranges.flat()])


def _join(
    columns: dict[str, tuple[np.ndarray, np.ndarray]], dtype: type
) -> tuple[np.ndarray, dict[str, Ranges]]:
    """The values of several columns in one array, and where each column's lists lie in it."""
    ranges, offset = {}, 0
    for name, (_, lengths) in columns.items():
        ends = offset + np.cumsum(lengths)
        ranges[name] = Ranges(ends - lengths, lengths)
        offset = int(ends[-1]) if len(ends) else offset
    values = [np.zeros(0, dtype), *(values for values, _ in columns.values())]
    return np.concatenate(values, dtype=dtype, casting="unsafe"), ranges


def _scored(
    ids: np.ndarray, of_ids: dict[str, Ranges], columns: dict[str, tuple[np.ndarray, np.ndarray]]
) -> np.ndarray | None:
    """Of all ids, which are in the loss, from the columns that say so of some responses."""
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
    """The first ranges' first, the second ones' first, the first ones' second, …"""
    return Ranges(*(np.stack(pair, axis=1).ravel() for pair in zip(first, second, strict=True)))


def offsets_of(lengths: np.ndarray) -> np.ndarray:
    return np.concatenate([[0], np.cumsum(lengths)])
