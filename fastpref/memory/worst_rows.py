"""Rows that take most of a device: what is tried before the first step, and what is counted."""

import math
from dataclasses import replace
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.batch import Batch, EncodedRow
from fastpref.batches.layouts import PackedRows, RowLayout
from fastpref.model.logit_path import probe_ids
from fastpref.model.scorer import TokenScorer


class Parts(NamedTuple):
    """A row as parts of equally many tokens."""

    of_prompt: int
    """Parts of a prompt; a response has one."""
    computed: int
    """Parts that are computed of a row."""
    length: int
    """Tokens of a part."""

    @classmethod
    def of_longest(
        cls, longest: int, *, pairs: bool, shares_prompts: bool, long_prompts: bool = False
    ) -> "Parts":
        """Of rows as long as they come.

        Args:
            longest: Tokens of the longest sequence.
            pairs: Whether rows have a rejected response.
            shares_prompts: Whether the prompt of a pair is computed once.
            long_prompts: Prompts are as much the longer part as they come: layers that compute
                them once for each response take most then.
        """
        # a prompt as long as each of the responses, or seven times as long
        of_prompt = 7 if long_prompts else 1
        sequences = 2 if pairs else 1
        computed = (of_prompt if shares_prompts else sequences * of_prompt) + sequences
        return cls(of_prompt, computed, max(2, longest // (of_prompt + 1)))

    def row_tokens(self, *, pairs: bool) -> int:
        """Of prompt and responses."""
        return (self.of_prompt + (2 if pairs else 1)) * self.length

    def rows(self, ids: Tensor, *, pairs: bool, weighted: bool) -> list[EncodedRow]:
        """Rows of tokens (rows, row_tokens) int64.

        Args:
            ids: No two rows and no two parts alike.
            pairs: See `of_longest`.
            weighted: Whether tokens have weights.
        """
        end = self.of_prompt * self.length
        weights = [1.0] * self.length if weighted else None
        return [
            EncodedRow(
                prompt_ids=row[:end],
                chosen_ids=row[end : end + self.length],
                rejected_ids=row[end + self.length :],
                chosen_weights=weights,
                rejected_weights=weights if pairs else None,
            )
            for row in ids.tolist()
        ]


class Rows(NamedTuple):
    """The rows that are trained on."""

    layout: RowLayout
    """How they lie in a batch."""
    longest: int
    """Tokens of the longest sequence."""
    pairs: bool
    """Whether they have a rejected response."""
    gathers_keys: bool
    """Whether attention keeps a prompt's keys once for each of its branches."""

    def batch(self, num_rows: int, *, long_prompts: bool) -> Batch:
        """So many rows as long as they come, on the meta device."""
        parts = Parts.of_longest(
            self.longest,
            pairs=self.pairs,
            shares_prompts=self.layout.shares_prompts,
            long_prompts=self.layout.shares_prompts and long_prompts,
        )
        length = parts.row_tokens(pairs=self.pairs)
        ids = torch.arange(num_rows * length).view(num_rows, length)
        rows = parts.rows(ids, pairs=self.pairs, weighted=False)
        layout = self.layout
        if isinstance(layout, PackedRows):
            # two batches that are filled up would be equally long
            layout = replace(layout, few_lengths=False)
        return layout.build_rows(rows, pad_token_id=0).to(torch.device("meta"))


def worst_rows(
    scorer: TokenScorer,
    *,
    num_tokens: int,
    longest: int,
    pairs: bool,
    weighted: bool,
    shares_prompts: bool,
    long_prompts: bool = False,
) -> list[EncodedRow]:
    """Rows as long as they come that are so many computed tokens together, no two prompts alike.

    Args:
        scorer: Of ordinary tokens.
        num_tokens: Of all rows together.
        longest, pairs, shares_prompts, long_prompts: See `Parts.of_longest`.
        weighted: Whether tokens have weights.
    """
    parts = Parts.of_longest(
        longest, pairs=pairs, shares_prompts=shares_prompts, long_prompts=long_prompts
    )
    num_rows = max(1, math.ceil(num_tokens / (parts.computed * parts.length)))
    length = max(2, min(parts.length, num_tokens // (parts.computed * num_rows)))
    parts = parts._replace(length=length)
    ids = probe_ids(scorer.model, num_rows, parts.row_tokens(pairs=pairs))
    return parts.rows(ids, pairs=pairs, weighted=weighted)
