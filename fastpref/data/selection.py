"""Which of a source's checked rows are those of a split: what is held out, what is a copy."""

import hashlib
from dataclasses import dataclass
from typing import NamedTuple

import datasets
import numpy as np

from fastpref.errors import DataError

COPY = "copy of an earlier row"
"""Why a row is left out with `data.deduplicate`."""


@dataclass(frozen=True, slots=True, kw_only=True)
class HeldOut:
    """Which prompts are held out where a dataset has no test split.

    A prompt is drawn by a hash of itself and the seed: neither the order of the rows nor any other
    prompt or dataset has a say in it, and more of them are held out by a larger fraction beside
    all that a smaller one takes.
    """

    fraction: float
    """Of the prompts, expected, in [0, 1); 0: a dataset has its own test split."""
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
    """A source whose prompts are divided: how many are on each side, rows to drop left out."""

    train_prompts: int
    test_prompts: int
    train_rows: int
    test_rows: int


class Selection(NamedTuple):
    """The rows of a source that belong to a split."""

    rows: np.ndarray
    """(rows,) int64: their indices, those to drop included."""
    is_copy: np.ndarray
    """(rows,) bool: of these, the ones that are left out as copies."""
    division: Division | None = None
    """None where the split has a file of its own."""

    def fingerprint(self, dataset: datasets.Dataset) -> str:
        """Of the rows that stay: the dataset's own where all of them do."""
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
    """The rows of a source that belong to a split.

    Args:
        dataset: All checked rows of the source, those to drop included.
        source: Its name, for messages.
        held_out: How its prompts are divided; None: all rows belong to the split.
        is_test: Which side of the division: held out, or the rest.
        earlier: Hashes of pairs that come before these, to which those that stay are added; None:
            copies stay.

    Raises:
        DataError: a side of the division has no prompt.
    """
    table = dataset.select_columns(["drop", "group", "prompt_hash", "pair_hash"])
    columns = table.with_format("arrow")[:]
    is_good = np.array([not reason for reason in columns["drop"].to_pylist()], np.bool_)
    rows, division = np.arange(len(dataset)), None
    if held_out is not None:
        groups = columns["group"].to_numpy()
        # a row without a prompt is counted with the rows to train on
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
        # that no row is left is told with the reasons
        return
    num_prompts = division.train_prompts + division.test_prompts
    raise DataError(
        f"data.test_fraction={held_out.fraction:g}: of the {num_prompts:,} different prompts of "
        f"{source} {division.test_prompts:,} would be held out and {division.train_prompts:,} "
        "trained on; each side needs at least one: set another fraction, or another seed"
    )
