"""Optional trackers of a run in addition to metrics.jsonl: Weights & Biases and TensorBoard."""

import importlib
import logging
import os
import secrets
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from fastpref.complete_files import complete_file
from fastpref.config import TrackerOptions, WandbConfig
from fastpref.errors import ConfigError, first_line, in_a_line
from fastpref.train.logs.metrics import Record, Tracker

logger = logging.getLogger("fastpref")

RUN_ID = "wandb-id"
"""File in the run folder with the run's id at Weights & Biases."""
WANDB_WITHOUT_LOGIN = ("offline", "dryrun", "disabled")
"""Values of WANDB_MODE that need no account."""


def check_trackers(options: TrackerOptions) -> None:
    """Refuse, before anything is loaded, a tracker that could not start.

    Raises:
        ConfigError: its package cannot be imported, or Weights & Biases is not logged in.
    """
    if "tensorboard" in options.packages:
        _check_import("tensorboard.enabled", "torch.utils.tensorboard")
    if "wandb" in options.packages:
        _check_import("wandb.enabled", "wandb")
        _check_login()


def _check_import(key: str, module: str) -> None:
    try:
        importlib.import_module(module)
    # incompatible packages may raise anything on import
    except Exception as error:
        raise ConfigError(f"{key}=true: {module} cannot be imported: {in_a_line(error)}") from None


def _check_login() -> None:
    """Log in to Weights & Biases, which asks for the key on a terminal.

    Raises:
        ConfigError: there is no key, it is wrong, or there is no network.
    """
    import wandb

    if os.environ.get("WANDB_MODE") in WANDB_WITHOUT_LOGIN:
        return
    try:
        wandb.login()
    # wandb raises errors of several classes
    except Exception as error:
        raise ConfigError(
            f"wandb.enabled=true: {first_line(error).rstrip('.')}; log in with `wandb login`, set "
            "WANDB_API_KEY, or keep the run on this machine with WANDB_MODE=offline"
        ) from None


def build_trackers(
    options: TrackerOptions, run_dir: Path, run_options: dict[str, Any], examples: int
) -> list[Tracker]:
    """Start the trackers that are enabled.

    One that does not start, although `check_trackers` passed, is left out with a warning.

    Args:
        options: Which trackers are enabled, and their options.
        run_options: All options of the run, for trackers that record them.
        examples: Examples seen before this start; TensorBoard drops what was logged beyond them.
    """
    wanted: dict[str, Callable[[], Tracker]] = {}
    if "wandb" in options.packages:
        wanted[WandbTracker.name] = partial(WandbTracker, options.wandb, run_dir, run_options)
    if "tensorboard" in options.packages:
        wanted[TensorboardTracker.name] = partial(TensorboardTracker, run_dir, examples)
    trackers = []
    for name, build in wanted.items():
        try:
            trackers.append(build())
        # models are loaded by now: a service that does not answer must not end the run
        except Exception as error:
            logger.warning("%s does not follow this run: %s", name, first_line(error))
    return trackers


class WandbTracker:
    """Scalars over examples seen, as the seed repositories log them."""

    name = "Weights & Biases"

    def __init__(self, options: WandbConfig, run_dir: Path, run_options: dict[str, Any]) -> None:
        import wandb

        self._run = wandb.init(
            entity=options.entity,
            project=options.project,
            name=run_dir.name,
            dir=str(run_dir),
            config=run_options,
            # a resumed run continues as the same run
            id=_run_id(run_dir),
            resume="allow",
        )

    def log(self, record: Record) -> None:
        self._run.log(_scalars(record), step=record["examples"])

    def close(self) -> None:
        self._run.finish()


class TensorboardTracker:
    """Scalars over examples seen, in the run folder's `tensorboard/`."""

    name = "TensorBoard"

    def __init__(self, run_dir: Path, examples: int) -> None:
        from torch.utils.tensorboard import SummaryWriter

        folder, purge = str(run_dir / "tensorboard"), examples + 1 if examples else None
        self._writer: Any = SummaryWriter(folder, purge_step=purge)

    def log(self, record: Record) -> None:
        for name, value in _scalars(record).items():
            self._writer.add_scalar(name, value, record["examples"])

    def close(self) -> None:
        self._writer.close()


def _run_id(run_dir: Path) -> str:
    """The run id of a run folder, the same for every start in it."""
    path = run_dir / RUN_ID
    # may be empty if an earlier version was killed before writing it
    known = path.read_text(encoding="utf-8") if path.is_file() else ""
    if not known:
        known = secrets.token_hex(8)
        with complete_file(path) as file:
            file.write(known)
    return known


def _scalars(record: Record) -> dict[str, float]:
    """The numbers of a record. An evaluation gives only its held-out metrics, so that speed and
    learning rate have one curve each, that of training."""
    is_step = record["split"] == "train"
    return {
        key: value
        for key, value in record.items()
        if isinstance(value, int | float) and (is_step or "_eval/" in key or key.endswith("/eval"))
    }
