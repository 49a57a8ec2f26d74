"""The two models of an estimation, which must have the same vocabulary."""

from collections.abc import Sequence
from functools import partial
from typing import Any

from fastpref.config import AdapterConfig, ModelConfig, PackingConfig, WeightsConfig
from fastpref.data.weights_file import ModelOrigin
from fastpref.distributed import World
from fastpref.errors import CheckpointError, ConfigError
from fastpref.model.beforehand import check_options
from fastpref.model.files.identity import model_identity, side_model
from fastpref.model.files.paths import named_model
from fastpref.model.filling import check_scoring_files
from fastpref.model.precision import precision_here
from fastpref.model.source import load_model_tokenizer
from fastpref.scoring.side import Side
from fastpref.tisdpo.templates import template_text


def build_sides(
    weights: WeightsConfig,
    model: ModelConfig,
    adapter: AdapterConfig,
    packing: PackingConfig,
    world: World,
) -> list[Side]:
    """Resolve and check the positive and the negative model.

    Args:
        weights: Names of both models, and their prompt templates.
        model: The run's model options: precision and attention of both.
        adapter: The run's adapter options: whether the base of adapters is quantized to 4 bits.
        packing: How rows are packed.

    Raises:
        CheckpointError: a model is missing.
        ConfigError: a model does not support an option.
    """
    assert weights.positive and weights.negative and weights.output_dir
    names = {"positive": weights.positive, "negative": weights.negative}
    templates = {"positive": weights.positive_template, "negative": weights.negative_template}
    model, twins = precision_here(model, world), {}
    models = {label: side_model(model, name) for label, name in names.items()}
    for label, own in models.items():
        named_model(own, key=f"weights.{label}")
        twins[label] = check_options(own, adapter, packing, trainable=False).model
    is_shared = world.on_main(lambda: check_scoring_files(list(models.values())))
    if adapter.quantized and not is_shared:
        raise ConfigError(
            "adapter=qlora: weights.positive and weights.negative must be one model, or adapters "
            "of one that can stand beside it in 4 bits"
        )
    sides = []
    for label, own in models.items():
        # last, and on one rank only: it reads gigabytes of weights
        identity = world.on_main(partial(model_identity, own))
        if adapter.quantized:
            identity += ", its base in 4 bits"
        origin = ModelOrigin(
            name_or_path=names[label], identity=identity, template=template_text(templates[label])
        )
        sides.append(Side(label, own, twins[label], origin, adapter.quantized))
    return sides


def shared_tokenizer(sides: Sequence[Side]) -> Any:
    """The tokenizer of both models.

    Raises:
        CheckpointError: their vocabularies differ, so their tokens cannot be compared.
    """
    positive, negative = (
        load_model_tokenizer(side.model, key=f"weights.{side.label}") for side in sides
    )
    if positive.get_vocab() != negative.get_vocab():
        raise CheckpointError(
            f"weights.negative: the tokenizer of {sides[1].origin.name_or_path} has another "
            f"vocabulary than that of weights.positive ({sides[0].origin.name_or_path})"
        )
    return positive
