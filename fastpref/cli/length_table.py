"""Token lengths of a split as a terminal table."""

import sys
from collections.abc import Sequence

from rich.console import Console
from rich.table import Table

from fastpref.cli.streams import printing_results
from fastpref.data.audit.lengths import Histogram

LEVELS = " ▁▂▃▄▅▆▇█"
LIMIT = "┃"


def show_lengths(split: str, lengths: Sequence[Histogram]) -> None:
    """Print histograms of the token lengths of a split, before truncation."""
    table = Table(title=f"{split}: tokens before anything is cut; {LIMIT} is the limit")
    for i, title in enumerate(
        ("", "rows by length", "median", "95 %", "longest", "limit", "too long")
    ):
        table.add_column(title, justify="left" if i < 2 else "right", no_wrap=i < 2)
    for histogram in lengths:
        table.add_row(
            histogram.name,
            draw(histogram),
            f"{histogram.median:,}",
            f"{histogram.most:,}",
            f"{histogram.longest:,}",
            f"{histogram.limit:,}",
            f"{100 * histogram.num_over / max(1, histogram.num_rows):.3g} %",
        )
    with printing_results():
        Console(file=sys.stdout, width=100).print(table)


def draw(histogram: Histogram) -> str:
    """One-line histogram: a block per bin, with `LIMIT` after the last bin within the limit."""
    highest = max(histogram.counts, default=0) or 1
    top = len(LEVELS) - 1
    # rounded up: a bin with a single row is visible
    blocks = [LEVELS[-(-count * top // highest)] for count in histogram.counts]
    if histogram.bins_within is not None:
        blocks.insert(histogram.bins_within, LIMIT)
    return "".join(blocks)
