"""Entry point of train.py: print the help or the composed options, or start the run."""

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
from fastpref.cli.streams import fill_standard_streams, outlive_readers, printing_results
from fastpref.errors import ConfigError, FastprefError, say_error
from fastpref.forks import stop_without_launcher
from fastpref.signals import (
    signals_end_the_process,
    signals_end_with,
    stop_error,
)

ALLOCATOR_VARIABLES = ("PYTORCH_ALLOC_CONF", "PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF")
"""Environment variables that configure torch's GPU allocator, newest name first."""

HUGE_PAGES_VARIABLE = "THP_MEM_ALLOC_ENABLE"
"""Environment variable with which torch asks for transparent huge pages on a CPU."""

HUGE_PAGES = Path("/sys/kernel/mm/transparent_hugepage")
"""Exists if the kernel has transparent huge pages."""

# slow imports are deferred until signal handlers are installed
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
        The exit code; 2 for a wrong option, 4 for an answer that stdout does not take, reported in
        one message on stderr.
    """
    fill_standard_streams()
    outlive_readers()
    forget_odd_widths()
    with signals_end_the_process():
        stop_without_launcher()
        try:
            check_current_folder()
            return _run(arguments, compose_choices, config_dir)
        except FastprefError as known:
            error = known
        except KeyboardInterrupt:
            # raised by a library, or no handlers are installed outside the main thread
            error = stop_error(signal.SIGINT, "nothing to save yet")
        say_error(error)
        return error.exit_code


def _run(
    arguments: list[str], compose_choices: Callable[[list[str]], "DictConfig"], config_dir: Path
) -> int:
    from fastpref.cli.options import WIDEST, format_help
    from fastpref.cli.overrides import read_config, split_arguments

    if {"--help", "-h"} & set(arguments):
        return _answer(format_help(config_dir, shutil.get_terminal_size((WIDEST, 24)).columns))
    if "--version" in arguments:
        return _answer(f"fastpref {__version__}")
    only_print = "--cfg" in arguments
    if only_print:
        # Hydra's own form is `--cfg job`
        arguments = [argument for argument in arguments if argument not in ("--cfg", "job")]
    config = read_config(arguments, compose_choices, config_dir)
    if only_print:
        return _answer(config.to_yaml().rstrip())
    set_allocators()
    # imports torch and transformers, which takes a second or more
    from fastpref.cli.run import main as run

    given, _ = split_arguments(arguments)
    return run(config, given)


def _answer(text: str) -> int:
    """Print what the command was run for; returns the exit code."""
    with printing_results():
        print(text)
    return 0


def leave(exit_code: int) -> NoReturn:
    """Exit this process without finalizing the interpreter.

    Arrow's threads may request the GIL during finalization, which aborts a finished process with
    SIGABRT (github.com/apache/arrow/issues/45214), seen once in a few hundred runs.
    """
    # a second signal, while atexit handlers of trackers run, must not replace the exit code
    signals_end_with(exit_code)
    atexit._run_exitfuncs()
    for stream in (sys.stdout, sys.stderr):
        # stdout may be redirected to a full disk
        with contextlib.suppress(OSError):
            stream.flush()
    os._exit(exit_code)


def check_current_folder() -> None:
    """Refuse to run in a deleted working directory, whose path libraries ask for.

    Raises:
        ConfigError: the working directory does not exist.
    """
    try:
        os.getcwd()
    except OSError as error:
        raise ConfigError(
            f"the current folder cannot be used: {error.strerror}; start from another one"
        ) from None


def set_allocators() -> None:
    """Set torch's allocators by environment variables that the user has not set.

    Torch reads them at its first allocation. On a GPU, segments are expandable, as micro-batches
    vary in size, which fragments segments of a fixed size. On a CPU, tensors from 2 MiB on are
    aligned to pages and in huge pages: their memory is reused where the C library would take more
    from the system, and page faults are fewer.
    """
    if not any(name in os.environ for name in ALLOCATOR_VARIABLES):
        os.environ[ALLOCATOR_VARIABLES[0]] = "expandable_segments:True"
    # a kernel without them refuses the request, of which torch warns
    if HUGE_PAGES.exists():
        os.environ.setdefault(HUGE_PAGES_VARIABLE, "1")


def forget_odd_widths() -> None:
    """Unset COLUMNS and LINES if they are no integers from 1 to 99999: libraries fail on them."""
    for name in ("COLUMNS", "LINES"):
        if not re.fullmatch("[1-9][0-9]{0,4}", os.environ.get(name, "80")):
            del os.environ[name]
