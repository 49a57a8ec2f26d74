"""What train.py does with its arguments: help, the composed options, or the run."""

import atexit
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import NoReturn

from omegaconf import DictConfig

from fastpref.config import config_to_yaml
from fastpref.errors import ConfigError
from fastpref.options import format_help
from fastpref.overrides import read_config


def main(
    arguments: list[str], compose_choices: Callable[[list[str]], DictConfig], config_dir: Path
) -> int:
    """Run `python train.py ARGUMENTS`.

    Args:
        arguments: KEY=VALUE each, or --help, or --cfg.
        compose_choices: Composes configs/ for choices such as ["loss=dpo"].
        config_dir: The folder configs/.

    Returns:
        The exit code; 2 for a wrong option, after one message on stderr.
    """
    if {"--help", "-h"} & set(arguments):
        _show(format_help(config_dir))
        return 0
    only_print = "--cfg" in arguments
    if only_print:
        # Hydra's own form is `--cfg job`
        arguments = [argument for argument in arguments if argument not in ("--cfg", "job")]
    try:
        config = read_config(arguments, compose_choices, config_dir)
    except ConfigError as error:
        # under torchrun every rank finds the same error: one message is enough
        if os.environ.get("RANK", "0") == "0":
            print(f"fastpref: {error}", file=sys.stderr)
        return error.exit_code
    if only_print:
        _show(config_to_yaml(config).rstrip())
        return 0
    # torch and transformers are imported from here on, a second or more
    from fastpref.run import main as run

    return run(config)


def leave(exit_code: int) -> NoReturn:
    """End this process without taking the interpreter apart first.

    Arrow's threads may ask for the interpreter's lock while it goes, which ends a process whose
    work is done with SIGABRT: github.com/apache/arrow/issues/45214, seen once in a few hundred
    runs.
    """
    atexit._run_exitfuncs()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(exit_code)


def _show(text: str) -> None:
    # `--help | head`: a reader that leaves early is no error
    if hasattr(signal, "SIGPIPE"):
        signal.signal(signal.SIGPIPE, signal.SIG_DFL)
    print(text)
