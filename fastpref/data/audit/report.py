"""Contents of `audit.html` for each split: account, length histograms, selected rows."""

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import datasets
import numpy as np
import pyarrow.compute as pc

from fastpref.data.audit.lengths import Histogram, measure_lengths
from fastpref.data.audit.shown_rows import RowView, ShownRow
from fastpref.data.counts import AuditCounts, format_audit
from fastpref.data.encode import PreferenceSplit, encode_source, options_of_source
from fastpref.data.encode_row import EncodeOptions
from fastpref.data.remarks import Remark
from fastpref.data.selection import COPY
from fastpref.data.source import Rows

FIRST_ROWS = 3
"""Number of first rows shown of a split, divided among its sources; at least one of each."""
CUTS = {
    Remark.PROMPT_CUT: "first one with its prompt cut",
    Remark.CHOSEN_CUT | Remark.REJECTED_CUT: "first one with a response cut",
}


class SplitReport(NamedTuple):
    """The report on one split."""

    counts: AuditCounts
    facts: list[str]
    warnings: list[str]
    """`counts` as messages, see `format_audit`."""
    lengths: list[Histogram]
    rows: list[ShownRow]


def report_split(
    split: PreferenceSplit, parts: Sequence[Rows], tokenizer: Any, options: EncodeOptions
) -> SplitReport:
    """Build the report on an encoded split.

    Args:
        split: The encoded split, for its account.
        parts: The checked rows of each source; their encoding is taken from the cache.
        tokenizer, options: As used for encoding.
    """
    encoded = [encode_source(rows, tokenizer, options) for rows in parts]
    facts, warnings = format_audit(split.audit)
    shown = list[ShownRow]()
    num_first = -(-FIRST_ROWS // len(parts))
    for rows, (checked, outcomes) in zip(parts, encoded, strict=True):
        view = RowView(tokenizer, options_of_source(rows, tokenizer, options), rows.location.files)
        places = _pick_rows(checked, outcomes, num_first)
        shown += [view.show(checked[place], labels) for place, labels in places.items()]
        shown += [
            view.show(rows.dropped[place], ("left out",), drop=reason)
            for reason, place in _first_dropped(rows.dropped)
        ]
    lengths = measure_lengths([outcomes for _, outcomes in encoded], options)
    return SplitReport(split.audit, facts, warnings, lengths, shown)


def _pick_rows(
    checked: datasets.Dataset, outcomes: datasets.Dataset, num_first: int
) -> dict[int, tuple[str, ...]]:
    """Select rows to show: row index -> labels that say why."""
    table = outcomes.with_format("arrow")[:]
    drop = np.array(table["drop"].to_pylist(), object)
    remarks = table["remarks"].to_numpy()
    is_kept = drop == ""
    labels: dict[int, list[str]] = {}

    def pick(is_candidate: np.ndarray, label: str) -> None:
        if is_candidate.any():
            labels.setdefault(int(np.argmax(is_candidate)), []).append(label)

    for number, place in enumerate(np.flatnonzero(is_kept)[:num_first].tolist(), start=1):
        labels[place] = ["first row" if number == 1 else f"row {number} of those that stay"]
    longest = np.array([sum(row) for row in table["lengths"].to_pylist()])
    pick(is_kept & (longest == longest[is_kept].max(initial=0)), "longest")
    for remark, label in CUTS.items():
        pick(is_kept & (remarks & remark != 0), label)
    weighted = pc.is_valid(checked.with_format("arrow")[:]["chosen_weights"]).to_numpy()
    pick(is_kept & weighted, "first one with token weights")
    for reason in dict.fromkeys(drop[~is_kept].tolist()):
        pick(drop == reason, "left out")
    return {place: tuple(labels[place]) for place in sorted(labels)}


def _first_dropped(dropped: datasets.Dataset) -> Iterator[tuple[str, int]]:
    """For each reason why rows were dropped before encoding, the index of the first such row."""
    reasons = [reason or COPY for reason in dropped["drop"][:]]
    for reason in dict.fromkeys(reasons):
        yield reason, reasons.index(reason)
