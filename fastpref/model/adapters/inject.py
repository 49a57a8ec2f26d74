"""Insert peft's layers into a model, uninitialized; refuses models that cannot take them."""

import dataclasses
import warnings
from typing import Any

import torch

from fastpref.errors import CheckpointError, ConfigError, FastprefError, first_line
from fastpref.model.adapters.given import is_of, not_beside
from fastpref.model.adapters.tied_head import (
    is_tied,
    obstacle_of_head,
    shared_table,
    tie_head,
    without_head,
)
from fastpref.model.files.reading import reading


def inject_adapter(model: Any, config: Any, name: str, *, folder: str | None) -> None:
    """Insert an uninitialized adapter into a model; `folder` only matters to errors."""
    from peft import inject_adapter_in_model

    ties = config.ensure_weight_tying and is_tied(model)
    if ties:
        config.target_modules = without_head(model, config.target_modules)
    try:
        with torch.random.fork_rng(devices=[]), warnings.catch_warnings():
            # that there is an adapter already, and other warnings that a user cannot act on
            warnings.simplefilter("ignore")
            # tied heads are handled here, not by peft
            own = dataclasses.replace(config, ensure_weight_tying=False)
            # peft's option for adapters on the meta device; DoRA's need their layers' weights
            is_meta = next(model.parameters()).is_meta
            inject_adapter_in_model(own, model, name, low_cpu_mem_usage=is_meta)
    except Exception as error:
        if "lora_dropout" in str(error):
            raise ConfigError(
                f"adapter.dropout={config.lora_dropout:g}: peft drops no input of a matrix that is "
                "no layer by itself, such as a mixture's experts; set adapter.dropout=0, or name "
                "layers alone in adapter.target_modules"
            ) from error
        if folder is not None:
            # a wrong value in its config may raise an error of any class
            with reading("the adapter", folder):
                raise
        if isinstance(error, (ValueError, NotImplementedError)):  # peft names what it cannot adapt
            raise ConfigError(f"adapter.target_modules: {first_line(error)}") from error
        raise
    if ties:
        tie_head(model)
    elif shared := shared_table(model, name):
        raise _one_table(shared, folder)
    obstacle = obstacle_of_head(model, name)
    if obstacle and folder is not None:
        raise not_beside(folder, obstacle)
    if obstacle:
        raise ConfigError(f"adapter.target_modules: {obstacle}")
    for path, parameter in model.named_parameters():
        if is_of(path, name):
            # peft gives them the dtype of their layer
            parameter.data = parameter.data.float()


def _one_table(shared: str, folder: str | None) -> FastprefError:
    """Error for an adapter on only one of two tied tables, see `inject_adapter`."""
    if folder is None:
        return ConfigError(
            f"adapter.target_modules: {shared}; adapter.ensure_weight_tying=true adapts both alike"
        )
    return CheckpointError(
        f"model: the adapter {folder}: {shared}; only one that was trained with "
        "ensure_weight_tying=true, which adapts both alike, can be used"
    )
