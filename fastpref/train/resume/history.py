"""The history of a resumed run: its metrics and samples up to the checkpoint, none after it."""

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from fastpref.complete_files import complete_file
from fastpref.errors import CheckpointError, is_shortage
from fastpref.train.state import RunState

logger = logging.getLogger("fastpref")

METRICS, SAMPLES = "metrics.jsonl", "samples.jsonl"


def bring_history(source: Path, run_dir: Path, state: RunState, unwritten: Sequence[str]) -> None:
    """Write the metrics and samples up to the checkpoint to the folder of the resumed run.

    Lines that a failed start wrote after its last checkpoint are dropped, and computed again.

    Args:
        source: The run folder that the checkpoint belongs to; `run_dir` itself or another one.
        run_dir: The folder of the resumed run.
        state: The checkpoint's state.
        unwritten: Lines of metrics that could not be written to the file and are in the checkpoint.

    Raises:
        CheckpointError: they cannot be read or written.
    """
    for name, waiting in ((METRICS, unwritten), (SAMPLES, ())):
        kept = [line for line, record in _lines(source / name) if is_before(record, state)]
        kept += [x for x in waiting if is_before(json.loads(x), state) and x not in kept]
        if name == METRICS:
            warn_of_gaps(source / name, kept, state.step)
        if kept or (source / name).is_file():
            with complete_file(run_dir / name) as file:
                file.writelines(kept)


def warn_of_gaps(path: Path, lines: Sequence[str], num_steps: int) -> None:
    """Warn if metrics lack completed steps: only a user can have removed their lines."""
    records = map(json.loads, lines)
    steps = {record["step"] for record in records if record.get("split") == "train"}
    if len(steps) < num_steps:
        logger.warning(
            "%s has no line of %d of the %d steps that were done: it was cut or altered, and the "
            "run goes on without them",
            path,
            num_steps - len(steps),
            num_steps,
        )


def is_before(record: dict[str, Any], state: RunState) -> bool:
    """Whether a line of metrics or samples belongs to the history before a checkpoint."""
    if record.get("split") == "train":
        return record["step"] <= state.step
    return record["step"] < state.step or record["step"] == state.evaluated


def read_records(run_dir: Path) -> list[dict[str, Any]]:
    """The records in metrics.jsonl."""
    return [record for _, record in _lines(run_dir / METRICS)]


def _lines(path: Path) -> Iterator[tuple[str, dict[str, Any]]]:
    """Lines with their records; damaged ones, such as a killed process leaves at the end, are left
    out. Yields nothing if there is no file."""
    for line in _read_lines(path) if path.is_file() else []:
        try:
            record = json.loads(line)
        except ValueError:
            if line.endswith("\n"):
                logger.warning("%s: a damaged line is left out: %.60r", path, line)
            continue
        if not line.endswith("\n"):
            continue
        if isinstance(record, dict) and type(record.get("step")) is int:
            yield line, record
        else:
            logger.warning("%s: a line without a step is left out: %.60r", path, line)


def _read_lines(path: Path) -> list[str]:
    try:
        with path.open(encoding="utf-8", errors="replace") as lines:
            return list(lines)
    except OSError as error:
        if is_shortage(error):
            raise
        reason = error.strerror or error
        raise CheckpointError(f"{path}: cannot be read: {reason}") from error
