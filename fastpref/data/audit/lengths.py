"""Histograms of the token lengths of a split, before truncation."""

from collections.abc import Sequence
from typing import NamedTuple

import datasets
import numpy as np
import pyarrow.compute as pc

from fastpref.data.encode_row import EncodeOptions

MOST_BINS = 30
SHOWN_SHARE = 0.995
"""Quantile of the lengths that the bins cover; longer rows count in the last bin."""
FAR = 3
"""A limit above this multiple of the longest row is not shown."""


class Histogram(NamedTuple):
    """Distribution of one length, in tokens, over the rows of a split."""

    name: str
    """The measured part: prompt, a response, or the sequence."""
    counts: list[int]
    """Rows per bin; the last bin includes all longer ones."""
    edges: list[int]
    """(bins + 1,): bin i has lengths from edges[i] + 1 to edges[i + 1]; the first includes 0."""
    median: int
    most: int
    """95 % quantile."""
    longest: int
    limit: int
    """Limit in tokens, to which it is cut in a row that is too long."""
    limit_name: str
    """The option, or expression of options, that sets `limit`."""
    num_over: int
    """Rows that are longer than the limit and cut for it: a prompt over its own limit stays whole
    if the sequence is within `max_length`."""
    num_rows: int

    @property
    def bins_within(self) -> int | None:
        """Number of bins up to the limit; None if the limit is not an edge of the bins."""
        return self.edges.index(self.limit) if self.limit in self.edges else None


def measure_lengths(encoded: Sequence[datasets.Dataset], options: EncodeOptions) -> list[Histogram]:
    """Histograms of prompt, response and sequence lengths with their limits.

    Args:
        encoded: The encoded rows of each source, including those dropped as too long.
        options: Gives the limits.
    """
    parts = [dataset.with_format("arrow")[:]["lengths"] for dataset in encoded]
    # empty for a row dropped before tokenization
    columns = 2 if options.sft else 3
    flat = np.concatenate([pc.list_flatten(part).to_numpy() for part in parts])
    lengths = flat.reshape(-1, columns).astype(np.int64)
    prompt, responses = lengths[:, 0], lengths[:, 1:]
    names = ("response",) if options.sft else ("chosen", "rejected")
    response_limit, response_limit_name = options.max_length, "max_length"
    if options.truncation == "seed":
        response_limit -= options.max_prompt_length
        response_limit_name = "max_length - max_prompt_length"
    sequence = prompt + responses.max(axis=1)
    is_long = sequence > options.max_length
    # too long even after the prompt is cut: only then are responses cut
    is_still_long = is_long
    if options.truncation == "seed":
        cut = np.minimum(prompt, options.max_prompt_length)
        is_still_long = is_long & (cut + responses.max(axis=1) > options.max_length)
    return [
        _histogram("prompt", prompt, options.max_prompt_length, "max_prompt_length", is_long),
        *(
            _histogram(name, values, response_limit, response_limit_name, is_still_long)
            for name, values in zip(names, responses.T, strict=True)
        ),
        _histogram(
            "sequence" if options.sft else "longer sequence",
            sequence,
            options.max_length,
            "max_length",
        ),
    ]


def _histogram(
    name: str,
    values: np.ndarray,
    limit: int,
    limit_name: str,
    is_cut: np.ndarray | bool = True,
) -> Histogram:
    """Histogram of one length per row; rows count as over the limit only where `is_cut`."""
    longest = int(values.max(initial=1))
    # the few longer rows would compress the histogram of all others
    end = max(1, _quantile(values, SHOWN_SHARE))
    is_near = limit <= FAR * longest
    width = _round_width(max(end, limit if is_near else 1))
    # make the limit an edge, so that no bin straddles it
    first = limit % width if is_near else 0
    edges = np.arange(first, max(end, limit if is_near else 0) + width, width)
    edges = np.concatenate([[0], edges[edges > 0]])
    places = np.searchsorted(edges, values.clip(1, edges[-1])) - 1
    return Histogram(
        name=name,
        counts=np.bincount(places, minlength=len(edges) - 1).tolist(),
        edges=edges.tolist(),
        median=_quantile(values, 0.5),
        most=_quantile(values, 0.95),
        longest=longest,
        limit=limit,
        limit_name=limit_name,
        num_over=int(((values > limit) & is_cut).sum()),
        num_rows=len(values),
    )


def _quantile(values: np.ndarray, share: float) -> int:
    return int(np.quantile(values, share, method="higher")) if len(values) else 0


def _round_width(end: int) -> int:
    """Smallest width of 1, 2 or 5 times a power of ten with which `MOST_BINS` bins cover `end`."""
    width = 1
    while end / width > MOST_BINS:
        leading = int(str(width)[0])
        width = width * 5 // 2 if leading == 2 else width * 2
    return width
