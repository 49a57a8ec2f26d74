"""What a run leaves behind: its folder, and the trained model as a Hugging Face folder."""

import datetime
import getpass
import logging
import os
import shutil
from pathlib import Path
from typing import Any

import torch.distributed as dist
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_model_state_dict

from fastpref.config import Config, computed_exp_name, config_to_yaml
from fastpref.distributed import World
from fastpref.errors import ConfigError
from fastpref.model import TokenScorer
from fastpref.model_paths import EXPORT_FOLDER

logger = logging.getLogger("fastpref")


def check_run_root(config: Config) -> None:
    """Refuse, before anything is loaded, a place where no run folder can be made.

    Raises:
        ConfigError: it is a file, is not writable, or the named run folder holds another run.
    """
    key = "run_dir" if config.run_dir else "output_dir"
    folder = Path(config.run_dir) if config.run_dir else run_root(config)
    if config.run_dir and folder.is_dir() and any(folder.iterdir()):
        raise ConfigError(f"run_dir: {folder} is not empty; name a new folder")
    check_writable(key, folder)


def check_writable(key: str, folder: Path) -> None:
    """Refuse a folder that cannot be made or written to.

    Raises:
        ConfigError: naming the option, and the path that stands in the way.
    """
    existing = next(path for path in (folder, *folder.absolute().parents) if path.exists())
    if not existing.is_dir():
        raise ConfigError(f"{key}: {existing} is a file, expected a folder")
    if not os.access(existing, os.W_OK | os.X_OK):
        raise ConfigError(f"{key}: {existing} is not writable")


def run_root(config: Config) -> Path:
    """The folder that holds the run folders: `output_dir`, or `<local dir>/<user>` as the DPO
    repository has it: the first of `local_dirs` that exists, else the last."""
    if not config.local_dirs:
        return Path(config.output_dir)
    existing = [name for name in config.local_dirs if Path(name).is_dir()]
    return Path((existing or config.local_dirs[-1:])[0]) / getpass.getuser()


def create_run_dir(config: Config, world: World) -> Path:
    """A new run folder with the config in it, on every rank the same one.

    Two starts in one second get two folders: making a folder is what claims its name.
    """
    if not world.is_main:
        return Path(world.share_from_main(""))
    if config.run_dir:
        run_dir = Path(config.run_dir)
        run_dir.mkdir(parents=True, exist_ok=True)
    else:
        exp_name = config.exp_name or computed_exp_name(config)
        timestamp = datetime.datetime.now().strftime("%Y-%m-%d_%H-%M-%S")
        run_dir = _claim(run_root(config), f"{exp_name}_{timestamp}")
    (run_dir / "config.yaml").write_text(config_to_yaml(config), encoding="utf-8")
    return Path(world.share_from_main(str(run_dir)))


def _claim(root: Path, name: str) -> Path:
    attempt = 1
    while True:
        run_dir = root / (name if attempt == 1 else f"{name}_{attempt}")
        # exp_name may hold folders of its own
        run_dir.parent.mkdir(parents=True, exist_ok=True)
        try:
            run_dir.mkdir()
            return run_dir
        except FileExistsError:
            attempt += 1


def export_model(scorer: TokenScorer, tokenizer: Any, run_dir: Path, world: World) -> Path:
    """Write `<run_dir>/LATEST`: safetensors, config and tokenizer, in the master dtype.

    Every rank calls this; rank 0 gathers the weights on the CPU and writes. The folder appears
    under its name only when it is complete.

    Returns:
        The folder, which `AutoModelForCausalLM.from_pretrained` loads.
    """
    options = StateDictOptions(full_state_dict=True, cpu_offload=True)
    gathered = get_model_state_dict(scorer, options=options)
    folder = run_dir / EXPORT_FOLDER
    if world.is_main:
        prefix = "model."
        # a tied weight goes out once, under its first name: transformers ties it again on loading
        second_names = _second_names(scorer)
        weights = {
            name.removeprefix(prefix): value
            for name, value in gathered.items()
            if name not in second_names
        }
        partial = run_dir / f"{EXPORT_FOLDER}.partial"
        shutil.rmtree(partial, ignore_errors=True)
        scorer.model.save_pretrained(partial, state_dict=weights)
        tokenizer.save_pretrained(partial)
        shutil.rmtree(folder, ignore_errors=True)
        partial.rename(folder)
        logger.info("wrote %s", folder)
    if world.size > 1:
        dist.barrier()
    return folder


def _second_names(scorer: TokenScorer) -> set[str]:
    every_name = {name for name, _ in scorer.named_parameters(remove_duplicate=False)}
    return every_name - {name for name, _ in scorer.named_parameters()}
