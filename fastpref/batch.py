"""The records that travel from the encoder to the model and on to the losses."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

IGNORED = -100
"""The target of a position that the head's ops score 0, without a gradient."""


class EncodedRow(NamedTuple):
    """One preference pair (or, for SFT, one prompt and response) as token ids.

    A response ends in EOS unless truncation took it. Token weights stand one beside each response
    token; None weighs every token 1. So does whether a token is in the loss; None: all of them are.
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
    """What stands before the segment's first token in its sequence, [prefix_start, prefix_stop): a
    prompt, and what its responses begin with; nothing where the segment begins the sequence."""
    prefix_stop: int


@dataclass(frozen=True, slots=True, kw_only=True)
class KeyUses:
    """Where each of a row's T tokens stands among the keys of its segments: at least once.

    Round by round, so that a token is there once a round and additions have an order.
    """

    first: Tensor
    """(T,) int64: places in the keys, one a token."""
    tokens: Tensor
    """(uses beyond the first,) int64: tokens that have a second one, then a third one, …"""
    places: Tensor
    """(uses beyond the first,) int64: these uses' places in the keys."""
    rounds: tuple[int, ...]
    """How many tokens have a second use, a third one, …"""


@dataclass(frozen=True, slots=True, kw_only=True)
class SegmentLayout:
    """Who attends to whom in a packed row of T tokens.

    First come the plain segments, each a prompt with its first branch (or a whole sequence):
    ordinary causal attention over contiguous tokens. Then the further branches, whose keys are
    their prefix's and their own; causality is aligned at the end. Offsets are what variable-length
    attention calls `cu_seqlens`.
    """

    segments: tuple[Segment, ...]
    """Plain ones, then branches, in the order of the row; none is empty."""
    query_offsets: Tensor
    """(segments + 1,) int32, into the row."""
    key_offsets: Tensor
    """(segments + 1,) int32, into `keys`; into the row without branches."""
    longest: int
    """Queries of the longest segment."""
    longest_keys: int
    """Keys of the segment that has most."""
    keys: Tensor | None
    """(K,) int64: positions in the row of every segment's keys, its prefix's and then its own;
    None without branches, where they are the row as it lies."""
    uses: KeyUses | None
    """Where the row's tokens stand in `keys`; None without branches."""

    @property
    def has_branches(self) -> bool:
        """Whether any prompt is shared."""
        return self.keys is not None


@dataclass(frozen=True, slots=True, kw_only=True)
class Batch:
    """A micro-batch: tokens for the model's body, and the N response tokens that they score.

    Either one packed row, with `position_ids` and a `layout`, or B right-padded rows with an
    `attention_mask`. Sequences are numbered chosen responses first, then rejected ones, so
    sequence p and sequence P + p are one pair. A dataclass and not a tuple on purpose: FSDP2 looks
    into tuples and would cast the token weights to the compute dtype.
    """

    input_ids: Tensor
    """(1, T) int64 packed, or (B, L) int64 padded on the right."""
    position_ids: Tensor | None = None
    """(1, T) int64: place of each token in its own sequence; None for padded rows."""
    layout: SegmentLayout | None = None
    """Who attends to whom in the packed row; None for padded rows."""
    attention_mask: Tensor | None = None
    """(B, L) int64: 1 for a token, 0 for padding; None for a packed row."""
    score_index: Tensor
    """(N or more,) int64: the position, in the flattened `input_ids`, whose hidden state predicts a
    target. A shared position is there once for each sequence that it predicts a token of."""
    target: Tensor
    """(N or more,) int64: the response tokens, in the order of `score_index`; `IGNORED`, which
    scores nothing, where they are not in the loss, and beyond N, where it fills a shape up."""
    in_loss: Tensor | None = None
    """(M or more,) int64: the places in `target` that the head computes, where not all of the N
    tokens are in the loss: those that are, and what fills a shape up; None: all."""
    token_weights: Tensor | None
    """(N,) float32, or None when every token weighs 1."""
    sequence_ids: Tensor
    """(N,) int64 in [0, num_sequences): the sequence a target belongs to."""
    reference_logps: Tensor | None = None
    """(N,) float32: log-probabilities of the targets under the reference, in nats, where they were
    computed before; None where they were not."""
    num_sequences: int
    """2P for P pairs, P in SFT; 0 for a rank without work, which then scores nothing."""

    @property
    def num_scored(self) -> int:
        """N."""
        return len(self.sequence_ids)

    @property
    def head_index(self) -> Tensor:
        """(M or more,) int64: `score_index` of what the head computes."""
        return self.score_index if self.in_loss is None else self.score_index[self.in_loss]

    @property
    def head_target(self) -> Tensor:
        """(M or more,) int64: `target` of what the head computes."""
        return self.target if self.in_loss is None else self.target[self.in_loss]

    def of_scored(self, values: Tensor) -> Tensor:
        """(N,): what the head has made of what it computes, 0 where a token is not in the loss."""
        if self.in_loss is not None:
            values = values.new_zeros(len(self.target)).index_copy(0, self.in_loss, values)
        return values if len(values) == self.num_scored else values[: self.num_scored]

    def to(self, device: torch.device) -> "Batch":
        """The same batch on `device`; from pinned memory the copies do not wait for the host."""
        return _map_tensors(self, lambda tensor: tensor.to(device, non_blocking=True))

    def pin_memory(self) -> "Batch":
        """The same batch in page-locked memory."""
        return _map_tensors(self, Tensor.pin_memory)


def send(tensor: Tensor, device: torch.device) -> Tensor:
    """A tensor of the host on `device`; the host waits for nothing that a GPU computes, as it would
    if the copy came from memory that is not page-locked."""
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
