"""Packed rows: concatenated sequences with shared prompts, and their attention pattern.

Pairs with the same prompt ids share it: the prompt is computed once, and so is the prefix common
to all its responses; each response continues from there as a branch.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from fastpref.batch import Batch, EncodedRow, KeyUses, Segment, SegmentLayout
from fastpref.batches.columns import EncodedColumns, Ranges, alternate, concatenate, offsets_of
from fastpref.batches.packing_plan import find_shared
from fastpref.batches.plan import MicroBatch


def pack_rows(
    rows: Sequence[EncodedRow],
    *,
    pad_token_id: int,
    share_prompt: bool = True,
    among_rows: bool = True,
) -> Batch:
    """Build one packed row of P encoded rows, in their order.

    Args:
        rows: P encoded rows, all with a rejected response or all without.
        pad_token_id: The only token of a batch without rows, which scores nothing.
        share_prompt: Compute equal prompts, and common prefixes of their responses, once.
        among_rows: Also between different rows, not only within a pair.
    """
    columns = EncodedColumns.of_rows(rows)
    prompts, num_shared = find_shared(columns, share_prompt=share_prompt, among_rows=among_rows)
    batch = MicroBatch(np.arange(len(rows)), prompts, num_shared, 0)
    return pack(columns, batch, pad_token_id=pad_token_id, share_prompt=share_prompt)


def pack(
    columns: EncodedColumns, micro_batch: MicroBatch, *, pad_token_id: int, share_prompt: bool
) -> Batch:
    """Build one packed row of a micro-batch.

    Args:
        micro_batch: Its rows, and which of them share a prompt.
        pad_token_id: The only token of a micro-batch without rows, which scores nothing.
        share_prompt: False gives every sequence its own copy of its prompt.
    """
    rows = micro_batch.rows
    if not len(rows):
        return _empty_batch(pad_token_id)
    trees = _Trees.of(columns, micro_batch, share_prompt=share_prompt)
    num_sequences = len(trees.responses.lengths)
    return Batch(
        input_ids=torch.from_numpy(columns.ids[trees.tokens])[None],
        position_ids=torch.from_numpy(trees.positions)[None],
        layout=trees.layout,
        score_index=torch.from_numpy(trees.score_index),
        target=columns.targets(rows),
        in_loss=columns.in_loss(rows),
        token_weights=columns.token_weights(rows),
        sequence_ids=torch.from_numpy(np.repeat(np.arange(num_sequences), trees.responses.lengths)),
        num_sequences=num_sequences,
    )


@dataclass(frozen=True, kw_only=True)
class _Trees:
    """S sequences as G trees (a prompt and the responses that branch from it), and their places.

    Two pairs with one prompt, chosen responses A and B, rejected ones a and b, all of which begin
    with the tokens s, are laid out in the row as

        [ prompt  s  rest of A ] [ rest of B ] [ rest of a ] [ rest of b ]
          trunk: 0 … p + s       from position p + s each

    A's branch follows the prompt and begins with s; the other branches attend to this trunk and to
    themselves. The row has all trees' prompts with their first branches, then all other branches.
    The last token of a response predicts nothing and is left out.
    """

    prompts: Ranges
    """(G,) prompts, in the columns' ids."""
    responses: Ranges
    """(S,) responses, in the columns' ids, chosen ones first."""
    trees: np.ndarray
    """(S,) int64: tree of each sequence."""
    first: np.ndarray
    """(G,) int64: sequence whose branch follows the tree's prompt."""
    num_shared: np.ndarray
    """(S,) int64: length of the prefix common to all responses of the sequence's tree."""

    @classmethod
    def of(
        cls, columns: EncodedColumns, micro_batch: MicroBatch, *, share_prompt: bool
    ) -> "_Trees":
        rows, num_sides = micro_batch.rows, columns.num_sides
        num_sequences = num_sides * len(rows)
        prompts = np.tile(micro_batch.prompts, num_sides)
        if not share_prompt:
            prompts = np.arange(num_sequences)
        _, first, trees = np.unique(prompts, return_index=True, return_inverse=True)
        return cls(
            prompts=columns.prompt.take(rows[first % len(rows)]),
            responses=columns.responses(rows),
            trees=trees,
            first=first,
            num_shared=np.tile(micro_batch.num_shared, num_sides),
        )

    @cached_property
    def others(self) -> np.ndarray:
        """(S - G,) int64: the sequences that are not first in their tree, tree by tree."""
        others = np.setdiff1d(np.arange(len(self.trees)), self.first)
        return others[np.argsort(self.trees[others], kind="stable")]

    @cached_property
    def num_skipped(self) -> np.ndarray:
        """(S,) int64: response tokens that are part of the trunk; 0 for a tree's first sequence."""
        num_skipped = self.num_shared.copy()
        num_skipped[self.first] = 0
        return num_skipped

    @cached_property
    def branches(self) -> Ranges:
        """(S,) response tokens in each sequence's own branch, in the columns' ids."""
        starts, lengths = self.responses
        return Ranges(starts + self.num_skipped, lengths - 1 - self.num_skipped)

    @cached_property
    def order(self) -> np.ndarray:
        """(G + S,) int64: order in the row of prompts (0 … G - 1) and branches (G … G + S - 1)."""
        num_trees = len(self.first)
        with_first = np.stack([np.arange(num_trees), num_trees + self.first], axis=1)
        return np.concatenate([with_first.ravel(), num_trees + self.others])

    @cached_property
    def pieces(self) -> Ranges:
        """(G + S,) prompts and branches in the order of the row, in the columns' ids."""
        return concatenate([self.prompts, self.branches]).take(self.order)

    @cached_property
    def places(self) -> tuple[Ranges, Ranges]:
        """Positions in the row of the (G,) prompts and of the (S,) branches."""
        starts = np.empty_like(self.order)
        starts[self.order] = offsets_of(self.pieces.lengths)[:-1]
        of_prompts, of_branches = np.split(starts, [len(self.first)])
        return (
            Ranges(of_prompts, self.prompts.lengths),
            Ranges(of_branches, self.branches.lengths),
        )

    @property
    def tokens(self) -> np.ndarray:
        """(T,) int64: the row's tokens, as indices into the columns' ids."""
        return self.pieces.flat()

    @property
    def positions(self) -> np.ndarray:
        """(T,) int64: position id of each token, its place in its own sequence."""
        of_prompts = np.zeros_like(self.first)
        of_branches = self.prompts.lengths[self.trees] + self.num_skipped
        starts = np.concatenate([of_prompts, of_branches])[self.order]
        return Ranges(starts, self.pieces.lengths).flat()

    @property
    def score_index(self) -> np.ndarray:
        """(N,) int64: position in the row that predicts each response token."""
        prompts, branches = self.places
        lengths = self.responses.lengths
        nth = Ranges(np.zeros_like(lengths), lengths).flat()
        # the preceding token is in the trunk until the branch has begun, then in the branch
        in_trunk = (prompts.starts + prompts.lengths)[self.trees] - 1
        in_branch = branches.starts - self.num_skipped - 1
        has_begun = nth > np.repeat(self.num_skipped, lengths)
        return nth + np.where(
            has_begun, np.repeat(in_branch, lengths), np.repeat(in_trunk, lengths)
        )

    @property
    def layout(self) -> SegmentLayout:
        """Attention pattern of the row."""
        prompts, branches = self.places
        starts = prompts.starts
        prompt_stops, branch_stops = starts + prompts.lengths, branches.starts + branches.lengths
        trunks = np.stack([starts[self.trees], prompt_stops[self.trees] + self.num_shared], axis=1)
        own = np.stack([branches.starts, branch_stops], axis=1)
        return _layout(
            plain=np.stack([starts, branch_stops[self.first]], axis=1),
            branches=own[self.others],
            prefixes=trunks[self.others],
        )


def _layout(*, plain: np.ndarray, branches: np.ndarray, prefixes: np.ndarray) -> SegmentLayout:
    """Build the layout from [start, stop) of plain segments, other branches and their prefixes."""
    # branches without tokens: responses of one token, or that add only the last one to the trunk
    kept = branches[:, 1] > branches[:, 0]
    branches, prefixes = branches[kept], prefixes[kept]
    own = np.concatenate([plain, branches])
    of = np.concatenate([np.zeros_like(plain), prefixes])
    lengths, prefix_lengths = own[:, 1] - own[:, 0], of[:, 1] - of[:, 0]
    keys = uses = None
    if len(branches):
        places = alternate(Ranges(of[:, 0], prefix_lengths), Ranges(own[:, 0], lengths)).flat()
        keys, uses = torch.from_numpy(places), _key_uses(places)
    return SegmentLayout(
        segments=tuple(Segment(*row) for row in np.concatenate([own, of], axis=1).tolist()),
        query_offsets=_cu_seqlens(lengths),
        key_offsets=_cu_seqlens(lengths + prefix_lengths),
        longest=int(lengths.max()),
        longest_keys=int((lengths + prefix_lengths).max()),
        keys=keys,
        uses=uses,
    )


def _key_uses(keys: np.ndarray) -> KeyUses:
    """Inverse of `keys`, (K,) positions in the row, each occurring at least once."""
    order = np.argsort(keys, kind="stable")
    counts = np.bincount(keys)
    rounds = np.arange(len(keys)) - np.repeat(offsets_of(counts)[:-1], counts)
    by_round = order[np.argsort(rounds, kind="stable")]
    first, places = np.split(by_round, [len(counts)])
    return KeyUses(
        first=torch.from_numpy(first),
        tokens=torch.from_numpy(keys[places]),
        places=torch.from_numpy(places),
        rounds=tuple(np.bincount(rounds)[1:].tolist()),
    )


def _empty_batch(pad_token_id: int) -> Batch:
    """One token that attends to itself and scores nothing."""
    nothing = np.zeros((0, 2), np.int64)
    empty = torch.zeros(0, dtype=torch.int64)
    return Batch(
        input_ids=torch.tensor([[pad_token_id]]),
        position_ids=torch.zeros((1, 1), dtype=torch.int64),
        layout=_layout(plain=np.array([[0, 1]]), branches=nothing, prefixes=nothing),
        score_index=empty,
        target=empty,
        token_weights=None,
        sequence_ids=empty,
        num_sequences=0,
    )


def _cu_seqlens(lengths: np.ndarray) -> torch.Tensor:
    return torch.from_numpy(offsets_of(lengths).astype(np.int32))
