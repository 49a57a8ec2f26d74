"""The reference of a policy that trains adapters: the policy's own modules, as before training."""

from typing import Any

from torch import Tensor

from fastpref.batch import Batch
from fastpref.model.scorer import HeadStates, TokenScorer


class OwnReference:
    """A policy with its adapters disabled, or with those that its training started from.

    Computes the same as a second model in memory would; see `TokenScorer` for the methods.
    """

    def __init__(self, policy: TokenScorer) -> None:
        assert policy.adapters is not None
        self._policy = policy
        self._adapters = policy.adapters

    @property
    def num_embeddings(self) -> int:
        """Rows of the input embedding; token ids must be below this number."""
        return self._policy.num_embeddings

    def __call__(self, batch: Batch) -> Tensor:
        """Log-probabilities of the batch's N response tokens, (N,) float32."""
        with self._adapters.as_reference():
            logps_N = self._policy(batch)
        assert isinstance(logps_N, Tensor)
        return logps_N

    def states(self, batch: Batch) -> HeadStates:
        """Hidden states and LM head, the reference input of the policy's `forward`."""
        with self._adapters.as_reference():
            return self._policy.states(batch)

    def generate(self, input_ids: Tensor, attention_mask: Tensor, **options: Any) -> Tensor:
        """Sampled continuations."""
        with self._adapters.as_reference():
            return self._policy.generate(input_ids, attention_mask, **options)

    def release(self) -> None:
        """Do nothing: the policy releases what the two share."""


def beginning_of(policy: TokenScorer) -> TokenScorer | OwnReference:
    """The reference of a policy that has not been updated yet: itself, or its `OwnReference`."""
    return policy if policy.adapters is None else OwnReference(policy)
