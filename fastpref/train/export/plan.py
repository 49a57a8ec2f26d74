"""Everything that LATEST holds besides the trained weights, gathered before training starts."""

import json
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from fastpref.config import AdapterConfig, ModelConfig
from fastpref.errors import CheckpointError
from fastpref.model.adapters.base import AdapterBase, find_adapter_base
from fastpref.model.files.families import has_family, is_wrapper
from fastpref.model.files.loaded_dtypes import LoadedDtypes, loaded_dtypes
from fastpref.model.files.paths import (
    CONFIG,
    EXPORT_FOLDER,
    TOKENIZER_FILES,
    ModelSource,
    local_folder,
    matching_files,
    named_model,
    read_object,
)
from fastpref.model.files.reading import reading
from fastpref.model.files.source_weights import SourceWeights, open_weights
from fastpref.model.source import find_tokenizer
from fastpref.train.export.config import json_bytes

TOKENIZER_CONFIG = "tokenizer_config.json"
GENERATION_CONFIG = "generation_config.json"
MODEL_FILES = (
    *(GENERATION_CONFIG, "*processor*.json", "audio_tokenizer_config.json", "chat_template.json"),
    *("*.py", "LICENSE*", "NOTICE*"),
)
"""Patterns of the files in a model's folder other than weights, config and tokenizer."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ExportPlan:
    """What LATEST will hold, gathered before training starts.

    So a model that cannot be saved is found out before it is trained, and a source that is replaced
    or deleted during training does no harm.
    """

    texts: Mapping[str, bytes]
    """Contents of the tokenizer's files, by their path in the folder."""
    others: Mapping[str, bytes]
    """Contents of all other files except weights and config."""
    model: ModelConfig
    """The run's model options."""
    loaded: LoadedDtypes
    """Dtypes of the weights that the run started from."""
    source: SourceWeights
    """The source's weight files, held open."""
    config: Mapping[str, Any]
    """Fields of the source's config."""
    adapter: AdapterConfig | None
    """Options of the trained adapter; None: the model itself is trained."""
    base: AdapterBase | None
    """The adapter's base model; None without an adapter."""

    def dtype_of(self, name: str, weight: Tensor) -> torch.dtype:
        """The dtype that a weight is written in."""
        if self.model.save_dtype is None or not weight.is_floating_point():
            return weight.dtype
        if self.model.save_dtype == "float32":
            return torch.float32
        return self.loaded.by_name.get(name, self.loaded.commonest) or weight.dtype


def plan_export(
    model: ModelConfig,
    model_config: Any,
    tokenizer: Any,
    chat_template: str | None,
    *,
    adapter: AdapterConfig | None = None,
) -> ExportPlan:
    """Gather everything that LATEST holds besides the trained weights.

    Args:
        model: The run's model options.
        model_config: The transformers config of the loaded model.
        tokenizer: The run's tokenizer.
        chat_template: Jinja text that replaces the tokenizer's own template; None: nothing does.
        adapter: Options of the trained adapter; None: the model itself is trained.

    Raises:
        CheckpointError: transformers cannot save the config or the tokenizer or could not load the
            export, or a file cannot be read.
    """
    if not has_family(model_config):
        # the text part of some vision models, which transformers loads only with the whole model
        raise CheckpointError(
            f"model: what is trained of {model.name_or_path}, {model_config.model_type}, is no "
            f"causal language model by itself, so nothing could load {EXPORT_FOLDER}"
        )
    source = named_model(model)
    others = _read_files(source.base, source.revision, MODEL_FILES)
    for folder in source.adapters:
        others |= _read_files(folder, None, MODEL_FILES)
    texts = _read_files(*find_tokenizer(model), TOKENIZER_FILES)
    with tempfile.TemporaryDirectory() as name, reading("a config to save", source.base):
        model_config.save_pretrained(name)
    with reading("a tokenizer to save", tokenizer.name_or_path):
        saved = _save_tokenizer(tokenizer, chat_template)
    if TOKENIZER_CONFIG in texts:
        # keep the source's: transformers 5 writes a class and token lists that 4 cannot read
        del saved[TOKENIZER_CONFIG]
    texts |= saved
    return ExportPlan(
        texts=_with_template(texts, chat_template),
        others=_with_template(others, chat_template),
        model=model,
        loaded=loaded_dtypes(model),
        source=open_weights(model, wrapper=is_wrapper(model_config)),
        config=_config_fields(source),
        base=find_adapter_base(model) if adapter else None,
        adapter=adapter,
    )


def _config_fields(source: ModelSource) -> dict[str, Any]:
    with reading("the files", source.base):
        folder = local_folder(source.base, source.revision, (CONFIG,))
        return read_object(folder / CONFIG)


def _read_files(name: str, revision: str | None, patterns: tuple[str, ...]) -> dict[str, bytes]:
    with reading("the files", name):
        folder = local_folder(name, revision, patterns)
        return {path.name: path.read_bytes() for path in matching_files(folder, patterns)}


def _save_tokenizer(tokenizer: Any, chat_template: str | None) -> dict[str, bytes]:
    own_template = tokenizer.chat_template
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        try:
            if chat_template is not None:
                tokenizer.chat_template = chat_template
            tokenizer.save_pretrained(folder)
        finally:
            tokenizer.chat_template = own_template
        paths = [path for path in folder.rglob("*") if path.is_file()]
        return {path.relative_to(folder).as_posix(): path.read_bytes() for path in paths}


def _with_template(files: Mapping[str, bytes], chat_template: str | None) -> dict[str, bytes]:
    """The files, with the chat template replaced in those that hold one, such as a processor's.

    Raises:
        CheckpointError: it cannot be told whether a file holds one.
    """
    replaced = dict(files)
    for name, data in files.items() if chat_template is not None else ():
        try:
            fields = json.loads(data) if name.endswith(".json") else None
        except ValueError as error:
            raise CheckpointError(f"model: {name} cannot be read as JSON: {error}") from None
        if isinstance(fields, dict) and "chat_template" in fields:
            replaced[name] = json_bytes(fields | {"chat_template": chat_template})
    return replaced
