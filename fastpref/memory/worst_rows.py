"""Rows that take most of a device: what is tried before the first step, and what is counted."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.batch import Batch, EncodedRow
from fastpref.batches.layouts import RowLayout
from fastpref.model.logit_path import probe_ids
from fastpref.model.scorer import TokenScorer

LONG_PROMPT = 7
"""Parts of a prompt that is as much the longer part as they come, a response being one: layers that
compute it once for each response take most then. Any other prompt is one part."""


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
        of_prompt = LONG_PROMPT if self.layout.shares_prompts and long_prompts else 1
        parts = of_prompt + self._num_responses
        length = self._response_tokens(of_prompt)
        ids = torch.arange(num_rows * parts * length).view(num_rows, parts, length)
        rows = self._divide(ids, of_prompt, weighted=False)
        # two batches that are filled up would be equally long
        batch = self.layout.unfilled().build_rows(rows, pad_token_id=0)
        return batch.to(torch.device("meta"))

    def worst(self, scorer: TokenScorer, num_tokens: int, *, weighted: bool) -> list[EncodedRow]:
        """Rows as long as they come, so many computed tokens together, no two prompts alike.

        Args:
            scorer: Of ordinary tokens.
            num_tokens: Of all rows together.
            weighted: Whether tokens have weights.
        """
        of_prompt = LONG_PROMPT if self.layout.repeats_prompts else 1
        prompts = 1 if self.layout.shares_prompts else self._num_responses
        computed = prompts * of_prompt + self._num_responses
        length = self._response_tokens(of_prompt)
        num_rows = max(1, math.ceil(num_tokens / (computed * length)))
        length = max(2, min(length, num_tokens // (computed * num_rows)))
        parts = of_prompt + self._num_responses
        ids = probe_ids(scorer.model, num_rows, parts * length).view(num_rows, parts, length)
        return self._divide(ids, of_prompt, weighted=weighted)

    @property
    def _num_responses(self) -> int:
        return 2 if self.pairs else 1

    def _response_tokens(self, of_prompt: int) -> int:
        return max(2, self.longest // (of_prompt + 1))

    def _divide(self, ids: Tensor, of_prompt: int, *, weighted: bool) -> list[EncodedRow]:
        """Rows of (rows, parts, tokens) int64: of a prompt so many parts, of a response one."""
        weights = [1.0] * ids.shape[-1] if weighted else None
        return [
            EncodedRow(
                prompt_ids=row[:of_prompt].flatten().tolist(),
                chosen_ids=row[of_prompt].tolist(),
                rejected_ids=row[of_prompt + 1 :].flatten().tolist(),
                chosen_weights=weights,
                rejected_weights=weights if self.pairs else None,
            )
            for row in ids
        ]
