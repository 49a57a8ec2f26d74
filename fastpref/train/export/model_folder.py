"""Writes a complete model folder: trained weights, weights copied from the source, other files."""

import logging
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor

from fastpref.complete_files import complete_folder
from fastpref.model.files.reading import reason
from fastpref.model.files.source_weights import Arranged, arrange, group_names, most_common_dtype
from fastpref.train.export.config import dtype_name, write_config
from fastpref.train.export.plan import ExportPlan
from fastpref.train.export.weight_files import write_weights

logger = logging.getLogger("fastpref")


def write_model(model: Any, weights: dict[str, Tensor], plan: ExportPlan, folder: Path) -> None:
    """Write a complete model folder.

    Args:
        model: Gives class, config and parameter names.
        weights: The weights by those names; a tied one is written once, as transformers ties it
            again on loading.
        plan: The other files, and the dtypes to write.
        folder: The folder to write.
    """
    second_names = {name for name, _ in model.named_parameters(remove_duplicate=False)}
    second_names -= dict(model.named_parameters()).keys()
    unsaved = second_names | set(getattr(model, "_keys_to_ignore_on_save", None) or ())
    weights = {name: x for name, x in weights.items() if name not in unsaved}
    trained = dtype_of_most(weights)
    arranged = arrange(model, weights, plan.source)
    own = {name: x.to(plan.dtype_of(name, x)) for name, x in arranged.own.items()}
    written = dtype_of_most(own)
    with new_folder(folder) as partial:
        partial.mkdir()
        write_weights(partial, {**own, **arranged.untouched})
        write_config(
            model,
            partial,
            source=plan.config,
            dtype=written,
            others=most_common_dtype(arranged.untouched),
        )
        write_files(plan.others, partial)
        write_files(plan.texts, partial)
    logger.info("wrote %s %s", folder, _in_words(trained, written, plan))
    _say_what_is_not_trained(arranged)


@contextmanager
def new_folder(folder: Path) -> Iterator[Path]:
    """`complete_folder`, which also raises errors of safetensors as OSError."""
    with complete_folder(folder) as partial:
        try:
            yield partial
        # safetensors gives the system's error only in its text
        except SafetensorError as error:
            raise OSError(reason(error)) from error


def write_files(files: Mapping[str, bytes], folder: Path) -> None:
    """Write files, given by their paths relative to a folder."""
    for name, data in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(data)


def _in_words(trained: torch.dtype, written: torch.dtype, plan: ExportPlan) -> str:
    """The dtype of an export in words, "in bfloat16, …", and which other one it could have had."""
    words = f"in {dtype_name(written)}"
    loaded = plan.loaded.commonest
    if written != trained:
        return (
            f"{words} (model.save_dtype={plan.model.save_dtype}), trained in {dtype_name(trained)}"
        )
    if loaded is None or loaded == written:
        return words
    return f"{words}, as trained; model.save_dtype=checkpoint writes {dtype_name(loaded)}"


def dtype_of_most(weights: Mapping[str, Tensor]) -> torch.dtype:
    """The dtype of most floating-point elements."""
    sizes: Counter[torch.dtype] = Counter()
    for weight in weights.values():
        sizes[weight.dtype] += weight.numel() if weight.is_floating_point() else 0
    return sizes.most_common(1)[0][0]


def _say_what_is_not_trained(arranged: Arranged) -> None:
    copied, left_out = (
        ", ".join(
            f"{group} ({len(names)} {'tensor' if len(names) == 1 else 'tensors'})"
            for group, names in group_names(others, arranged.own).items()
        )
        for others in (arranged.untouched, arranged.left_out)
    )
    if copied:
        logger.info("copied from the source as they are, since they were not trained: %s", copied)
    if left_out:
        logger.warning(
            "left out, since the source has them in few bits and the export says of none: %s",
            left_out,
        )
