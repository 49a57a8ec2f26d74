"""Log-probabilities of response tokens on disk, in shards, so that a killed run can resume."""

import hashlib
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from fastpref.batch import EncodedRow
from fastpref.complete_files import complete_file
from fastpref.errors import CheckpointError, is_out_of_memory
from fastpref.token_weights import token_digest

PairLogps = tuple[NDArray[np.float32], NDArray[np.float32]]
"""Per-token log-probabilities of one row's chosen and rejected response, in nats."""

logger = logging.getLogger("fastpref")


def num_tokens(row: EncodedRow) -> int:
    """Tokens of a row's sequences: prompt + chosen and prompt + rejected."""
    return 2 * len(row.prompt_ids) + len(row.chosen_ids) + len(row.rejected_ids)


def rows_digest(rows: Sequence[EncodedRow]) -> str:
    """Digest of the rows' token ids and loss masks, in order; independent of the file they come
    from."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(token_digest(row.prompt_ids, row.chosen_ids, row.rejected_ids).encode())
        for marks in (row.chosen_scored, row.rejected_scored):
            digest.update(b"all" if marks is None else bytes(marks))
    return digest.hexdigest()


@dataclass(frozen=True, slots=True, kw_only=True)
class Shards:
    """One model's log-probabilities of one source's rows, `rows_per_shard` rows per file.

    Rows are sorted by length, longest first: the rows of a batch are of similar length, memory
    peaks at the start, and the time left is over- rather than underestimated. The folder's name
    has a fingerprint of model, rows and settings, so shards of anything else are never found.
    """

    folder: Path
    rows: Sequence[EncodedRow]
    """In file order."""
    order: NDArray[np.int64]
    """(rows,) indices into `rows`, longest row first."""
    rows_per_shard: int

    @classmethod
    def of(cls, folder: Path, rows: Sequence[EncodedRow], rows_per_shard: int) -> "Shards":
        lengths = np.array([sum(map(len, row[:3])) for row in rows], dtype=np.int64)
        order = np.argsort(-lengths, kind="stable")
        return cls(folder=folder, rows=rows, order=order, rows_per_shard=rows_per_shard)

    def __len__(self) -> int:
        return -(-len(self.rows) // self.rows_per_shard)

    @property
    def longest(self) -> int:
        """Tokens in the longest sequence."""
        return max(
            len(ids.prompt_ids) + max(len(ids.chosen_ids), len(ids.rejected_ids))
            for ids in self.rows
        )

    def rows_of(self, shard: int) -> list[int]:
        """Indices into `rows` of a shard's rows, in scoring order."""
        start = shard * self.rows_per_shard
        return self.order[start : start + self.rows_per_shard].tolist()

    def num_tokens(self, shards: Sequence[int]) -> int:
        """Tokens in the sequences of the given shards, see the module's `num_tokens`."""
        return sum(num_tokens(self.rows[i]) for shard in shards for i in self.rows_of(shard))

    def missing(self) -> list[int]:
        """Indices of the shards that have no intact file."""
        return [shard for shard in range(len(self)) if self._load(shard) is None]

    def write(self, shard: int, logps: NDArray[np.float32]) -> None:
        """Save a shard: `logps` (tokens,), in nats, row by row, chosen before rejected."""
        with complete_file(self._path(shard), "wb") as file:
            # the archive holds checksums of its content
            np.savez(file, logps=logps)

    def read(self) -> list[PairLogps]:
        """Log-probabilities of all rows, in file order.

        Raises:
            CheckpointError: a shard is missing or damaged.
        """
        nothing = np.empty(0, np.float32)
        parts = [(nothing, nothing)] * len(self.rows)
        for shard in range(len(self)):
            logps = self._load(shard)
            if logps is None:
                raise CheckpointError(
                    f"{self._path(shard)} is not what was written; start again: it is scored anew"
                )
            start = 0
            for i in self.rows_of(shard):
                middle = start + len(self.rows[i].chosen_ids)
                end = middle + len(self.rows[i].rejected_ids)
                parts[i] = (logps[start:middle], logps[middle:end])
                start = end
        return parts

    def _path(self, shard: int) -> Path:
        return self.folder / f"{shard:06d}.npz"

    def _load(self, shard: int) -> NDArray[np.float32] | None:
        """A shard's log-probabilities; None where the file is missing or damaged."""
        path = self._path(shard)
        if not path.is_file():
            return None
        expected = sum(
            len(self.rows[i].chosen_ids) + len(self.rows[i].rejected_ids)
            for i in self.rows_of(shard)
        )
        try:
            with np.load(path, allow_pickle=False) as file:
                logps: NDArray[np.float32] = file["logps"]
            if logps.shape != (expected,):
                raise ValueError(f"{logps.shape} numbers, expected {expected}")
        # a damaged archive may raise any exception
        except Exception as error:
            if is_out_of_memory(error):
                raise
            logger.warning("%s is damaged and scored again: %s", path, error)
            return None
        return logps
