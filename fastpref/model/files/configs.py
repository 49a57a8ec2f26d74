"""Loads a model's config, and refuses models that it shows to be unfit for training."""

import logging
from functools import cache
from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    AutoConfig,
    PreTrainedConfig,
)
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from fastpref.errors import CheckpointError
from fastpref.model.files.families import has_family
from fastpref.model.files.paths import ADAPTER_CONFIG, BASE_FIELD, CONFIG, ModelSource, read_object
from fastpref.model.files.reading import reading

logger = logging.getLogger("fastpref")

DEQUANTIZED = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
"""Quantization formats that transformers dequantizes to ordinary weights when it loads them."""


def load_config(name: str, revision: str | None = None, *, trust_remote_code: bool = False) -> Any:
    """Load a model's config.

    Args:
        name: Folder or hub name of a model with weights of its own, not of an adapter.
        trust_remote_code: Whether Python code in its folder may run.

    Raises:
        CheckpointError: there is none, or it is not that of a causal LM that can be trained.
    """
    path = Path(name) / CONFIG
    with reading("Config", name):
        if path.is_file():
            fields = read_object(path)
        else:
            fields, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
        if not trust_remote_code:
            _refuse_custom_code(name, fields)
        elif fields.get("auto_map"):
            say_what_runs(name, code_of(fields["auto_map"]))
        config = AutoConfig.from_pretrained(
            name, revision=revision, trust_remote_code=trust_remote_code
        )
    _refuse_what_is_no_causal_lm(name, config)
    quantization_options(name, config)
    return config


def load_base_config(source: ModelSource) -> Any:
    """The config of a model's base, below its adapters.

    Raises:
        CheckpointError: as `load_config`, naming the adapter that asks for this base.
    """
    try:
        trust = source.trust_remote_code
        return load_config(source.base, source.revision, trust_remote_code=trust)
    except CheckpointError as error:
        if not source.adapters:
            raise
        adapter = Path(source.adapters[0]) / ADAPTER_CONFIG
        reason = str(error).rstrip(".")
        raise CheckpointError(f"{reason} ({BASE_FIELD} of {adapter})") from error


def quantization_options(name: str, config: Any) -> dict[str, Any]:
    """Options with which `from_pretrained` dequantizes a model's weights; {} if not quantized.

    Raises:
        CheckpointError: transformers cannot dequantize them, so they cannot be trained.
    """
    settings = getattr(config, "quantization_config", None)
    if settings is None:
        return {}
    if not isinstance(settings, dict):
        settings = settings.to_dict()
    method = str(settings.get("quant_method", "in an unknown format"))
    if method not in DEQUANTIZED:
        raise CheckpointError(
            f"model: the weights in {name} are quantized ({method}) and cannot be trained; name "
            "the model that they were made of"
        )
    return {"quantization_config": DEQUANTIZED[method](dequantize=True)}


def _refuse_custom_code(name: str, fields: dict[str, Any]) -> None:
    if "auto_map" in fields and fields.get("model_type") not in CONFIG_MAPPING:
        raise code_refused(
            name,
            f"transformers has no model type {fields.get('model_type')!r}, and the folder brings "
            "its own code for it",
            code_of(fields["auto_map"]),
        )


def code_refused(name: str, why: str, code: str) -> CheckpointError:
    """The error for a folder that needs to run Python code, which is not allowed."""
    return CheckpointError(
        f"model: {name} cannot be loaded without running {code}: {why}; "
        "model.trust_remote_code=true runs it, with all that you may do on this machine, so read "
        "it first"
    )


@cache
def say_what_runs(name: str, code: str) -> None:
    """Warn once that Python code of a folder runs."""
    logger.warning(
        "model.trust_remote_code=true: running %s of %s, with all that you may do on this machine",
        code,
        name,
    )


def code_of(auto_map: Any) -> str:
    """ "configuration_x.py, modeling_x.py": files that an `auto_map` names, for messages."""
    given = auto_map.values() if isinstance(auto_map, dict) else [auto_map]
    references = [part for value in given for part in _listed(value) if isinstance(part, str)]
    # REPOSITORY--FILE.CLASS
    files = {f"{ref.rpartition('--')[2].rpartition('.')[0]}.py" for ref in references}
    return ", ".join(sorted(files)) or "its code"


def _listed(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def _refuse_what_is_no_causal_lm(name: str, config: Any) -> None:
    family = config.model_type
    if config.is_encoder_decoder:
        raise CheckpointError(
            f"model: {name} is an encoder-decoder model ({family}); preferences are trained on "
            "causal language models, which have a decoder alone"
        )
    if not has_family(config):
        raise CheckpointError(
            f"model: {name} is no causal language model: transformers has none of type {family}"
        )
    if not isinstance(getattr(config.get_text_config(), "vocab_size", None), int):
        raise CheckpointError(f"model: the config of {name} ({family}) has no vocab_size")
