"""What train.py does with its arguments: help, the composed options, or the run."""

import atexit
import contextlib
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, NoReturn

from fastpref import __version__
from fastpref.cli.streams import fill_standard_streams, outlive_readers
from fastpref.errors import ConfigError, FastprefError, say_error
from fastpref.forks import stop_without_launcher
from fastpref.signals import (
    signals_end_the_process,
    signals_end_with,
    stop_error,
)

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Torch's, the older names last."""

# what takes time to import is imported where signals are handled
if TYPE_CHECKING:
    from omegaconf import DictConfig


def main(
    arguments: list[str], compose_choices: Callable[[list[str]], "DictConfig"], config_dir: Path
) -> int:
    """Run `python train.py ARGUMENTS`.

    Args:
        arguments: KEY=VALUE each, or --help, --cfg or --version.
        compose_choices: Composes configs/ for choices such as ["loss=dpo"].
        config_dir: The folder configs/.

    Returns:
        The exit code; 2 for a wrong option, after one message on stderr.
    """
    fill_standard_streams()
    outlive_readers()
    forget_odd_widths()
    with signals_end_the_process():
        stop_without_launcher()
        try:
            check_current_folder()
            return _run(arguments, compose_choices, config_dir)
        except ConfigError as wrong:
            error: FastprefError = wrong
        except KeyboardInterrupt:
            # from a library, or in a thread where no handlers can be installed
            error = stop_error(signal.SIGINT, "nothing to save yet")
        say_error(error)
        return error.exit_code


def _run(
    arguments: list[str], compose_choices: Callable[[list[str]], "DictConfig"], config_dir: Path
) -> int:
    from fastpref.cli.options import WIDEST, format_help
    from fastpref.cli.overrides import read_config, split_arguments

    if {"--help", "-h"} & set(arguments):
        print(format_help(config_dir, shutil.get_terminal_size((WIDEST, 24)).columns))
        return 0
    if "--version" in arguments:
        print(f"fastpref {__version__}")
        return 0
    only_print = "--cfg" in arguments
    if only_print:
        # Hydra's own form is `--cfg job`
        arguments = [argument for argument in arguments if argument not in ("--cfg", "job")]
    config = read_config(arguments, compose_choices, config_dir)
    if only_print:
        print(config.to_yaml().rstrip())
        return 0
    let_segments_grow()
    # torch and transformers are imported from here on, a second or more
    from fastpref.cli.run import main as run

    given, _ = split_arguments(arguments)
    return run(config, given)


def leave(exit_code: int) -> NoReturn:
    """End this process without taking the interpreter apart first.

    Arrow's threads may ask for the interpreter's lock while it goes, which ends a process whose
    work is done with SIGABRT: github.com/apache/arrow/issues/45214, seen once in a few hundred
    runs.
    """
    # a scheduler that asks again while trackers say goodbye is not told less than a good save
    signals_end_with(exit_code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        # a file that stdout goes to may be full
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(exit_code)


def check_current_folder() -> None:
    """Refuse a current folder that was deleted: libraries ask for its name.

    Raises:
        ConfigError: it was.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(
            f"the current folder cannot be used: {error.strerror}; start from another one"
        ) from None


def let_segments_grow() -> None:
    """Have torch take a GPU's memory in segments that grow, unless its own variable says how:
    steps are of many sizes, and segments of one size each are left with holes that no other step
    fits into. Torch reads it when it first asks for memory."""
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"


def forget_odd_widths() -> None:
    """Take COLUMNS and LINES for unset where they are no widths: libraries stumble over them."""
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch("[1-9][0-9]{0,4}", os.environ.get(name, "80")):
            del os.environ[name]
