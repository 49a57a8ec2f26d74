"""python train.py KEY=VALUE ...: train on preferences; --help lists the options."""

import sys
from pathlib import Path
from typing import Any

from fastpref.cli.command_line import leave, main

CONFIG_DIR = Path(__file__).resolve().parent / "configs"


def compose_choices(choices: list[str]) -> Any:
    """Compose configs/ for choices such as ["loss=dpo"], typed by the schemas of fastpref.config.

    Raises:
        ConfigError: a file under configs/ has an unknown key or a value of the wrong type.
    """
    from hydra import compose, initialize_config_dir
    from hydra.core.config_store import ConfigStore
    from hydra.errors import HydraException
    from yaml import YAMLError

    from fastpref.cli.overrides import explain_composition
    from fastpref.config import LOSSES, Config
    from fastpref.errors import ConfigError

    store = ConfigStore.instance()
    store.store("config_schema", node=Config)
    for name, schema in LOSSES.items():
        store.store(f"{name}_schema", node=schema, group="loss")
    try:
        with initialize_config_dir(version_base=None, config_dir=str(CONFIG_DIR)):
            return compose("config", choices)
    except (HydraException, YAMLError) as error:
        raise ConfigError(explain_composition(str(error))) from None


if __name__ == "__main__":
    leave(main(sys.argv[1:], compose_choices, CONFIG_DIR))
