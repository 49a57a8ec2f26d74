"""A model's config, and which models are refused by what it says."""

from pathlib import Path
from typing import Any

from transformers import (
    CONFIG_MAPPING,
    MODEL_FOR_CAUSAL_LM_MAPPING,
    AutoConfig,
    PreTrainedConfig,
)
from transformers.utils.quantization_config import FineGrainedFP8Config, Mxfp4Config

from fastpref.errors import CheckpointError
from fastpref.model.paths import ADAPTER_CONFIG, BASE_FIELD, CONFIG, ModelSource, read_object
from fastpref.model.reading import reading

DEQUANTIZED = {"mxfp4": Mxfp4Config, "fp8": FineGrainedFP8Config}
"""Formats of few bits that transformers turns into ordinary weights when it loads them."""


def load_config(name: str, revision: str | None = None) -> Any:
    """A model's config.

    Args:
        name: Folder or hub name of a model with weights of its own.
        revision: Hub revision.

    Raises:
        CheckpointError: there is none, or it is not that of a causal LM that can be trained.
    """
    path = Path(name) / CONFIG
    with reading("Config", name):
        if path.is_file():
            fields = read_object(path)
        else:
            fields, _ = PreTrainedConfig.get_config_dict(name, revision=revision)
        _refuse_custom_code(name, fields)
        config = AutoConfig.from_pretrained(name, revision=revision, trust_remote_code=False)
    _refuse_what_is_no_causal_lm(name, config)
    quantization_options(name, config)
    return config


def load_base_config(source: ModelSource) -> Any:
    """The config of the model below a model's adapters.

    Raises:
        CheckpointError: as `load_config`, naming the adapter that asks for this base.
    """
    try:
        return load_config(source.base, source.revision)
    except CheckpointError as error:
        if not source.adapters:
            raise
        adapter = Path(source.adapters[0]) / ADAPTER_CONFIG
        reason = str(error).rstrip(".")
        raise CheckpointError(f"{reason} ({BASE_FIELD} of {adapter})") from error


def quantization_options(name: str, config: Any) -> dict[str, Any]:
    """What `from_pretrained` needs to make ordinary weights of quantized ones.

    Raises:
        CheckpointError: transformers cannot, so there is nothing to train.
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
        raise CheckpointError(
            f"model: {name} needs code of its own (model type {fields.get('model_type')!r}), which "
            "is never run here; only families that transformers itself has can be trained"
        )


def _refuse_what_is_no_causal_lm(name: str, config: Any) -> None:
    family = config.model_type
    if config.is_encoder_decoder:
        raise CheckpointError(
            f"model: {name} is an encoder-decoder model ({family}); preferences are trained on "
            "causal language models, which have a decoder alone"
        )
    if type(config) not in MODEL_FOR_CAUSAL_LM_MAPPING:
        raise CheckpointError(
            f"model: {name} is no causal language model: transformers has none of type {family}"
        )
    if not isinstance(getattr(config.get_text_config(), "vocab_size", None), int):
        raise CheckpointError(f"model: the config of {name} ({family}) has no vocab_size")
