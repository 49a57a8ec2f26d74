"""Runs one stage of `task=tisdpo`; its models are in memory only while it runs."""

import contextlib
import io
import time
from collections.abc import Iterator
from pathlib import Path

from fastpref.distributed import World
from fastpref.errors import DataError
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
        with contextlib.redirect_stdout(table), _explaining_damage(folder.with_name("weights")):
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
def _explaining_damage(weights: Path) -> Iterator[None]:
    """Add to an error in the weights files of an earlier stage how to have them written again.

    Args:
        weights: Folder of the stage that has estimated the weights.
    """
    try:
        yield
    except DataError as error:
        if str(weights) not in str(error) or not (weights / MARKER).is_file():
            raise
        again = f"to have the weights estimated again, delete {weights}"
        raise DataError(f"{error}; {again}") from None
