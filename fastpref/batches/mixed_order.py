"""Order of the training data for several sources mixed by shares."""

from collections.abc import Sequence
from functools import lru_cache
from math import gcd
from typing import NamedTuple

import numpy as np

from fastpref.batches.order import GlobalOrder, rows_by_prompt, shuffled
from fastpref.config.data import SMALLEST_SHARE


class SourceShare(NamedTuple):
    """A source's part of a mix."""

    num_rows: int
    share: float
    """Share of the examples, in (0, 1]."""
    passes: float
    """Number of passes over its rows."""


class MixedOrder(GlobalOrder):
    """Rows of every batch where each source contributes its share of the examples.

    `interleave` determines the source of example n: among the first m examples, for every m, each
    source has its share to within one example. A source's examples are passes over its rows, each
    pass shuffled by (seed, source, pass) with the pairs of a prompt adjacent. Passes continue
    across epochs: no row repeats before all others of its source have been used.

    An epoch has as many examples as all sources have rows, minus the incomplete batch if
    `drop_last`: a source with fewer rows than its share is repeated within an epoch, one with more
    is used in part. The next epoch continues with the rows that follow; none are skipped. As in
    `GlobalOrder`, a step's rows depend on its number alone.

    Args:
        groups: Prompt id of each row. Shape (rows,), int64.
        sources: Source of each row, 0-based; every source has rows. Shape (rows,), int64.
        shares: Share of each source, in [`SMALLEST_SHARE`, 1]; they sum to 1.
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
        self._pattern = interleave(weights)
        self._weights = np.array(weights)
        # rank of each place of the pattern among the places of its source
        self._ranks = np.empty_like(self._pattern)
        for source, weight in enumerate(weights):
            self._ranks[self._pattern == source] = np.arange(weight)
        # cache two passes per source: the one that an epoch ends in also starts the next epoch
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
        """Composition of the first `num_examples` examples, by source."""
        rounds, rest = divmod(num_examples, len(self._pattern))
        counts = rounds * self._weights
        counts += np.bincount(self._pattern[:rest], minlength=len(counts))
        shares = self._weights / self._weights.sum()
        return [
            SourceShare(len(rows), float(share), float(count / len(rows)))
            for rows, share, count in zip(self._members, shares, counts, strict=True)
        ]

    @property
    def num_examples(self) -> int:
        """Total examples over all steps."""
        epochs, steps = divmod(self.num_steps, self.steps_per_epoch)
        return epochs * self.examples_per_epoch + steps * self.batch_size

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
        """Rows, as indices within the source, of the source's n-th examples."""
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
        # rows that do not fill a batch are used in the next epoch
        return super()._remainder_warning(0, drop_last)


def whole_weights(shares: Sequence[float]) -> list[int]:
    """Smallest integers in the proportions of the shares, which are rounded to a millionth."""
    weights = [round(share / SMALLEST_SHARE) for share in shares]
    divisor = gcd(*weights)
    return [weight // divisor for weight in weights]


def interleave(weights: Sequence[int]) -> np.ndarray:
    """Sequence with each source as often as its weight, evenly spread: in every prefix, also of the
    repeated sequence, the count of each source deviates from its share by less than one.

    This holds if turn x of a source of weight w among a total of W is in the window
    [floor(x W / w), ceil((x + 1) W / w)); scheduling the earliest deadline first meets all windows
    (proportionate fairness, Baruah et al. 1996).

    Args:
        weights: Weight of each source, > 0.

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
