"""Loads models and refuses missing weights, which transformers would initialize at random."""

import logging
import re
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import GenerationConfig
from transformers.core_model_loading import revert_weight_conversion
from transformers.utils import logging as transformers_logging

from fastpref.errors import CheckpointError
from fastpref.model.files.archives import begins_as_zip, load_pickle
from fastpref.model.files.configs import load_base_config, quantization_options
from fastpref.model.files.families import code_options, find_family
from fastpref.model.files.paths import ModelSource, matching_files, read_object
from fastpref.model.files.reading import reading
from fastpref.model.files.weight_files import (
    INDEX,
    PICKLE,
    PICKLES_INDEX,
    WHOLE,
    pickle_files,
    stored_weights,
)

logger = logging.getLogger("fastpref")

Shapes = Mapping[str, tuple[int, ...]]

UNFILLED = "model: the weights in {} do not fill the model"
NO_FIT = "{} does not fit the model"
LFS_POINTER = b"version https://git-lfs"
TABLES = re.compile(r"(attn|attention)\.(bias|masked_bias)$|\.inv_freq$")
"""Masks and rotary tables that older versions of transformers saved and newer ones compute."""


def load_checkpoint(source: ModelSource, *, dtype: torch.dtype, attention: dict[str, str]) -> Any:
    """Load a model's base, below its adapters, with its weights from a folder or the hub.

    Args:
        source: The model; its adapters are ignored.
        dtype: Of the weights in memory.
        attention: Options for transformers' choice of an attention.

    Raises:
        CheckpointError: it cannot be found or trained, or its weights do not fill the model.
    """
    name, trust = source.base, source.trust_remote_code
    config = load_base_config(source)
    family = find_family(config, source)
    in_few_bits = quantization_options(name, config)

    def load() -> Any:
        return family.from_pretrained(
            name,
            revision=source.revision,
            config=config,
            dtype=dtype,
            trust_remote_code=trust,
            output_loading_info=True,
            ignore_mismatched_sizes=True,
            # the folder's own is not used here, and may be one that transformers refuses; an
            # export copies the file unchanged
            generation_config=GenerationConfig(),
            **in_few_bits,
            **attention,
        )

    def build() -> Any:
        return family.from_config(config, **code_options(config, source))

    with reading("ModelForCausalLM", name):
        model = _load_full(load, UNFILLED.format(name), build, lambda: shapes_in(Path(name)))
    if in_few_bits:
        # saving then uses the model's own conversions; with those it was loaded by, older versions
        # of transformers would write quantized weights again
        vars(model).pop("_weight_conversions", None)
    return model


def check_weights(model: Any, folder: Path) -> None:
    """Refuse a folder whose weights do not fill a model, before they are read.

    Args:
        model: Of the folder's config, on the meta device.
        folder: Its files of weights count by their headers alone, pickles in the format from
            before torch 1.6, which have none, by being there.

    Raises:
        CheckpointError: as loading it would.
    """
    _check_files(folder)
    with reading("the weights", str(folder)):
        shapes = shapes_in(folder, whole=False)
    # files of quantized weights hold more than weights
    if shapes and not quantization_options(str(folder), model.config):
        check_fit(model, shapes, str(folder), opening=UNFILLED)


def check_fit(model: Any, shapes: Shapes, source: str, *, opening: str) -> None:
    """Refuse weights that do not fill a model, before they are read.

    Args:
        model: On the meta device.
        shapes: Of the weights, by the names of a checkpoint or of the model.
        source: Where they come from.
        opening: What the message begins with, with a place for the source.

    Raises:
        CheckpointError: as loading them would.
    """
    # transformers 5.12 compares tied weights, which tensors on the meta device do not allow
    twice = {
        name
        for name, tied_to in model.all_tied_weights_keys.items()
        if name in shapes and shapes[name] == shapes.get(tied_to)
    }
    headers = {
        name: torch.empty(shape, dtype=model.dtype, device="meta")
        for name, shape in shapes.items()
        if name not in twice
    }
    load = partial(_fill, model, headers, dtype=model.dtype, device_map="meta")
    with reading("the weights", source), _quiet_transformers():
        _load_filled(load, opening.format(source), lambda: model, lambda: shapes)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Silence transformers' own messages about what it loads, and its progress bars."""
    level, has_bars = (
        transformers_logging.get_verbosity(),
        transformers_logging.is_progress_bar_enabled(),
    )
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.set_verbosity(level)
        if has_bars:
            transformers_logging.enable_progress_bar()


def _check_files(folder: Path) -> None:
    """Refuse a checkpoint folder in which files of weights are missing.

    Raises:
        CheckpointError: there are none, the index is damaged or names missing files, or a file is a
            Git LFS pointer.
    """
    kinds = ((WHOLE, INDEX), (PICKLE, PICKLES_INDEX))
    # the first one of the kinds that is there is read, one file before several
    found = [name for names in kinds for name in names if (folder / name).is_file()][:1]
    for index in (folder / name for name in found if name in (INDEX, PICKLES_INDEX)):
        weight_map = read_object(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(f"model: {index} has no weight_map that says where weights lie")
        shards = sorted(map(str, set(weight_map.values())))
        absent = [name for name in shards if not (folder / name).is_file()]
        if absent:
            raise CheckpointError(f"model: {index} names files that are not there: {some(absent)}")
    paths = matching_files(folder, ("*.safetensors", "*.bin"))
    if not paths:
        raise CheckpointError(
            f"model: {folder} has a config and no weights; expected {WHOLE}, or {INDEX} and the "
            "files that it names"
        )
    for path in paths:
        with reading(path.name, str(folder)), path.open("rb") as file:
            if file.read(len(LFS_POINTER)) == LFS_POINTER:
                raise CheckpointError(f"model: {path} is a pointer of Git LFS; run git lfs pull")


def load_weights(
    like: Any,
    weights: dict[str, Tensor],
    source: str,
    *,
    dtype: torch.dtype,
    attention: dict[str, str],
) -> Any:
    """Build a causal LM with weights from a dict, by the names of a checkpoint or of the model.

    transformers renames and stacks them as it does those of a checkpoint, so an archive of the seed
    repositories loads even if its family has renamed its weights since.

    Args:
        like: A model with the class and the config of the new one; may be on the meta device.
        weights: Of any dtype.
        source: Where they come from, for the message.
        dtype: Of the weights in memory.
        attention: Options for transformers' choice of an attention.

    Raises:
        CheckpointError: they do not fill the model.
    """
    load = partial(_fill, like, weights, dtype=dtype, **attention)
    opening = NO_FIT.format(source)
    with reading("the weights", source):
        return _load_full(
            load, opening, lambda: type(like)._from_config(like.config), lambda: shapes_of(weights)
        )


def _fill(like: Any, weights: dict[str, Tensor], **options: Any) -> Any:
    """A model like another one with these weights, and what transformers says about loading it."""
    return type(like).from_pretrained(
        None,
        config=like.config,
        state_dict=weights,
        output_loading_info=True,
        ignore_mismatched_sizes=True,
        **options,
    )


def _load_full(
    load: Callable[[], Any], opening: str, build: Callable[[], Any], shapes: Callable[[], Shapes]
) -> Any:
    """The model that `load` returns, see `_load_filled`; warns of weights that it does not use."""
    model, info = _load_filled(load, opening, build, shapes)
    spare = sorted(name for name in info["unexpected_keys"] if not TABLES.search(name))
    if spare:
        logger.warning("%s has no place for: %s", type(model).__name__, some(spare))
    return model


def _load_filled(
    load: Callable[[], Any], opening: str, build: Callable[[], Any], shapes: Callable[[], Shapes]
) -> tuple[Any, Any]:
    """What `load` returns; missing weights or wrong shapes raise a CheckpointError whose message
    begins with `opening`. `build` makes the model without its weights, to name them."""
    try:
        model, info = load()
    except RuntimeError as error:
        missing, wrong = find_misfit(build, shapes())
        # a layer's experts cannot be stacked if one is missing
        if not missing and not wrong:
            raise
        raise CheckpointError(f"{opening}: {_misfit_text(missing, wrong)}") from error
    wrong_in_memory = sorted(entry[0] for entry in info["mismatched_keys"])
    if info["missing_keys"] or wrong_in_memory:
        missing, wrong = find_misfit(build, shapes())
        if not missing and not wrong:
            missing, wrong = sorted(info["missing_keys"]), wrong_in_memory
        raise CheckpointError(f"{opening}: {_misfit_text(missing, wrong)}")
    return model, info


def named_weights(model: Any) -> dict[str, Tensor]:
    """A loaded model's weights by the names of the checkpoint that it was loaded from."""
    return revert_weight_conversion(model, model.state_dict())


def find_misfit(build: Callable[[], Any], found: Shapes) -> tuple[list[str], list[str]]:
    """A model's weights that its files lack, and those that they hold in another shape.

    Both are named as in the files: transformers renames weights while it loads them (GPT-NeoX's
    `embed_out`) and stacks a layer's experts.

    Args:
        build: Makes the model.
        found: Shapes in the files; empty if they are not known.
    """
    if not found:
        return [], []
    with torch.device("meta"):
        model = build()
    names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    second_names = names - dict(model.named_parameters()).keys()
    state = {name: x for name, x in model.state_dict().items() if name not in second_names}
    in_memory, on_disk = shapes_of(state), shapes_of(revert_weight_conversion(model, state))
    # a body saved without a head lacks the prefix, which transformers adds
    prefix = f"{model.base_model_prefix}."
    of_body = {name.removeprefix(prefix): shape for name, shape in on_disk.items()}
    spellings = (on_disk, in_memory, of_body)
    needed = max(spellings, key=lambda shapes: len(shapes.keys() & found.keys()))
    missing = [name for name in needed if name not in found]
    wrong = [
        f"{name} ({list(found[name])}, the model has {list(shape)})"
        for name, shape in needed.items()
        if name in found and found[name] != shape
    ]
    return missing, wrong


def shapes_of(weights: Mapping[str, Tensor]) -> dict[str, tuple[int, ...]]:
    """Shape of each weight by its name."""
    return {name: tuple(x.shape) for name, x in weights.items() if isinstance(x, Tensor)}


def shapes_in(folder: Path, *, whole: bool = True) -> Shapes:
    """Shape of each weight in the files of a folder; of a hub name nothing.

    Args:
        whole: Read files without headers, too; else nothing is known where there is one.
    """
    shapes = {name: tuple(part.get_shape()) for name, part in stored_weights(folder)}
    paths = pickle_files(folder) if not shapes else []
    if not (whole or all(map(begins_as_zip, paths))):
        return {}
    for path in paths:
        saved = load_pickle(path)
        found = shapes_of(saved) if isinstance(saved, dict) else {}
        if not found:
            raise ValueError(f"{path.name} holds no weights by their names")
        shapes |= found
    return shapes


def _misfit_text(missing: list[str], wrong: list[str]) -> str:
    return f"missing {some(missing)}, wrong shape {some(wrong)}"


def some(names: list[str]) -> str:
    """The first four names and how many more there are; "none" for no names."""
    more = f" and {len(names) - 4} more" if len(names) > 4 else ""
    return ", ".join(names[:4]) + more or "none"
