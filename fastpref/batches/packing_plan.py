"""Assignment of an optimizer step's rows to packed micro-batches, and the prefixes shared there.

A pure function of the step's rows, the token limit and the number of ranks: every rank computes
the same plan without communication.
"""

import heapq
from typing import NamedTuple

import numpy as np

from fastpref.batches.columns import EncodedColumns, Ranges, offsets_of
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
    """Divide a step's rows into balanced micro-batches, as few as the token limit allows.

    Rows with the same prompt form a piece if a micro-batch can hold them. Pieces are assigned,
    longest first, to the micro-batch with the fewest tokens so far (LPT): the largest is at most a
    third above the optimum (Graham 1969).

    Args:
        max_tokens: Maximum tokens per micro-batch; a longer pair gets a micro-batch of its own.
        num_ranks: Data-parallel ranks.
        min_micro_batches: Minimum number of micro-batches per rank.
        share_prompt: Whether responses share the computation of their prompt.
        among_rows: Whether responses of different rows do as well.
    """
    prompts, num_shared = find_shared(columns, share_prompt=share_prompt, among_rows=among_rows)
    trunk_tokens = columns.prompt.lengths + num_shared
    branch_tokens = columns.branch_tokens - columns.num_sides * num_shared
    if not share_prompt and columns.has_pairs:
        # the rejected sequence has its own copy of the prompt
        branch_tokens = branch_tokens + columns.prompt.lengths
    _, first = np.unique(prompts, return_index=True)
    fewest = int(trunk_tokens[first].sum() + branch_tokens.sum())
    # at most one micro-batch per row, even if rows exceed the limit
    needed = min(-(-fewest // max_tokens), len(columns))
    num_micro_batches = max(min_micro_batches, -(-needed // num_ranks))
    while True:
        num_bins = num_micro_batches * num_ranks
        # limit pieces to 4/3 of the average: all ranks would wait for a larger one
        pieces = _pieces(
            prompts, trunk_tokens, branch_tokens, min(max_tokens, 4 / 3 * fewest / num_bins)
        )
        bins = _fill(pieces, num_bins, num_shared)
        if num_bins >= len(pieces) or bins[0].num_tokens <= max_tokens:
            break
        num_micro_batches += 1
    # bins are sorted: ranks get bins of similar size together and wait least for each other
    return [bins[i : i + num_ranks] for i in range(0, num_bins, num_ranks)]


class _Piece(NamedTuple):
    """Rows with the same prompt that are assigned to a micro-batch together."""

    prompt: int
    trunk_tokens: int
    """Tokens of the prompt and of the prefix common to its responses."""
    num_tokens: int
    """Tokens of the trunk and of all branches."""
    rows: list[int]


def find_shared(
    columns: EncodedColumns, *, share_prompt: bool, among_rows: bool
) -> tuple[np.ndarray, np.ndarray]:
    """Each row's prompt number, equal for rows that share a prompt, and the length of the prefix
    common to all responses to it. Both (rows,) int64; options as in `plan_step`."""
    prompts = np.arange(len(columns))
    if not share_prompt or not len(columns):
        return prompts, np.zeros_like(prompts)
    if among_rows:
        prompts = _equal_prompts(columns)
    return prompts, _count_shared(columns, prompts)


def _equal_prompts(columns: EncodedColumns) -> np.ndarray:
    """(rows,) int64 prompt numbers in order of first appearance; equal token ids, equal number."""
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


def _count_shared(columns: EncodedColumns, prompts: np.ndarray) -> np.ndarray:
    """(rows,) int64 length of the prefix common to all responses to a row's prompt.

    It never includes the last token of a response, which is not an input of the model.
    """
    responses = columns.responses(np.arange(len(columns)))
    _, leaders, groups = np.unique(
        np.tile(prompts, columns.num_sides), return_index=True, return_inverse=True
    )
    first = responses.take(leaders).take(groups)
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
    """Group rows by prompt; a group that would exceed `limit` tokens continues in a new piece."""
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
    """Assign the pieces to `num_bins` micro-batches; returns the largest micro-batch first."""
    contents: list[list[_Piece]] = [[] for _ in range(num_bins)]
    loads = [(0, i) for i in range(num_bins)]
    # ties in the order of the rows, to be deterministic
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
        # pieces of one prompt in the same micro-batch share the trunk again
        num_tokens += piece.num_tokens
        num_tokens -= piece.trunk_tokens if piece.prompt in by_prompt else 0
        by_prompt.setdefault(piece.prompt, []).extend(piece.rows)
    rows = np.array([row for rows in by_prompt.values() for row in rows], np.int64)
    prompts = np.repeat(np.arange(len(by_prompt)), [len(rows) for rows in by_prompt.values()])
    return MicroBatch(rows, prompts, num_shared[rows], num_tokens)
