"""`python train.py …` inside a benchmark's own process."""

import sys
from pathlib import Path

from fastpref.cli.command_line import main
from fastpref.cli.overrides import read_config
from fastpref.config import Config

# train.py is in no package but in the parent folder
sys.path.insert(0, str(Path(__file__).resolve().parents[1]))


def run_train(*arguments: str) -> None:
    """Run `python train.py ARGUMENTS` in this process.

    Raises:
        RuntimeError: the exit code is not 0.
    """
    import train

    code = main(list(arguments), train.compose_choices, train.CONFIG_DIR)
    if code:
        raise RuntimeError(f"train.py {' '.join(arguments)} ended with exit code {code}")


def read_train_config(*arguments: str) -> Config:
    """The config that `python train.py ARGUMENTS` would run with.

    Raises:
        ConfigError: an option is unknown or out of range.
    """
    import train

    return read_config(list(arguments), train.compose_choices, train.CONFIG_DIR)
