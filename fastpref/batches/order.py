"""Global order of the training data: the rows of each optimizer step."""

import random
from typing import NamedTuple

import numpy as np

from fastpref.batches.columns import Ranges
from fastpref.config.data import ORDERS
from fastpref.errors import ConfigError


class GlobalOrder:
    """Rows of every batch as a pure function of (seed, epoch, step), over all ranks.

    Prompts are shuffled; the pairs of a prompt stay adjacent in file order. A batch may split the
    pairs of a prompt but never spans two epochs. There is no iterator state: steps can be read in
    any order, and resuming needs only the step number.

    The compatible orders ("dpo", "tdpo", "tisdpo") shuffle the list of prompts in place before each
    epoch with Python's `random`, so shuffles compound. `dpo` and `tdpo` seed each shuffle from a
    numpy stream seeded with 0, drawn below 2**32 and 2**31; `tisdpo` seeds every shuffle with 71.
    They ignore `seed`, and count pairs of dropped incomplete batches towards `n_examples`. Prompts
    without rows here have rows in the original code: they are shuffled, then skipped.

    Args:
        groups: Prompt id of each row, of at least one. Shape (rows,), int64.
        batch_size: Rows of one optimizer step over all ranks, > 0.
        seed: Seed of the shuffle, >= 0.
        n_epochs, n_examples: Training stops at whichever is reached first, > 0; None is no limit,
            but one must be given. `n_examples` rounds up to whole batches.
        drop_last: Drop the incomplete last batch of an epoch.
        order: One of `ORDERS`.
        num_prompts: Number of prompts, including those without rows; ids are below it. None: only
            prompts with rows count, in the order of their first row.

    Attributes:
        num_steps: Total optimizer steps, > 0.
        steps_per_epoch: Batches of one epoch.
        warning: Warning about dropped rows or too few rows, or None.

    Raises:
        ConfigError: no limit given, or not a single step.
    """

    def __init__(
        self,
        groups: np.ndarray,
        *,
        batch_size: int,
        seed: int,
        n_epochs: int | None = None,
        n_examples: int | None = None,
        drop_last: bool = True,
        order: str = "fastpref",
        num_prompts: int | None = None,
    ) -> None:
        if n_epochs is None and n_examples is None:
            raise ConfigError("n_epochs or n_examples must be given, both are null")
        assert order in ORDERS, order
        self.num_rows = len(groups)
        self.batch_size = batch_size
        self.seed = seed
        self.order = order
        prompts, self._rows = rows_by_prompt(groups)
        self._prompts = np.arange(len(prompts)) if num_prompts is None else prompts
        self._num_prompts = len(prompts) if num_prompts is None else num_prompts
        full_batches, remainder = divmod(self.num_rows, batch_size)
        self.steps_per_epoch = full_batches + (not drop_last and remainder > 0)
        if self.steps_per_epoch == 0:
            raise ConfigError(
                f"batch_size={self.batch_size} is more than the {self.num_rows} rows there are and "
                "data.drop_last=true leaves out incomplete batches: not a single step; set "
                f"data.drop_last=false or batch_size <= {self.num_rows}"
            )
        self.num_steps = self._count_steps(n_epochs, n_examples, drop_last)
        self.warning = self._remainder_warning(remainder, drop_last)
        self._cached_epoch = -1
        self._cached_rows = np.empty(0, np.int64)

    def batch(self, step: int) -> np.ndarray:
        """Row indices of step `step`, counted from 0. Shape (<= batch_size,), int64."""
        if not 0 <= step < self.num_steps:
            raise IndexError(f"step must be in [0, {self.num_steps}), got {step}")
        epoch, index = divmod(step, self.steps_per_epoch)
        start = index * self.batch_size
        return self.epoch_rows(epoch)[start : start + self.batch_size]

    def epoch_rows(self, epoch: int) -> np.ndarray:
        """All row indices in the order of epoch `epoch`, also of a dropped batch. Shape (rows,)."""
        if epoch != self._cached_epoch:
            self._cached_rows = self._visit(epoch)
            self._cached_epoch = epoch
        return self._cached_rows

    def _visit(self, epoch: int) -> np.ndarray:
        """Compute the result of `epoch_rows`, which caches it."""
        return self._rows.in_order(self._group_order(epoch))

    def _group_order(self, epoch: int) -> np.ndarray:
        num_groups = len(self._rows.places.lengths)
        if self.order == "fastpref":
            return shuffled(num_groups, self.seed, epoch)
        prompt_order = list(range(self._num_prompts))
        for shuffle_seed in compatible_shuffle_seeds(self.order, epoch + 1):
            random.Random(shuffle_seed).shuffle(prompt_order)
        group_of_prompt = np.full(self._num_prompts, -1)
        group_of_prompt[self._prompts] = np.arange(num_groups)
        group_order = group_of_prompt[prompt_order]
        return group_order[group_order >= 0]

    def _count_steps(self, n_epochs: int | None, n_examples: int | None, drop_last: bool) -> int:
        limits = []
        if n_epochs is not None:
            limits.append(n_epochs * self.steps_per_epoch)
        if n_examples is not None:
            examples_per_epoch = self.num_rows
            if drop_last and self.order == "fastpref":
                examples_per_epoch = self.steps_per_epoch * self.batch_size
            # if dropped rows count and n_examples falls among them, only the first batch of the
            # next epoch reaches it
            epochs, index = divmod(n_examples - 1, examples_per_epoch)
            limits.append(epochs * self.steps_per_epoch + index // self.batch_size + 1)
        return min(limits)

    def _remainder_warning(self, remainder: int, drop_last: bool) -> str | None:
        if drop_last and remainder:
            return (
                f"{remainder} of {self.num_rows} rows are left out of each epoch, the incomplete "
                f"last batch of {self.batch_size}; data.drop_last=false trains on it"
            )
        if self.num_rows < self.batch_size:
            return (
                f"only {self.num_rows} rows for batch_size={self.batch_size}: "
                "every step is one incomplete batch"
            )
        return None


class PromptRows(NamedTuple):
    """Rows grouped by prompt."""

    rows: np.ndarray
    """(rows,) int64: row indices of the first prompt, of the second, …, each in file order."""
    places: Ranges
    """Range of each prompt's rows within `rows`; never empty."""

    def in_order(self, prompts: np.ndarray) -> np.ndarray:
        """Row indices of the given prompts, in that order of prompts. Shape (rows,)."""
        return self.rows[self.places.take(prompts).flat()]


def rows_by_prompt(groups: np.ndarray) -> tuple[np.ndarray, PromptRows]:
    """Prompt ids in the order of their first row, and the rows of each prompt.

    Args:
        groups: Prompt id of each row. Shape (rows,), int64.
    """
    ids, first_rows, places = np.unique(groups, return_index=True, return_inverse=True)
    order = np.argsort(first_rows)
    ranks = np.empty_like(order)
    ranks[order] = np.arange(len(order))
    places = ranks[places]
    rows = np.argsort(places, kind="stable")
    counts = np.bincount(places)
    return ids[order], PromptRows(rows, Ranges(np.cumsum(counts) - counts, counts))


def shuffled(number: int, seed: int, *keys: int) -> np.ndarray:
    """Random permutation of range(number), determined by the seed and the keys alone."""
    # raw PCG64 output: numpy guarantees this stream across versions, not Generator.permutation's
    bits = np.random.PCG64(np.random.SeedSequence(seed, spawn_key=keys))
    return np.argsort(bits.random_raw(number), kind="stable")


def compatible_shuffle_seeds(order: str, num_epochs: int) -> list[int]:
    """Seeds of the first `num_epochs` shuffles in one of the three seed repositories' orders."""
    if order == "tisdpo":
        return [71] * num_epochs
    upper = {"dpo": 2**32, "tdpo": 2**31}[order]
    return np.random.RandomState(0).randint(0, upper, size=num_epochs, dtype=np.int64).tolist()
