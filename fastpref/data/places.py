"""File and line of every row, for messages."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

LINES = 2**40
"""Upper bound on the lines of a file: a row's number in its source is file index (from 0) * LINES
+ line (from 1), so in a source of one file it is the line."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Places:
    """Source and line of each row of a split."""

    sources: tuple[str, ...]
    """Files, or names of sources without files."""
    source: np.ndarray
    """(rows,) int64: index into `sources`."""
    line: np.ndarray
    """(rows,) int64: counted from 1 in a file of lines."""

    def name(self, row: int) -> str:
        """Place of a row, such as "words/train.jsonl:17"."""
        return f"{self.sources[self.source[row]]}:{self.line[row]}"


def place_of(files: Sequence[str], number: int) -> str:
    """Place such as "words/train.jsonl:17" of a row, from its number in a source of `files`."""
    return f"{files[number // LINES]}:{number % LINES}"


def places_of(files: Sequence[str], numbers: np.ndarray) -> Places:
    """Places of rows from their numbers in a source of `files`, (rows,) int64."""
    return Places(sources=tuple(files), source=numbers // LINES, line=numbers % LINES)


def join_places(parts: list[Places]) -> Places:
    """Concatenate the places of several sources."""
    offsets = np.cumsum([0, *(len(part.sources) for part in parts[:-1])])
    return Places(
        sources=tuple(source for part in parts for source in part.sources),
        source=np.concatenate(
            [p.source + offset for p, offset in zip(parts, offsets, strict=False)]
        ),
        line=np.concatenate([part.line for part in parts]),
    )
