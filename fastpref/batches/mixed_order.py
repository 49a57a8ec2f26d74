"""The order of several sources that are mixed by shares."""

from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import numpy as np

from fastpref.batches.order import GlobalOrder, rows_by_prompt, shuffled
from fastpref.config.data import SMALLEST_SHARE


class SourceShare(NamedTuple):
    """How much of a mix is of one source."""

    num_rows: int
    share: float
    """Of the examples, in (0, 1]."""
    passes: float
    """How often its rows are gone through."""


class MixedOrder(GlobalOrder):
    """Rows of every batch where each source has its share of the examples.

    Example n of the run is of the source that `interleave` says, so that of any number of
    examples, from the first one on, those of a source are its share to within one. A source's
    examples are its rows pass after pass, each pass in an order of its own that follows from
    (seed, source, pass); the pairs of a prompt follow one another in it. A pass goes on from one
    epoch to the next, so no row comes again before all others of its source have come.

    An epoch has as many examples as there are rows in all sources, without `drop_last`'s incomplete
    batch: a source with fewer rows than its share of them is passed more than once in it, of one
    with more a part comes. Nothing is left out between two epochs. As in `GlobalOrder` nothing is
    consumed: a step's rows follow from its number alone.

    Args:
        groups: Prompt id of each row. Shape (rows,), int64.
        sources: Source of each row, from 0 on; each has one. Shape (rows,), int64.
        shares: Of each source, in [`SMALLEST_SHARE`, 1], 1 in all.
        batch_size, seed, n_epochs, n_examples, drop_last: See `GlobalOrder`.

    Attributes:
        examples_per_epoch: Examples of one epoch.

    Raises:
        ConfigError: no limit given, or not a single step.
    """

    def __init__(
        self,
        groups: np.ndarray,
        *,
        sources: np.ndarray,
        shares: Sequence[float],
        batch_size: int,
        seed: int,
        n_epochs: int | None = None,
        n_examples: int | None = None,
        drop_last: bool = True,
    ) -> None:
        self._members = [np.flatnonzero(sources == source) for source in range(len(shares))]
        assert all(len(rows) for rows in self._members), "a source without rows"
        self._prompt_rows = [rows_by_prompt(groups[rows])[1] for rows in self._members]
        weights = whole_weights(shares)
        self._shares = np.array(weights) / sum(weights)
        self._pattern = interleave(weights)
        self._weights = np.array(weights)
        # which example of its source each place of the pattern is
        self._ranks = np.empty_like(self._pattern)
        for source, weight in enumerate(weights):
            self._ranks[self._pattern == source] = np.arange(weight)
        # of each source the pass that an epoch ends in and the next one begins with
        self._pass = lru_cache(maxsize=2 * len(weights))(self._shuffled_pass)
        super().__init__(
            groups,
            batch_size=batch_size,
            seed=seed,
            n_epochs=n_epochs,
            n_examples=n_examples,
            drop_last=drop_last,
        )
        self.examples_per_epoch = self.num_rows
        if drop_last:
            self.examples_per_epoch = self.steps_per_epoch * batch_size

    def mix(self, num_examples: int) -> list[SourceShare]:
        """What the first `num_examples` examples are made of, source by source."""
        rounds, rest = divmod(num_examples, len(self._pattern))
        counts = rounds * self._weights
        counts += np.bincount(self._pattern[:rest], minlength=len(counts))
        return [
            SourceShare(len(rows), float(share), float(count / len(rows)))
            for rows, share, count in zip(self._members, self._shares, counts, strict=True)
        ]

    @property
    def num_examples(self) -> int:
        """Examples of all steps."""
        epochs, steps = divmod(self.num_steps, self.steps_per_epoch)
        in_last = min(steps * self.batch_size, self.examples_per_epoch)
        return epochs * self.examples_per_epoch + in_last

    def _visit(self, epoch: int) -> np.ndarray:
        start = epoch * self.examples_per_epoch
        places = np.arange(start, start + self.examples_per_epoch)
        rounds, places = np.divmod(places, len(self._pattern))
        sources = self._pattern[places]
        rows = np.empty_like(places)
        for source, members in enumerate(self._members):
            is_own = sources == source
            examples = rounds[is_own] * self._weights[source] + self._ranks[places[is_own]]
            rows[is_own] = members[self._rows_of(source, examples)]
        return rows

    def _rows_of(self, source: int, examples: np.ndarray) -> np.ndarray:
        """The rows of a source, counted within it, that some examples of it are."""
        passes, places = np.divmod(examples, len(self._members[source]))
        rows = np.empty_like(examples)
        for number in np.unique(passes).tolist():
            is_in = passes == number
            rows[is_in] = self._pass(source, number)[places[is_in]]
        return rows

    def _shuffled_pass(self, source: int, number: int) -> np.ndarray:
        prompts = self._prompt_rows[source]
        return prompts.in_order(shuffled(len(prompts.places.lengths), self.seed, source, number))

    def _remainder_warning(self, remainder: int, drop_last: bool) -> str | None:
        # what does not fill a batch comes in the next epoch
        return super()._remainder_warning(0, drop_last)


def whole_weights(shares: Sequence[float]) -> list[int]:
    """Whole numbers, as small as they can be, in the proportions of the shares to a millionth."""
    weights = [round(share / SMALLEST_SHARE) for share in shares]
    divisor = gcd(*weights)
    return [weight // divisor for weight in weights]


def interleave(weights: Sequence[int]) -> np.ndarray:
    """Sources in turn, each as often as its weight, so that any start of the list has of each its
    share to within less than one; repeated without end the list keeps that.

    The x-th turn of a source of weight w among W in all lies in [floor(x W / w), ceil((x + 1) W /
    w)), which is that bound; the earliest end first keeps all of them (proportionate fairness,
    Baruah et al. 1996).

    Args:
        weights: Of each source, > 0.

    Returns:
        Source of each turn. Shape (sum of weights,), int64.
    """
    total = sum(weights)
    begins, ends = [0] * len(weights), [-(-total // weight) for weight in weights]
    turns = [0] * len(weights)
    chosen = np.empty(total, np.int64)
    for place in range(total):
        source = min(
            (source for source, begin in enumerate(begins) if begin <= place),
            key=ends.__getitem__,
        )
        chosen[place] = source
        turns[source] += 1
        x, weight = turns[source], weights[source]
        begins[source], ends[source] = x * total // weight, -(-(x + 1) * total // weight)
    return chosen
