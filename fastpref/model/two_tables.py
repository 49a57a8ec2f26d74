"""Checkpoints whose config ties head and embedding, but whose files hold two different matrices.

transformers loads both and leaves them untied. A model built without weights must be untied too,
and so must the config of an export: a reader that believes it tied would drop the head.
"""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref.model.adapters.folders import untie
from fastpref.model.adapters.tied_head import is_tied
from fastpref.model.files.archives import begins_as_zip, load_pickle
from fastpref.model.files.reading import reading
from fastpref.model.files.source_weights import place_finder
from fastpref.model.files.weight_files import pickle_files, stored_weights, weight_files


def holds_two_tables(name: str, model: Any) -> bool:
    """Whether a checkpoint's embedding and head differ although its config ties them.

    Args:
        name: The checkpoint's folder; a hub name is not checked, nor are pickles in the format from
            before torch 1.6, which have no headers.
        model: Built from its config; may be on the meta device.
    """
    head = model.get_output_embeddings()
    if head is None or not is_tied(model) or not Path(name).is_dir():
        return False
    find_place = place_finder(model)
    [table] = [path for path, weight in model.named_parameters() if weight is head.weight]

    def is_table(in_file: str, shape: Any) -> bool:
        # by shape first: names are slow to compare where there are thousands of experts
        return tuple(shape) == head.weight.shape and find_place(in_file)[0] == table

    tables = list(_stored(Path(name), is_table))
    return any(not torch.equal(tables[0], other) for other in tables[1:])


def untie_two_tables(model: Any) -> None:
    """Mark embedding and head as untied in a loaded model's config, if they are untied."""
    # a wrapper's config and its text part's may say different things
    configs = (model.config, model.config.get_text_config())
    says_one = any(getattr(config, "tie_word_embeddings", False) for config in configs)
    if says_one and model.get_output_embeddings() is not None and not is_tied(model):
        untie(model.config)


def _stored(folder: Path, is_wanted: Callable[[str, Any], bool]) -> Iterator[Tensor]:
    """The wanted tensors of a folder's files, by name and shape."""
    for name, part in stored_weights(folder):
        if is_wanted(name, part.get_shape()):
            yield part[:]
    if weight_files(folder):
        return
    for path in filter(begins_as_zip, pickle_files(folder)):
        with reading("the weights", str(folder)):
            saved = load_pickle(path)
        for name, tensor in saved.items() if isinstance(saved, dict) else ():
            if isinstance(tensor, Tensor) and is_wanted(name, tensor.shape):
                yield tensor
