"""Select the rows of a source that belong to a split: held-out prompts, copies."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import datasets
import numpy as np

from fastpref.errors import DataError

COPY = "copy of an earlier row"
"""Reason to drop a row with `data.deduplicate`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Selection of held-out prompts for a dataset without a test split.

    A prompt is held out if its keyed hash (key: the seed) is below a threshold. The choice does not
    depend on the order of the rows or on other prompts, and a larger fraction holds out a superset.
    """

    fraction: float
    """Expected share of prompts held out, in [0, 1); 0: none."""
    seed: int

    def draw(self, prompt_hashes: np.ndarray) -> np.ndarray:
        """Whether the prompt of each row is held out. Shape (rows,), bool."""
        hashes, places = np.unique(prompt_hashes, return_inverse=True)
        drawn = [self._draw(value.tobytes()) for value in hashes.astype("<i8")]
        return np.array(drawn, np.bool_)[places]

    def _draw(self, prompt: bytes) -> bool:
        digest = hashlib.blake2b(prompt, digest_size=8, key=str(self.seed).encode()).digest()
        return int.from_bytes(digest, "little") < self.fraction * 2**64


class Division(NamedTuple):
    """Sizes of the two sides of a source divided into train and test, without dropped rows."""

    train_prompts: int
    test_prompts: int
    train_rows: int
    test_rows: int


class Selection(NamedTuple):
    """The rows of a source that belong to a split."""

    rows: np.ndarray
    """(rows,) int64: indices in the source, including rows to drop."""
    is_copy: np.ndarray
    """(rows,) bool: whether each of these is left out as a copy."""
    division: Division | None = None
    """None if the split has files of its own."""

    def fingerprint(self, dataset: datasets.Dataset) -> str:
        """Fingerprint of the remaining rows: the dataset's own if no row was removed."""
        if len(self.rows) == len(dataset) and not self.is_copy.any():
            return dataset._fingerprint
        kept = self.rows[~self.is_copy].astype("<i8").tobytes()
        return hashlib.sha256(dataset._fingerprint.encode() + kept).hexdigest()


def select_rows(
    dataset: datasets.Dataset,
    source: str,
    *,
    held_out: HeldOut | None,
    is_test: bool,
    earlier: set[int] | None,
) -> Selection:
    """Select the rows of a source that belong to a split.

    Args:
        dataset: All checked rows of the source, including those to drop.
        source: Its name, for messages.
        held_out: How its prompts are divided; None: all rows belong to the split.
        is_test: Select the held-out side of the division, else the other one.
        earlier: Hashes of the pairs read so far, updated in place with this source's; None: keep
            copies.

    Raises:
        DataError: a side of the division has no prompt.
    """
    table = dataset.select_columns(["drop", "group", "prompt_hash", "pair_hash"])
    columns = table.with_format("arrow")[:]
    is_good = np.array([not reason for reason in columns["drop"].to_pylist()], np.bool_)
    rows, division = np.arange(len(dataset)), None
    if held_out is not None:
        groups = columns["group"].to_numpy()
        # rows without a prompt belong to the train side
        is_drawn = held_out.draw(columns["prompt_hash"].to_numpy()) & (groups >= 0)
        division = _divide(groups[is_good], is_drawn[is_good])
        _check_division(division, held_out, source)
        rows = np.flatnonzero(is_drawn == is_test)
    is_copy = np.zeros(len(rows), np.bool_)
    if earlier is not None:
        hashes = columns["pair_hash"].to_numpy()[rows].tolist()
        for place, (value, good) in enumerate(zip(hashes, is_good[rows], strict=True)):
            is_copy[place] = good and value in earlier
            if good:
                earlier.add(value)
    return Selection(rows, is_copy, division)


def _divide(groups: np.ndarray, is_drawn: np.ndarray) -> Division:
    num_test = int(is_drawn.sum())
    return Division(
        train_prompts=len(np.unique(groups[~is_drawn])),
        test_prompts=len(np.unique(groups[is_drawn])),
        train_rows=len(groups) - num_test,
        test_rows=num_test,
    )


def _check_division(division: Division, held_out: HeldOut, source: str) -> None:
    if division.train_prompts and division.test_prompts:
        return
    if not division.train_rows + division.test_rows:
        # no row is left: reported later, with the reasons
        return
    num_prompts = division.train_prompts + division.test_prompts
    raise DataError(
        f"data.test_fraction={held_out.fraction:g}: of the {num_prompts:,} different prompts of "
        f"{source} {division.test_prompts:,} would be held out and {division.train_prompts:,} "
        "trained on; each side needs at least one: set another fraction, or another seed"
    )
