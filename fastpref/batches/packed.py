"""Packing: the rows of an optimizer step -> packed micro-batches under a token budget.

Pairs that have the same prompt ids share it: the prompt is computed once, and so are the tokens
that all its responses begin with; every response goes on from there as a branch. Which rows meet in
a micro-batch is a pure function of the step's rows, the budget and the number of ranks, so every
rank plans the same step without a word to the others.
"""

import heapq
from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch

from fastpref.batch import Batch, EncodedRow, KeyUses, Segment, SegmentLayout
from fastpref.batches.columns import EncodedColumns, Ranges, alternate, concatenate, offsets_of
from fastpref.batches.plan import MicroBatch, StepPlan


def plan_step(
    columns: EncodedColumns,
    *,
    max_tokens: int,
    num_ranks: int = 1,
    min_micro_batches: int = 1,
    share_prompt: bool = True,
    among_rows: bool = True,
) -> StepPlan:
    """Divide a step's rows among micro-batches and ranks: as few as the budget allows, balanced.

    Rows with one prompt stay together where a micro-batch can hold them. The pieces go, longest
    first, to whichever micro-batch has least so far, which leaves the largest at most a third
    above the best division (Graham 1969).

    Args:
        max_tokens: Most tokens of a micro-batch; a pair that has more gets one of its own.
        num_ranks: Ranks that share the step.
        min_micro_batches: Micro-batches of a rank, at least.
        share_prompt: Whether responses may share a prompt.
        among_rows: Whether those of several rows may.
    """
    prompts = _prompts(columns, among_rows=share_prompt and among_rows)
    num_shared = _count_shared(columns, prompts, share_prompt=share_prompt)
    trunk_tokens = columns.prompt.lengths + num_shared
    branch_tokens = columns.branch_tokens - columns.num_sides * num_shared
    if not share_prompt and columns.has_pairs:
        # the second sequence's copy of the prompt
        branch_tokens = branch_tokens + columns.prompt.lengths
    _, first = np.unique(prompts, return_index=True)
    fewest = int(trunk_tokens[first].sum() + branch_tokens.sum())
    # rows that are longer than a micro-batch may be are no reason for one without rows
    needed = min(-(-fewest // max_tokens), len(columns))
    num_micro_batches = max(min_micro_batches, -(-needed // num_ranks))
    while True:
        num_bins = num_micro_batches * num_ranks
        # a piece far above the average would make all ranks wait for its own
        pieces = _pieces(
            prompts, trunk_tokens, branch_tokens, min(max_tokens, 4 / 3 * fewest / num_bins)
        )
        bins = _fill(pieces, num_bins, num_shared)
        if num_bins >= len(pieces) or bins[0].num_tokens <= max_tokens:
            break
        num_micro_batches += 1
    # the largest make up the first micro-batch, and so on: ranks wait for each other least
    return [bins[i : i + num_ranks] for i in range(0, num_bins, num_ranks)]


class _Piece(NamedTuple):
    """Rows of one prompt that stay together."""

    prompt: int
    trunk_tokens: int
    """Prompt and what its responses begin with."""
    num_tokens: int
    """Trunk and branches."""
    rows: list[int]


def _prompts(columns: EncodedColumns, *, among_rows: bool) -> np.ndarray:
    """(rows,) numbers, equal for rows that share a prompt."""
    return _equal_prompts(columns) if among_rows else np.arange(len(columns))


def _equal_prompts(columns: EncodedColumns) -> np.ndarray:
    """(rows,) number of each row's prompt, by first appearance; equal ids, equal number."""
    starts = columns.prompt.starts.tolist()
    stops = (columns.prompt.starts + columns.prompt.lengths).tolist()
    numbers: dict[bytes, int] = {}
    return np.array(
        [
            numbers.setdefault(columns.ids[start:stop].tobytes(), len(numbers))
            for start, stop in zip(starts, stops, strict=True)
        ],
        dtype=np.int64,
    )


def _count_shared(
    columns: EncodedColumns, prompts: np.ndarray, *, share_prompt: bool
) -> np.ndarray:
    """(rows,) tokens that all responses to a row's prompt begin with, short of a last one."""
    num_shared = np.zeros(len(columns), np.int64)
    if not share_prompt or not len(columns):
        return num_shared
    responses = columns.responses(np.arange(len(columns)))
    _, leaders, groups = np.unique(
        np.tile(prompts, columns.num_sides), return_index=True, return_inverse=True
    )
    first = responses.take(leaders).take(groups)
    # the last token of a response is not computed
    lengths = np.minimum(responses.lengths, first.lengths) - 1
    ids = columns.ids
    differs = (
        ids[Ranges(responses.starts, lengths).flat()] != ids[Ranges(first.starts, lengths).flat()]
    )
    offsets = offsets_of(lengths)
    differences = np.append(np.flatnonzero(differs), len(differs))
    until = differences[np.searchsorted(differences, offsets[:-1])] - offsets[:-1]
    of_groups = lengths[leaders]
    np.minimum.at(of_groups, groups, np.minimum(until, lengths))
    return of_groups[groups[: len(columns)]]


def _pieces(
    prompts: np.ndarray, trunk_tokens: np.ndarray, branch_tokens: np.ndarray, limit: float
) -> list[_Piece]:
    """Rows by prompt, cut where a piece would pass the limit; a row is never cut."""
    pieces: list[_Piece] = []
    order = np.argsort(prompts, kind="stable")
    for row, prompt, of_trunk, of_branches in zip(
        order.tolist(),
        prompts[order].tolist(),
        trunk_tokens[order].tolist(),
        branch_tokens[order].tolist(),
        strict=True,
    ):
        last = pieces[-1] if pieces else None
        if last and last.prompt == prompt and last.num_tokens + of_branches <= limit:
            last.rows.append(row)
            pieces[-1] = last._replace(num_tokens=last.num_tokens + of_branches)
        else:
            pieces.append(_Piece(prompt, of_trunk, of_trunk + of_branches, [row]))
    return pieces


def _fill(pieces: list[_Piece], num_bins: int, num_shared: np.ndarray) -> list[MicroBatch]:
    """The pieces in `num_bins` micro-batches, largest micro-batch first."""
    contents: list[list[_Piece]] = [[] for _ in range(num_bins)]
    loads = [(0, i) for i in range(num_bins)]
    # equal sizes in the order of their rows: nothing is left to chance
    for piece in sorted(pieces, key=lambda piece: (-piece.num_tokens, piece.rows[0])):
        load, i = loads[0]
        heapq.heapreplace(loads, (load + piece.num_tokens, i))
        contents[i].append(piece)
    batches = [_micro_batch(content, num_shared) for content in contents]
    return sorted(batches, key=lambda batch: -batch.num_tokens)


def _micro_batch(pieces: list[_Piece], num_shared: np.ndarray) -> MicroBatch:
    by_prompt: dict[int, list[int]] = {}
    num_tokens = 0
    for piece in sorted(pieces, key=lambda piece: piece.rows[0]):
        # two pieces of one prompt that meet again share it after all
        num_tokens += piece.num_tokens
        num_tokens -= piece.trunk_tokens if piece.prompt in by_prompt else 0
        by_prompt.setdefault(piece.prompt, []).extend(piece.rows)
    rows = np.array([row for rows in by_prompt.values() for row in rows], np.int64)
    prompts = np.repeat(np.arange(len(by_prompt)), [len(rows) for rows in by_prompt.values()])
    return MicroBatch(rows, prompts, num_shared[rows], num_tokens)


def pack_rows(
    rows: Sequence[EncodedRow],
    *,
    pad_token_id: int,
    share_prompt: bool = True,
    among_rows: bool = True,
) -> Batch:
    """Lay P rows out as one packed row, in their order.

    Args:
        rows: P encoded rows, all with a rejected response or all without.
        pad_token_id: The only token of a batch without rows, which scores nothing.
        share_prompt: Compute equal prompts, and what their responses begin with, once.
        among_rows: Those of several rows as well.
    """
    columns = EncodedColumns.of_rows(rows)
    prompts = _prompts(columns, among_rows=share_prompt and among_rows)
    num_shared = _count_shared(columns, prompts, share_prompt=share_prompt)
    batch = MicroBatch(np.arange(len(rows)), prompts, num_shared, 0)
    return pack(columns, batch, pad_token_id=pad_token_id, share_prompt=share_prompt)


def pack(
    columns: EncodedColumns, micro_batch: MicroBatch, *, pad_token_id: int, share_prompt: bool
) -> Batch:
    """Lay the rows of a micro-batch out as one packed row.

    Args:
        micro_batch: Which of them, and which of those share a prompt.
        pad_token_id: The only token of a micro-batch without rows, which scores nothing.
        share_prompt: False gives every sequence its own copy of its prompt.
    """
    rows = micro_batch.rows
    if not len(rows):
        return _empty_batch(pad_token_id)
    responses = columns.responses(rows)
    S = len(responses.lengths)
    prompts = np.tile(micro_batch.prompts, columns.num_sides) if share_prompt else np.arange(S)
    # a prompt is that of its first sequence, and this one is the branch that follows it
    _, leaders, groups = np.unique(prompts, return_index=True, return_inverse=True)
    others = np.setdiff1d(np.arange(S), leaders)
    others = others[np.argsort(groups[others], kind="stable")]
    of_prompts = columns.prompt.take(rows[leaders % len(rows)])
    # what other branches begin with is computed in the first one
    num_shared = np.tile(micro_batch.num_shared, columns.num_sides)
    num_skipped = num_shared.copy()
    num_skipped[leaders] = 0
    # pieces of the row: prompt, first branch, prompt, first branch, …, then the other branches;
    # the last token of a response predicts nothing and is left out
    branches = Ranges(responses.starts + num_skipped, responses.lengths - 1 - num_skipped)
    sources = concatenate([alternate(of_prompts, branches.take(leaders)), branches.take(others)])
    offsets = offsets_of(sources.lengths)
    of_plain = 2 * len(leaders)
    prompt_starts, prompt_stops = offsets[0:of_plain:2], offsets[1:of_plain:2]
    of_pieces = np.stack([np.zeros_like(prompt_starts), of_prompts.lengths], axis=1).ravel()
    of_others = of_prompts.lengths[groups[others]] + num_shared[others]
    positions = np.concatenate([of_pieces, of_others])
    branch_starts = np.empty(S, np.int64)
    branch_starts[leaders], branch_starts[others] = prompt_stops, offsets[of_plain:-1]
    score_index = Ranges(branch_starts - 1 - num_skipped, responses.lengths).flat()
    # up to a branch's first token the predicting ones lie in the prompt and in the first branch
    of_trunks = Ranges(prompt_stops[groups] - 1, num_shared + 1)
    places = of_trunks._replace(starts=offsets_of(responses.lengths)[:-1])
    score_index[places.flat()] = of_trunks.flat()
    trunks = np.stack([prompt_starts[groups], prompt_stops[groups] + num_shared], axis=1)
    return Batch(
        input_ids=torch.from_numpy(columns.ids[sources.flat()])[None],
        position_ids=torch.from_numpy(Ranges(positions, sources.lengths).flat())[None],
        layout=_layout(
            plain=np.stack([prompt_starts, offsets[2 : of_plain + 1 : 2]], axis=1),
            branches=np.stack([offsets[of_plain:-1], offsets[of_plain + 1 :]], axis=1),
            prefixes=trunks[others],
        ),
        score_index=torch.from_numpy(score_index),
        target=columns.targets(rows),
        in_loss=columns.in_loss(rows),
        token_weights=columns.token_weights(rows),
        sequence_ids=torch.from_numpy(np.repeat(np.arange(S), responses.lengths)),
        num_sequences=S,
    )


def _layout(*, plain: np.ndarray, branches: np.ndarray, prefixes: np.ndarray) -> SegmentLayout:
    """Segments from [start, stop) of plain segments, of further branches and of their prefixes."""
    # of a response of one token, or that ends as another one does, nothing is computed
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
    """Where each token of the row stands in `keys`, (K,) positions that name each at least once."""
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
