"""Checkpoints whose config ties head and embedding, but whose files hold two different matrices.

transformers loads both and leaves them untied. A model built without weights must be untied too,
and so must the config of an export: a reader that believes it tied would drop the head.
"""

from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open

from fastpref.model.adapters.folders import untie
from fastpref.model.adapters.tied_head import is_tied
from fastpref.model.files.weight_files import weight_files


def holds_two_tables(name: str, model: Any) -> bool:
    """Whether a checkpoint's embedding and head differ although its config ties them.

    Args:
        name: The checkpoint's folder; a hub name is not checked.
        model: Built from its config; may be on the meta device.
    """
    if model.get_output_embeddings() is None or not is_tied(model):
        return False
    files = weight_files(Path(name)) if Path(name).is_dir() else []
    names = {module: path for path, module in model.named_modules()}
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    wanted = [f"{names[module]}.weight" for module in ends]
    tables: dict[str, Path] = {}
    for path in files:
        with safe_open(path, "pt") as file:
            tables |= dict.fromkeys(set(wanted).intersection(file.keys()), path)
    if len(tables) < 2:
        return False
    embedding, head = (_tensor(tables[key], key) for key in wanted)
    return not torch.equal(embedding, head)


def untie_two_tables(model: Any) -> None:
    """Mark embedding and head as untied in a loaded model's config, if they are untied."""
    says_one = getattr(model.config.get_text_config(), "tie_word_embeddings", False)
    if says_one and model.get_output_embeddings() is not None and not is_tied(model):
        untie(model.config)


def _tensor(path: Path, name: str) -> torch.Tensor:
    with safe_open(path, "pt") as file:
        tensor: torch.Tensor = file.get_tensor(name)
    return tensor
