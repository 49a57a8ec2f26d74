"""Rows that need the most memory: for the trial before the first step, and for counting."""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from fastpref.batch import Batch, EncodedRow
from fastpref.batches.layouts import RowLayout
from fastpref.model.logit_path import probe_ids
from fastpref.model.scorer import TokenScorer

LONG_PROMPT = 7
"""Length of the worst-case prompt in units of a response, for layers that compute a prompt once per
response: they need most memory for long prompts. Elsewhere both are equally long."""


class Rows(NamedTuple):
    """Kind of rows that are trained on."""

    layout: RowLayout
    """Layout of rows in a batch."""
    longest: int
    """Tokens of the longest sequence."""
    pairs: bool
    """Whether rows have a rejected response."""
    gathers_keys: bool
    """Whether attention stores a prompt's keys once per branch."""

    def batch(self, num_rows: int, *, long_prompts: bool) -> Batch:
        """A batch of `num_rows` rows of maximum length, on the meta device."""
        of_prompt = LONG_PROMPT if self.layout.share_prompt and long_prompts else 1
        parts = of_prompt + self._num_responses
        length = self._response_tokens(of_prompt)
        ids = torch.arange(num_rows * parts * length).view(num_rows, parts, length)
        rows = self._divide(ids, of_prompt, weighted=False)
        # without padding to fixed lengths, which could make two batches equally long
        batch = self.layout.unfilled().build_rows(rows, pad_token_id=0)
        return batch.to(torch.device("meta"))

    def worst(self, scorer: TokenScorer, num_tokens: int, *, weighted: bool) -> list[EncodedRow]:
        """Rows of maximum length with `num_tokens` computed tokens in total, no prompt twice.

        Args:
            scorer: Model whose ordinary tokens are used.
            num_tokens: Computed tokens of all rows together.
            weighted: Whether tokens have weights.
        """
        of_prompt = LONG_PROMPT if self.layout.repeats_prompts else 1
        prompts = 1 if self.layout.share_prompt else self._num_responses
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
        """Rows from ids (rows, parts, tokens): `of_prompt` parts of prompt, one per response."""
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
