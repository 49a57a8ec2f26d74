"""Loads models and tokenizers by name: from folders, runs, adapters, archives and the hub."""

import logging
import os
from pathlib import Path
from typing import Any

import torch
from transformers import AutoTokenizer, PreTrainedTokenizerFast
from transformers.initialization import meta_device_safe_creation_ops
from transformers.models.auto.tokenization_auto import get_tokenizer_config

from fastpref.config import ModelConfig
from fastpref.errors import ConfigError
from fastpref.model.adapters.folders import adapt_config, check_adapter, merge_adapter, untie
from fastpref.model.files.archives import read_policy
from fastpref.model.files.configs import code_of, code_refused, load_base_config, say_what_runs
from fastpref.model.files.families import code_options, find_family
from fastpref.model.files.full_weights import (
    Shapes,
    load_checkpoint,
    load_weights,
    named_weights,
    shapes_of,
)
from fastpref.model.files.paths import (
    ModelSource,
    archive_file,
    archived_model,
    find_archive,
    resolve_tokenizer,
)
from fastpref.model.files.reading import reading
from fastpref.model.two_tables import holds_two_tables, untie_two_tables

logger = logging.getLogger("fastpref")

GENERIC_TOKENIZERS = ("PreTrainedTokenizerFast", "TokenizersBackend")
"""Tokenizer classes that are defined by their tokenizer.json alone."""


def load_model(
    source: ModelSource,
    *,
    dtype: torch.dtype,
    attention: str = "auto",
    archive: str | None = None,
) -> Any:
    """Load a causal LM with its weights onto the CPU.

    Args:
        source: The model and its adapters.
        dtype: Dtype of the weights in memory.
        attention: eager or sdpa; any other leaves the choice to transformers, because
            FlashAttention runs only on a GPU and the model is checked on the CPU.
        archive: Weights to load instead of the model's own: a Hugging Face folder, a run folder
            or a seed-format `policy.pt`.

    Raises:
        CheckpointError: it cannot be found, or its weights do not fill the model.
    """
    if archive:
        return _load_archive(source, archive, dtype=dtype, attention=attention)
    options = _attention_option(attention)
    for adapter in source.adapters:
        check_adapter(adapter)
    # merged in float32 and rounded once, so that policy and reference are the same model,
    # whatever dtype each is stored in
    exact = torch.float32 if source.adapters else dtype
    model = load_checkpoint(source, dtype=exact, attention=options)
    untie_two_tables(model)
    for adapter in source.adapters:
        model = merge_adapter(model, adapter)
    if exact == dtype:
        return model
    return load_weights(model, named_weights(model), source.name, dtype=dtype, attention=options)


def _load_archive(source: ModelSource, archive: str, *, dtype: torch.dtype, attention: str) -> Any:
    """Load a model with the weights of an archive; its own are not read."""
    path = Path(os.path.expanduser(archive))
    if path.is_file():
        weights = read_policy(path)
    else:
        folder = find_archive(archive, trust_remote_code=source.trust_remote_code)
        weights = named_weights(load_model(folder, dtype=dtype))
        logger.info("model.archive: weights of %s", folder.name)
    empty = build_meta(source, dtype=dtype, attention=attention)
    options = _attention_option(attention)
    model = load_weights(
        empty, weights, f"model.archive: {archive}", dtype=dtype, attention=options
    )
    if path.is_file():
        # weights that needed no cast are still memory-mapped from the file
        for parameter in model.parameters():
            parameter.data = parameter.data.clone()
    untie_two_tables(model)
    return model


def archived_shapes(model: ModelConfig) -> Shapes:
    """Shape of each weight in `model.archive`, by its name there, without reading the weights.

    Raises:
        CheckpointError: it is no archive.
    """
    if path := archive_file(model):
        return shapes_of(read_policy(path))
    return shapes_of(named_weights(build_meta(archived_model(model), dtype=torch.float32)))


def build_empty(source: ModelSource, *, dtype: torch.dtype, attention: str = "auto") -> Any:
    """Build the model with uninitialized weights, which rank 0 sends after sharding."""
    model = build_meta(source, dtype=dtype, attention=attention)
    # pages that are never written take no memory, so every rank of a node can hold such a model
    model = model.to_empty(device="cpu")
    model.tie_weights()
    return model


def build_meta(source: ModelSource, *, dtype: torch.dtype, attention: str = "auto") -> Any:
    """Build the model on the meta device: its modules, shapes and dtypes without weights."""
    config = load_base_config(source)
    family = find_family(config, source)

    def build() -> Any:
        options = _attention_option(attention)
        with (
            reading("ModelForCausalLM", source.base),
            torch.device("meta"),
            # `torch.linspace` creates CPU tensors: some families read their values
            meta_device_safe_creation_ops(),
        ):
            return family.from_config(
                config, dtype=dtype, **code_options(config, source), **options
            )

    model = build()
    with reading("Weights", source.base):
        has_two_tables = holds_two_tables(source.base, model)
    if has_two_tables:
        untie(config)
        model = build()
    for adapter in source.adapters:
        check_adapter(adapter)
        if adapt_config(config, model, adapter):
            model = build()
    return model


def _attention_option(attention: str) -> dict[str, str]:
    return {"attn_implementation": attention} if attention in ("eager", "sdpa") else {}


def read_vocab_size(source: ModelSource) -> int:
    """Rows of a model's embedding, without loading weights.

    Raises:
        CheckpointError: there is no such model.
    """
    if source.adapters:
        model = build_meta(source, dtype=torch.float32)
        return model.get_input_embeddings().weight.shape[0]
    return load_base_config(source).get_text_config().vocab_size


def load_model_tokenizer(model: ModelConfig, *, key: str = "model.name_or_path") -> Any:
    """The tokenizer that a run uses: the one it names, else its model's own.

    Args:
        model: For `tokenizer_name_or_path`, `name_or_path` and `revision`.
        key: The option that names the model.

    Raises:
        CheckpointError: there is none.
        ConfigError: it has no end-of-sequence token.
    """
    name, revision = find_tokenizer(model, key=key)
    return load_tokenizer(name, revision, trust_remote_code=model.trust_remote_code)


def find_tokenizer(
    model: ModelConfig, *, key: str = "model.name_or_path"
) -> tuple[str, str | None]:
    """Folder or hub name of the tokenizer that a run uses, and its hub revision.

    Args:
        model, key: See `load_model_tokenizer`.

    Raises:
        CheckpointError: there is none.
    """
    name = model.tokenizer_name_or_path
    if name is not None and name != model.name_or_path:
        # the revision is a commit of the model's repository, not of the tokenizer's
        return resolve_tokenizer(name), None
    name = resolve_tokenizer(model.name_or_path, key=key, revision=model.revision)
    return name, model.revision


def load_tokenizer(
    name: str, revision: str | None = None, *, trust_remote_code: bool = False
) -> Any:
    """The tokenizer of a folder or hub name.

    Args:
        name: What `resolve_tokenizer` returned.
        trust_remote_code: Whether Python code of its folder may run.

    Raises:
        CheckpointError: there is none, or it needs code that may not run.
        ConfigError: it has no end-of-sequence token, so no response could ever end.
    """
    with reading("Tokenizer", name):
        fields = get_tokenizer_config(name, revision=revision)
        code = code_of(fields.get("auto_map") or {})
        if trust_remote_code and fields.get("auto_map"):
            say_what_runs(name, code)
        try:
            tokenizer = AutoTokenizer.from_pretrained(
                name, revision=revision, trust_remote_code=trust_remote_code
            )
        except ValueError as error:
            if "trust_remote_code" not in str(error):
                raise
            raise code_refused(name, "transformers has no such tokenizer", code) from error
        saved_class = fields.get("tokenizer_class")
        # beside a qwen2 config, say, AutoTokenizer builds a Qwen2 tokenizer from any tokenizer.json
        if saved_class in GENERIC_TOKENIZERS and type(tokenizer).__name__ not in GENERIC_TOKENIZERS:
            options: dict[str, Any] = {} if revision is None else {"revision": revision}
            tokenizer = PreTrainedTokenizerFast.from_pretrained(name, **options)
    if tokenizer.eos_token_id is None:
        raise ConfigError(
            f"model.tokenizer_name_or_path: the tokenizer of {name} has no end-of-sequence token; "
            "set eos_token in its tokenizer_config.json or name another tokenizer"
        )
    return tokenizer
