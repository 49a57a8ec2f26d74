"""Cache of log-probabilities under one model, keyed by the rows' tokens, in memory and on disk."""

import hashlib
import json
import logging
import time
import uuid
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from fastpref.batches.columns import EncodedColumns, Ranges, alternate
from fastpref.complete_files import complete_file, share, writing
from fastpref.errors import is_out_of_memory

logger = logging.getLogger("fastpref")

ABOUT = "about.json"
"""File beside the cache files that tells people what they belong to."""
DIGEST_BYTES = 16

ScoredRow = tuple[bytes, NDArray[np.float32]]
"""Digest of the row's tokens; log-probabilities of its response tokens: chosen, then rejected."""


class RowCache:
    """Per-token log-probabilities of rows under one model, shared by all runs that score it.

    Rows are keyed by a digest of their tokens, so a new run has to score only rows that are new,
    or that its options truncate differently. Several processes may write at once; of a row that
    was written twice the older numbers count.

    Args:
        folder: The model's cache folder; it need not exist yet.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._values: dict[bytes, NDArray[np.float32]] = {}
        self._unsaved: list[ScoredRow] = []

    def files(self) -> list[str]:
        """Names of the cache files in the folder, oldest first."""
        return sorted(path.name for path in self.folder.glob("*.npz"))

    def read(self, names: Sequence[str], wanted: set[bytes]) -> None:
        """Load the wanted rows from cache files; a damaged file is skipped with a warning."""
        for name in names:
            for digest, logps in _read(self.folder / name):
                if digest in wanted and digest not in self._values:
                    # not a view, which would keep the whole file in memory
                    self._values[digest] = logps.copy()

    def __len__(self) -> int:
        return len(self._values)

    def __contains__(self, digest: bytes) -> bool:
        return digest in self._values

    def beside(self, columns: EncodedColumns) -> EncodedColumns:
        """Rows with their cached log-probabilities as `reference_logps`; all must be cached."""
        logps = np.zeros(len(columns.ids), np.float32)
        values = [self._values[digest] for digest in row_digests(columns)]
        logps[_responses(columns).flat()] = np.concatenate(values)
        return replace(columns, reference_logps=logps)

    def add(self, columns: EncodedColumns, logps: NDArray[np.float32]) -> None:
        """Add scored rows; rows that are already cached keep their numbers.

        Args:
            columns: The rows.
            logps: Parallel to `columns.ids`, in nats; values at prompt tokens are ignored.
        """
        lengths = columns.chosen.lengths + columns.rejected.lengths
        of_rows = np.split(logps[_responses(columns).flat()], np.cumsum(lengths)[:-1])
        for digest, values in zip(row_digests(columns), of_rows, strict=True):
            if digest not in self._values:
                self._values[digest] = values.copy()
                self._unsaved.append((digest, self._values[digest]))

    @property
    def num_unsaved(self) -> int:
        """Rows not yet written to disk."""
        return len(self._unsaved)

    def take_unsaved(self) -> list[ScoredRow]:
        """Return the unsaved rows and count them as saved."""
        unsaved, self._unsaved = self._unsaved, []
        return unsaved

    def write(self, rows: Sequence[ScoredRow], about: dict[str, Any]) -> None:
        """Write rows, at least one, to a new file; called by one process of a run.

        Raises:
            CheckpointError: the file cannot be written.
        """
        name = f"{time.time_ns():020d}-{uuid.uuid4().hex[:8]}"
        with _open(self.folder):
            with complete_file(self.folder / f"{name}.npz", "wb") as file:
                np.savez(
                    file,
                    digests=np.frombuffer(b"".join(digest for digest, _ in rows), np.uint8),
                    lengths=np.array([len(logps) for _, logps in rows]),
                    logps=np.concatenate([logps for _, logps in rows]),
                )
            if not (self.folder / ABOUT).is_file():
                with writing(self.folder):
                    # under a unique name: another run may be writing the file right now
                    partial = self.folder / f"{name}.partial"
                    partial.write_text(json.dumps(about, indent=2) + "\n", encoding="utf-8")
                    partial.replace(self.folder / ABOUT)


def _open(folder: Path) -> IO[str]:
    """Create the folder and take its shared lock, see `share`.

    Raises:
        CheckpointError: the folder cannot be written to.
    """
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        return share(folder, "*.partial")


def _read(path: Path) -> list[ScoredRow]:
    """Rows of a cache file; none, with a warning, if checksums or sizes do not match."""
    try:
        with np.load(path, allow_pickle=False) as file:
            digests, lengths, logps = (file[name] for name in ("digests", "lengths", "logps"))
        ends = np.cumsum(lengths)
        if digests.size != DIGEST_BYTES * len(lengths) or ends[-1] != len(logps):
            raise ValueError(f"{digests.size} bytes of digests, {len(logps)} numbers")
    # a damaged archive may raise any exception
    except Exception as error:
        if is_out_of_memory(error):
            raise
        logger.warning("%s is damaged and passed over, it may be deleted: %s", path, error)
        return []
    named = digests.tobytes()
    names = (named[i : i + DIGEST_BYTES] for i in range(0, len(named), DIGEST_BYTES))
    return list(zip(names, np.split(logps, ends[:-1]), strict=True))


def row_digests(columns: EncodedColumns) -> list[bytes]:
    """Key of each row: a digest of its token ids and, where not all response tokens are scored, of
    its scoring mask."""
    parts = (columns.prompt, columns.chosen, columns.rejected)
    ids = columns.ids.astype("<i4")
    starts = np.stack([part.starts for part in parts], axis=1)
    lengths = np.stack([part.lengths for part in parts], axis=1).astype("<i8")
    stops = (starts + lengths).tolist()
    digests = []
    for of_row, (begin, end) in enumerate(zip(starts.tolist(), stops, strict=True)):
        # lengths first, so that moving a token from one part to the next changes the digest
        digest = hashlib.blake2b(lengths[of_row].tobytes(), digest_size=DIGEST_BYTES)
        for start, stop in zip(begin, end, strict=True):
            digest.update(ids[start:stop].tobytes())
        if columns.scored is not None:
            marks = [columns.scored[slice(*side)] for side in zip(begin[1:], end[1:], strict=True)]
            if not all(side.all() for side in marks):
                digest.update(b"".join(side.tobytes() for side in marks))
        digests.append(digest.digest())
    return digests


def _responses(columns: EncodedColumns) -> Ranges:
    """Ranges of the responses in `ids`, row by row: chosen, then rejected."""
    return alternate(columns.chosen, columns.rejected)
