"""Checks of a recipe's weight estimation, made before the training stages that precede it."""

from collections.abc import Sequence

from fastpref.data.announce import read_files
from fastpref.data.options import data_options
from fastpref.data.weights_file import ModelOrigin
from fastpref.model.beforehand import check_options
from fastpref.model.positions import position_limit
from fastpref.model.source import load_model_tokenizer
from fastpref.scoring.side import Side
from fastpref.tisdpo.jobs import JobOptions, build_job
from fastpref.tisdpo.stages import Stage
from fastpref.tisdpo.templates import template_text


def check_estimation(stages: Sequence[Stage]) -> None:
    """Refuse rows that the estimation cannot score. Unlike training it does not truncate them.

    Args:
        stages: All stages of a recipe of which none is done.

    Raises:
        DataError: a row is longer than the model's position table, or its responses have other
            tokens under a template.
    """
    model = stages[0].config.model
    [config] = (s.config for s in stages if s.config.task == "estimate_weights")
    if config is stages[0].config:
        # the estimation comes first, and checks the rows itself
        return
    weights, data = config.weights, data_options(config)
    templates = [template_text(weights.positive_template), template_text(weights.negative_template)]
    twin = check_options(model, config.adapter, config.packing, trainable=False).model
    if position_limit(twin) is None and not any(templates):
        return
    chat = data.encode.chat(load_model_tokenizer(model))
    options = JobOptions(weights=weights, data=data, packing=config.packing)
    start = model.archive or model.name_or_path
    sides = [
        Side(label, model, twin, ModelOrigin(name_or_path=start, identity="", template=text), False)
        for label, text in zip(("positive", "negative"), templates, strict=True)
    ]
    for rows in read_files(data, quiet=True):
        build_job(options, sides, rows, chat, options.path_of(rows))
