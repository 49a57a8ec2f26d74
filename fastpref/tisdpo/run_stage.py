"""Runs one stage of `task=tisdpo`; its models are in memory only while it runs."""

import contextlib
import io
import time
from collections.abc import Iterator
from pathlib import Path

from fastpref.distributed import World
from fastpref.errors import CheckpointError, DataError
from fastpref.memory.repetition import release_memory
from fastpref.tisdpo.closing_report import describe_training, describe_weights
from fastpref.tisdpo.estimate import estimate_weights
from fastpref.tisdpo.report import WeightsReport
from fastpref.tisdpo.stage_record import CHAT_DATE, MARKER, mark_done
from fastpref.tisdpo.stages import Stage
from fastpref.train.task import train


def run_stage(
    stage: Stage, folder: Path, world: World, *, inputs: dict[str, str], command: str
) -> None:
    """Run or resume one stage; its closing table goes to `summary.txt`.

    Args:
        inputs: Fingerprints of the run's inputs, see `take_inputs`.
        command: How to resume a stopped run, for the message.
    """
    chat_date = inputs[CHAT_DATE]
    is_training = stage.config.task == "train"
    started = time.perf_counter()
    table = io.StringIO()
    reports: list[WeightsReport] = []
    try:
        with contextlib.redirect_stdout(table), _explaining_damage(folder.parent):
            if is_training:
                seconds = train(stage.config, world, command=command, chat_date=chat_date)
            else:
                reports = estimate_weights(stage.config, world, chat_date=chat_date)
                seconds = time.perf_counter() - started
    finally:
        # before the next stage loads its models
        release_memory()

    def close() -> None:
        result = describe_training(folder) if is_training else describe_weights(reports)
        record = {"what": stage.what, "result": result, "seconds": seconds}
        mark_done(folder, record | {"fingerprints": inputs}, table.getvalue())

    # on_main: no rank starts the next stage before rank 0 has finished this one
    world.on_main(close)


@contextlib.contextmanager
def _explaining_damage(run_dir: Path) -> Iterator[None]:
    """Add to an error in the weights files or the model of an earlier stage how to have them made
    again.

    Args:
        run_dir: The recipe's folder.
    """
    try:
        yield
    except (DataError, CheckpointError) as error:
        for marker in run_dir.glob(f"*/{MARKER}"):
            stage = marker.parent
            if str(stage) in str(error):
                made = "weights estimated" if stage.name == "weights" else "model trained"
                again = f"to have the {made} again, delete {stage}"
                raise type(error)(f"{error}; {again}") from None
        raise
