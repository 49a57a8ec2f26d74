"""Run a checked config to an exit code: logging, launch, task, one message per user error."""

import datetime
import logging
import os
import sys
from collections.abc import Collection
from typing import NamedTuple

import torch

from fastpref.cli.launch import keep_to_cores, launch_on_every_gpu
from fastpref.cli.ranks import run_on_this_rank
from fastpref.cli.scheduler import is_first, take_ranks, warn_of_others
from fastpref.cli.tasks import check_task, run_task
from fastpref.config import Config
from fastpref.distributed import World, launched, world_size
from fastpref.errors import say_error
from fastpref.explanations import explain

logger = logging.getLogger("fastpref")


def main(config: Config, given: Collection[str] = ()) -> int:
    """Check the config against this machine, join the other ranks, and run the task.

    Args:
        given: Keys of the options given on the command line.

    Returns:
        0, or the exit code of a `FastprefError`, whose message was written to stderr. Unexpected
        exceptions (bugs) and KeyboardInterrupt propagate.
    """
    command = _Command(config, given)
    try:
        if config.task in ("plan", "audit"):
            command.run_alone()
            return 0
        return command.run_on_ranks()
    except Exception as error:
        known = explain(error)
        if known is None:
            raise
        say_error(known)
        return known.exit_code


class _Command(NamedTuple):
    """A command to run on this machine."""

    config: Config
    given: Collection[str]
    """Keys of the options given on the command line."""

    def run_alone(self) -> None:
        """Run `task=plan` or `audit` in one process; if several were started, only in the first."""
        config = self.config
        if not is_first(os.environ):
            return
        self._begin(is_main=True)
        if config.task == "audit":
            from fastpref.cli.audit import audit

            audit(config)
            return
        from fastpref.cli.plan import show_plan
        from fastpref.memory.here import bound_workspace

        bound_workspace(config.head, int(config.plan.memory_gib * 2**30))
        show_plan(config.training, config.packing, config.plan, longest=config.max_length)

    def run_on_ranks(self) -> int:
        """Run any other task, as a rank already launched or by launching one rank per GPU.

        Returns:
            The exit code of the ranks that this process launched, else 0.
        """
        config = self.config
        one_run = config.trainer == "FSDPTrainer"
        one_a_machine = one_run and take_ranks(os.environ, config.fsdp_port)
        self._begin(is_main=os.environ.get("RANK", "0") == "0")
        warn_of_others(os.environ)
        num_gpus = torch.cuda.device_count()
        on_every_gpu = one_run and num_gpus > 1 and (one_a_machine or not launched())
        if on_every_gpu:
            check_task(config, world_size() * num_gpus)
            timeout = datetime.timedelta(seconds=config.parallel.timeout)
            return launch_on_every_gpu(num_gpus, config.fsdp_port, timeout=timeout)

        def task(world: World) -> None:
            from fastpref.memory.here import bound_workspace, device_memory

            # after the rendezvous, so that a rank whose check fails can tell the others
            check_task(config, world.size)
            bound_workspace(config.head, device_memory(world.device))
            run_task(config, world)

        run_on_this_rank(task, config.parallel.timeout)
        return 0

    def _begin(self, *, is_main: bool) -> None:
        """Set up logging and threads, check the device, and warn of options without effect.

        Raises:
            ConfigError: the device does not support an option.
        """
        configure_logging(is_main=is_main)
        # imported late: imports transformers, which reads the variables set above
        from fastpref.train.logs.advice import Advice

        keep_to_cores()
        # a plan is for GPUs of another machine
        if self.config.task != "plan":
            self.config.check_device(*_device())
        advice = Advice(self.config)
        for line in (*advice.on_task(), *advice.on_idle(self.given)):
            logger.warning(line)


def _device() -> tuple[str, bool]:
    """Type of the available device, cuda or cpu, and whether it computes in bfloat16."""
    device_type = "cuda" if torch.cuda.is_available() else "cpu"
    asked_for = os.environ.get("CUDA_VISIBLE_DEVICES", "")
    if device_type == "cpu" and asked_for not in ("", "-1"):
        logger.warning(
            "CUDA_VISIBLE_DEVICES=%s: torch sees no GPU there, taking the CPU", asked_for
        )
    # torch computes bfloat16 on any CPU
    return device_type, device_type == "cpu" or torch.cuda.is_bf16_supported(
        including_emulation=False
    )


def configure_logging(*, is_main: bool) -> None:
    """Log our own messages to stderr, on ranks other than 0 only errors; hide libraries' bars."""
    handler = StderrHandler()
    handler.setFormatter(logging.Formatter("%(message)s"))
    logger.handlers[:] = [handler]
    logger.setLevel(logging.INFO if is_main else logging.ERROR)
    logger.propagate = False
    if not (is_main and sys.stderr.isatty()):
        # read by huggingface_hub and transformers at import time
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


class StderrHandler(logging.StreamHandler):
    """Writes to the current `sys.stderr`, which a progress bar replaces while it runs."""

    def emit(self, record: logging.LogRecord) -> None:
        self.stream = sys.stderr
        super().emit(record)
