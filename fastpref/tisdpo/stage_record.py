"""The record of a completed stage of `task=tisdpo`: its result and fingerprints of its inputs."""

import json
import shutil
from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from fastpref.checkpoint.folders import CHECKPOINTS
from fastpref.complete_files import complete_file
from fastpref.data.chat import prints_date
from fastpref.data.chat_date import read_date
from fastpref.distributed import World
from fastpref.errors import CheckpointError
from fastpref.tisdpo.recipe_folder import DATE_FILE
from fastpref.tisdpo.stages import Stage
from fastpref.train.data import load_data
from fastpref.train.resume.comparison import check_same_run

MARKER = "stage.json"
"""File in a completed stage's folder: its wall time in seconds, its result in words, and the
fingerprints of the run's inputs."""
CHAT_DATE = "chat date"
"""Key among those fingerprints: the date of the first start, see `RunState.chat_date`."""
IN_WORDS = ("what", "result", "seconds")


def mark_done(folder: Path, record: dict[str, Any], table: str) -> None:
    """Mark a stage's folder as done, so that the stage is never repeated.

    Args:
        record: `what`, `result` and `seconds` for the closing report; `fingerprints`.
        table: The stage's closing table, for `summary.txt`; "" if it has none.
    """
    if table:
        (folder / "summary.txt").write_text(table, encoding="utf-8")
    with complete_file(folder / MARKER) as file:
        file.write(json.dumps(record, indent=2, ensure_ascii=False) + "\n")
    drop_checkpoints(folder)


def drop_checkpoints(folder: Path) -> None:
    """Delete the checkpoints of a completed stage, which is never resumed."""
    shutil.rmtree(folder / CHECKPOINTS, ignore_errors=True)


def is_done(folder: Path) -> bool:
    """Whether a stage is done; if so, checkpoints left behind by a kill are deleted.

    Raises:
        CheckpointError: its record is damaged.
    """
    if not (folder / MARKER).is_file():
        return False
    read_record(folder)
    drop_checkpoints(folder)
    return True


def read_record(folder: Path) -> dict[str, Any]:
    """Read the record that `mark_done` has written.

    Raises:
        CheckpointError: it is damaged.
    """
    path = folder / MARKER
    try:
        record: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
        if _is_record(record):
            return record
    except ValueError:
        pass
    raise CheckpointError(
        f"{path} is not the record of a stage that is done: copy the folder anew, or delete it to "
        "have the stage done again"
    )


def _is_record(record: Any) -> bool:
    if not isinstance(record, dict) or not all(name in record for name in IN_WORDS):
        return False
    fingerprints = record.get("fingerprints", {})
    return (
        isinstance(record["what"], str)
        and isinstance(record["result"], str)
        and isinstance(record["seconds"], int | float)
        and isinstance(fingerprints, dict)
        and all(isinstance(digest, str) for digest in fingerprints.values())
    )


def take_inputs(
    stages: list[Stage], run_dir: Path, done: Sequence[Path], world: World
) -> dict[str, str]:
    """Fingerprints of the run's inputs as they are now; they must be the same for all stages.

    Args:
        run_dir: The recipe's folder, in which the date for chat templates is kept.
        done: Folders of the stages that are done.

    Raises:
        CheckpointError: a completed stage was computed from other data or another model; with a
            list of the differences.
        FastprefError: the data or the model is invalid.
    """
    [weights] = [stage for stage in stages if stage.name == "weights"]
    # the pairs as the files have them, and the model that the first stage starts from
    config = replace(weights.config, model=stages[0].config.model)
    told = world.on_main(lambda: begin_date(run_dir, done))
    data = load_data(config, world, chat_date=told, quiet=True)
    inputs = data.fingerprints(config.model, world) | {CHAT_DATE: data.chat_date}
    options = asdict(config)

    def compare() -> None:
        for folder in done:
            check_inputs(folder, inputs, options, allow=config.resume.allow)
        if not told and prints_date(*data.texts):
            with complete_file(run_dir / DATE_FILE) as file:
                file.write(data.chat_date)

    world.on_main(compare)
    return inputs


def begin_date(run_dir: Path, done: Sequence[Path]) -> str:
    """The date given to a run's chat template; "" if it is not known yet."""
    noted = run_dir / DATE_FILE
    if noted.is_file():
        return read_date(noted)
    records = [read_record(folder).get("fingerprints", {}) for folder in done]
    return max((record.get(CHAT_DATE, "") for record in records), default="")


def check_inputs(
    folder: Path, inputs: dict[str, str], options: dict[str, Any], *, allow: Sequence[str]
) -> None:
    """Refuse to continue if a completed stage had other inputs, see `take_inputs`."""
    before = read_record(folder).get("fingerprints", {})
    check_same_run(
        folder,
        {"options": options, "fingerprints": before},
        options,
        {name: digest for name, digest in inputs.items() if name in before},
        allow=allow,
    )
