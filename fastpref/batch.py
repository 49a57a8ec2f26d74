"""Records passed from the encoder to the model and on to the losses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100
"""Target of a position that the LM-head ops ignore: score 0, no gradient."""


class EncodedRow(NamedTuple):
    """One preference pair (or, for SFT, one prompt and response) as token ids.

    A response ends in EOS unless it was truncated. `*_weights` and `*_scored` have one value per
    response token: its weight (None: all 1) and whether it is in the loss (None: all are).
    `rejected_ids` is empty in SFT.
    """

    prompt_ids: Sequence[int]
    chosen_ids: Sequence[int]
    rejected_ids: Sequence[int]
    chosen_weights: Sequence[float] | None = None
    rejected_weights: Sequence[float] | None = None
    chosen_scored: Sequence[bool] | None = None
    rejected_scored: Sequence[bool] | None = None


class Segment(NamedTuple):
    """Tokens [start, stop) of a packed row; they attend to a prefix and causally to themselves."""

    start: int
    stop: int
    prefix_start: int
    """[prefix_start, prefix_stop): tokens of the row that precede the segment in its sequence, a
    prompt and the tokens that its responses share; empty if the segment starts the sequence."""
    prefix_stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyUses:
    """Inverse of `SegmentLayout.keys`: where each of a row's T tokens occurs among the keys.

    Every token occurs at least once. Occurrences are grouped in rounds, each with at most one per
    token (the first ones, then the second ones, …), to sum gradients in a fixed order.
    """

    first: Tensor
    """(T,) int64: index into the keys of each token's first occurrence."""
    tokens: Tensor
    """(further occurrences,) int64: tokens with a second occurrence, then those with a third, …"""
    places: Tensor
    """(further occurrences,) int64: index into the keys of each of them."""
    rounds: tuple[int, ...]
    """Number of tokens with a second occurrence, with a third, …"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentLayout:
    """Attention pattern of a packed row of T tokens, as variable-length attention takes it.

    The plain segments come first, each a prompt with its first branch (or a whole sequence):
    ordinary causal attention over contiguous tokens. Then the further branches, whose keys are
    their prefix and themselves, with a causal mask aligned at the last key. Offsets are the
    `cu_seqlens` of variable-length attention.
    """

    segments: tuple[Segment, ...]
    """Plain segments, then branches, in the order of the row; none is empty."""
    query_offsets: Tensor
    """(segments + 1,) int32, into the row."""
    key_offsets: Tensor
    """(segments + 1,) int32, into `keys`; into the row if there are no branches."""
    longest: int
    """Maximum number of queries per segment."""
    longest_keys: int
    """Maximum number of keys per segment."""
    keys: Tensor | None
    """(K,) int64: positions in the row of the keys, segment by segment, prefix first; None without
    branches, where the keys are the row itself."""
    uses: KeyUses | None
    """Inverse of `keys`; None without branches."""

    @property
    def has_branches(self) -> bool:
        """Whether any prompt is shared."""
        return self.keys is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A micro-batch: input tokens of the model, and the N response tokens to score.

    Either one packed row, with `position_ids` and a `layout`, or B right-padded rows with an
    `attention_mask`. Sequences are numbered chosen responses first, then rejected ones, so
    sequences p and P + p form a pair. Deliberately not a tuple: FSDP2 would traverse it and cast
    the token weights to the compute dtype.
    """

    input_ids: Tensor
    """(1, T) int64 packed, or (B, L) int64 padded on the right."""
    position_ids: Tensor | None = None
    """(1, T) int64: position of each token in its own sequence; None for padded rows."""
    layout: SegmentLayout | None = None
    """Attention pattern of the packed row; None for padded rows."""
    attention_mask: Tensor | None = None
    """(B, L) int64: 1 for a token, 0 for padding; None for a packed row."""
    score_index: Tensor
    """(N or more,) int64: index into the flattened `input_ids` of the hidden state that predicts
    each target. A shared position occurs once per sequence that it predicts a token of."""
    target: Tensor
    """(N or more,) int64: the response tokens, in the order of `score_index`; `IGNORED` for tokens
    that are not in the loss and for entries beyond N, which pad to a fixed shape."""
    in_loss: Tensor | None = None
    """(M or more,) int64: indices into `target` that the head computes: the M tokens in the loss,
    and padding; None if all N tokens are in the loss."""
    token_weights: Tensor | None
    """(N,) float32, or None if all weights are 1."""
    sequence_ids: Tensor
    """(N,) int64 in [0, num_sequences): the sequence that each target belongs to."""
    reference_logps: Tensor | None = None
    """(N,) float32: precomputed log-probabilities of the targets under the reference, in nats; None
    if they were not precomputed."""
    num_sequences: int
    """2P for P pairs, P in SFT; 0 for a rank without rows."""

    @property
    def num_scored(self) -> int:
        """N, the number of response tokens, also those not in the loss."""
        return len(self.sequence_ids)

    @property
    def head_index(self) -> Tensor:
        """(M or more,) int64: `score_index` of the targets that the head computes."""
        return self.score_index if self.in_loss is None else self.score_index[self.in_loss]

    @property
    def head_target(self) -> Tensor:
        """(M or more,) int64: the targets that the head computes."""
        return self.target if self.in_loss is None else self.target[self.in_loss]

    def of_scored(self, values: Tensor) -> Tensor:
        """Map values of the `head_target` tokens to all response tokens, (N,); 0 if not in loss."""
        if self.in_loss is not None:
            values = values.new_zeros(len(self.target)).index_copy(0, self.in_loss, values)
        return values if len(values) == self.num_scored else values[: self.num_scored]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; copies from pinned memory are asynchronous."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory."""
        return _map_tensors(self, Tensor.pin_memory)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """Copy a host tensor to `device`, via pinned memory for a GPU: a copy from pageable memory
    would block the host until the GPU has caught up."""
    source = tensor.pin_memory() if device.type == "cuda" else tensor
    return source.to(device, non_blocking=True)


def _map_tensors(record: Any, function: Callable[[Tensor], Tensor]) -> Any:
    """A copy of a record with `function` applied to its tensors and to those of its layout."""
    changed: dict[str, Any] = {}
    for field in fields(record):
        value = getattr(record, field.name)
        if isinstance(value, Tensor):
            changed[field.name] = function(value)
        elif isinstance(value, SegmentLayout | KeyUses):
            changed[field.name] = _map_tensors(value, function)
    return replace(record, **changed)
