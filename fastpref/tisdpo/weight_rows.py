"""A weights file: what is known before it is written, and how it is written."""

import hashlib
import json
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from fastpref.batch import EncodedRow
from fastpref.complete_files import complete_file, writing
from fastpref.data.chat_date import read_date
from fastpref.data.counts import AuditCounts
from fastpref.data.layouts.row_values import json_text
from fastpref.data.source import Rows
from fastpref.data.weights_file import WeightsOrigin, read_origin, write_origin
from fastpref.distributed import World
from fastpref.errors import DataError
from fastpref.scoring.shards import Shards
from fastpref.token_weights import token_digest
from fastpref.train.run_folder import locked

DATE_FILE = "date"
"""File among a source's shards with the date given to the chat template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceJob:
    """One weights file to write."""

    rows: Rows
    path: Path
    encoded: Sequence[EncodedRow]
    """Tokens of its rows without a template."""
    counts: AuditCounts
    shards: dict[str, Shards]
    """Log-probabilities of each model, by label: positive, negative."""
    origin: WeightsOrigin
    """Contents of the sidecar to write."""

    def is_finished(self) -> bool:
        """Whether the file exists with exactly these weights."""
        origin = known_origin(self.path)
        return (
            origin is not None
            and self.path.is_file()
            and origin.fingerprint == self.origin.fingerprint
            and origin.size_bytes == self.path.stat().st_size
            # last, as it reads the whole source again
            and origin.records == records_digest(self.rows)
        )

    def keep_date(self) -> None:
        """Write down the date, so that a run resumed on another day renders the same prompts."""
        if self.origin.chat_date is not None:
            with complete_file(shards_folder(self.path) / DATE_FILE) as file:
                file.write(self.origin.chat_date)

    def drop_remains(self) -> None:
        """Remove what a kill has left beside a finished file: shards, and incomplete files."""
        for name in (f"{self.path.name}.complete", f"{self.path.name}.complete.partial"):
            self.path.with_name(name).unlink(missing_ok=True)
        for shards in self.shards.values():
            shutil.rmtree(shards.folder, ignore_errors=True)
        folder = shards_folder(self.path)
        # shards of other models or settings stay, to be resumed
        if folder.is_dir() and {path.name for path in folder.iterdir()} <= {DATE_FILE}:
            shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def writing_alone(paths: Sequence[Path], world: World) -> Iterator[None]:
    """While entered, the folders of these weights files are locked against other processes.

    Raises:
        ConfigError: another process writes there.
        CheckpointError: a folder cannot be created.
    """

    def make(folder: Path) -> None:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)

    with ExitStack() as locks:
        for folder in dict.fromkeys(path.parent for path in paths):
            world.on_main(partial(make, folder))
            locks.enter_context(locked(folder, world, key="weights.output_dir"))
        yield


def shards_folder(path: Path) -> Path:
    """The folder of a weights file's shards until the file is written."""
    return path.with_name(f"{path.stem}.shards")


def known_origin(path: Path) -> WeightsOrigin | None:
    """The sidecar of a weights file; None if it is missing or damaged: the file is then estimated
    again."""
    try:
        return read_origin(path)
    except DataError:
        return None


def written_date(path: Path) -> str:
    """The date given to the chat template for a written weights file; "" if none is known."""
    origin = known_origin(path)
    return origin.chat_date or "" if origin else ""


def begun_date(path: Path) -> str:
    """The date kept with the shards of a weights file that was begun; "" if none was."""
    noted = shards_folder(path) / DATE_FILE
    return read_date(noted) if noted.is_file() else ""


def write_weights(job: SourceJob, decimals: int | None) -> None:
    """Write the source's records with their weights, and the file's sidecar; delete the shards.

    The old file is deleted before the new sidecar is written, so a file never has another's.

    Raises:
        DataError: the source has changed since it was read.
    """
    good, bad = (job.shards[label].read() for label in ("positive", "negative"))
    complete, digest = job.path.with_name(f"{job.path.name}.complete"), hashlib.sha256()
    with complete_file(complete) as lines:
        for i, source_record in enumerate(digested(job.rows.records(), digest)):
            chosen, rejected = (weigh(good[i][k], bad[i][k], decimals) for k in range(2))
            record = source_record | {"rejected_weight": rejected, "chosen_weight": chosen}
            record["weights_digest"] = digest_of(job.encoded[i], job.origin.includes_eos)
            lines.write(record_line(record))
    job.path.unlink(missing_ok=True)
    size_bytes = complete.stat().st_size
    origin = replace(job.origin, records=digest.hexdigest(), size_bytes=size_bytes)
    write_origin(job.path, origin)
    complete.replace(job.path)
    shutil.rmtree(shards_folder(job.path), ignore_errors=True)


def digested(
    records: Iterator[dict[str, Any]], digest: "hashlib._Hash"
) -> Iterator[dict[str, Any]]:
    """Pass records through, adding each to a digest."""
    for record in records:
        digest.update(record_line(record).encode())
        yield record


def records_digest(rows: Rows) -> str:
    """Digest of a source's records, independent of their location.

    Raises:
        DataError: the source has changed since it was read.
    """
    digest = hashlib.sha256()
    for _ in digested(rows.records(), digest):
        pass
    return digest.hexdigest()


def record_line(record: dict[str, Any]) -> str:
    """A record as a line of JSON; dates, bytes and decimals of a parquet file become text."""
    line = json_text(record) + "\n"
    try:
        line.encode()
    except UnicodeEncodeError:
        # a lone surrogate in an unused column: escaped in JSON, as UTF-8 cannot encode it
        return json.dumps(json.loads(line)) + "\n"
    return line


def digest_of(row: EncodedRow, includes_eos: bool) -> str:
    """`token_digest` of the tokens that training compares: without template and EOS."""
    end = -1 if includes_eos else None
    return token_digest(row.prompt_ids, row.chosen_ids[:end], row.rejected_ids[:end])


def weigh(good: NDArray[np.float32], bad: NDArray[np.float32], decimals: int | None) -> list[float]:
    """log π⁻ - log π⁺ of each token, computed in float64 and rounded to `decimals` by `round`."""
    weights = (bad.astype(np.float64) - good.astype(np.float64)).tolist()
    return weights if decimals is None else [round(weight, decimals) for weight in weights]
