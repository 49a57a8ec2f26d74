"""Compares a checkpoint's run with the one that is to resume from it."""

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from fastpref.checkpoint.agreement import describe
from fastpref.errors import CheckpointError
from fastpref.train.resume.differences import (
    GONE,
    Difference,
    effect_of,
    is_among,
    is_of_state,
    list_differences,
)
from fastpref.train.state import RunState

logger = logging.getLogger("fastpref")

FORMAT = 1
"""Format version of the record in a checkpoint."""
HELD_OUT = "held-out data"
"""Name of the fingerprint of the held-out rows, on which no update depends; its value is "none" if
there are no such rows."""


def check_record(folder: Path, record: dict[str, Any]) -> None:
    """Refuse a checkpoint record of another version of fastpref that this one cannot read.

    Args:
        folder: The checkpoint's folder.
        record: The checkpoint's record.

    Raises:
        CheckpointError: naming what is unknown or missing.
    """
    try:
        RunState.from_json(record["state"])
        readable = {"format", "options", "fingerprints"} <= record.keys()
        problem = "" if readable and record["format"] == FORMAT else "its format is another one"
    except (KeyError, TypeError) as error:
        problem = describe(error)
    if problem:
        raise CheckpointError(
            f"{folder} was saved by another version of fastpref, and this one cannot read it "
            f"({problem}): go on with that version, or name a new run_dir"
        )


def check_same_run(
    folder: Path,
    record: dict[str, Any],
    options: dict[str, Any],
    fingerprints: dict[str, str],
    *,
    allow: Sequence[str],
    quiet: bool = False,
) -> None:
    """Refuse to resume with options, data or a model that differ from the checkpoint's and change
    the results; log all other differences.

    Args:
        folder: The checkpoint's folder.
        record: The checkpoint's record.
        options: All options of this start.
        fingerprints: Digests of data, held-out data, tokenizer and model, as far as known yet.
        allow: Names of options and fingerprints that may differ nevertheless.
        quiet: Do not log the other differences; a later call with all fingerprints will.

    Raises:
        CheckpointError: with a list of all differences.
    """
    schedule = options["optim"]["schedule"]
    found = [
        (difference, effect_of(difference, schedule))
        for difference in list_differences(record["options"], options)
    ]
    before = record["fingerprints"]
    effects = {HELD_OUT: "no effect on the updates, other numbers of evaluations"}
    found += [
        (Difference(name, before[name][:12], digest[:12]), effects.get(name, ""))
        for name, digest in fingerprints.items()
        # checkpoints of earlier versions have no digest of the held-out data
        if before.get(name, digest) != digest
    ]
    lines = [_line(difference, effect, allow) for difference, effect in found]
    refused = [d for d, effect in found if not effect and not is_among(d.key, allow)]
    adapted = options["adapter"]["kind"] != "none"
    of_state = [d.key for d, _ in found if is_of_state(d, adapted=adapted)]
    if refused or of_state:
        names = " and ".join(of_state)
        advice = (
            f" or name a new run_dir with resume=never: nothing goes on with another {names}"
            if of_state
            else ", name a new run_dir with resume=never, or accept them with "
            f"resume.allow=[{','.join(d.key for d in refused)}]"
        )
        only_there = bool(refused) and all(d.now == GONE for d in refused)
        back = "go on with the version that has them" if only_there else "set them back"
        raise CheckpointError(
            f"{folder} is of a run with other numbers:\n  "
            + "\n  ".join(lines)
            + f"\n{back}{advice}"
        )
    if not quiet:
        for line in lines:
            logger.warning("going on with other options: %s", line)


def _line(difference: Difference, effect: str, allow: Sequence[str]) -> str:
    if not effect:
        effect = "allowed" if is_among(difference.key, allow) else "CHANGES THE NUMBERS"
    return f"{difference}: {effect}"
