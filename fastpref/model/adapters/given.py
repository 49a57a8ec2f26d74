"""Existing adapters used unmerged beside an unchanged base: checks, and loading their weights."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from fastpref.config import AdapterConfig
from fastpref.errors import CheckpointError, ConfigError
from fastpref.model.adapters.folders import PREFIX, check_adapter, load_headers, no_fit
from fastpref.model.adapters.targets import whole_names
from fastpref.model.adapters.tied_head import TIED, head_names, is_tied, without_head
from fastpref.model.files.reading import reading

MORE_PARTS = (
    *("modules_to_save", "trainable_token_indices", "alora_invocation_tokens"),
    *("kasa_config", "arrow_config"),
)
"""Fields of peft's config that add more than low-rank matrices to the base: other trained weights,
changed weights of the base (KaSA), other adapters."""
MOVING_INITS = ("pissa", "olora", "corda", "loftq", "lora_ga")
"""Initializations of peft that change the weights of the base."""


def given_config(folder: str) -> Any:
    """The config of an adapter that can be used unmerged beside its unchanged base.

    Raises:
        CheckpointError: it cannot; names the reason.
    """
    from peft import LoraConfig, PeftConfig

    check_adapter(folder)
    with reading("the adapter", folder):
        config: Any = PeftConfig.from_pretrained(folder)
    # AdaLoRA's config is a subclass
    if type(config) is not LoraConfig:
        raise not_beside(folder, f"is {config.peft_type.value}, of which LoRA alone can be")
    if config.bias != "none":
        raise not_beside(
            folder, f"has bias={config.bias}: it moves biases that are the reference's too"
        )
    for name in MORE_PARTS:
        value = getattr(config, name, None)
        if value:
            raise not_beside(folder, f"has {name}={value}")
    if str(config.init_lora_weights).startswith(MOVING_INITS):
        raise not_beside(
            folder, f"has init_lora_weights={config.init_lora_weights}, which moved its base"
        )
    config.inference_mode = False
    # the run's own option decides what is dropped, and where nothing is trained, nothing is
    config.lora_dropout = 0.0
    # its values are loaded
    config.init_lora_weights = True
    return config


def not_beside(folder: str, found: str) -> CheckpointError:
    """The error for an adapter that cannot be used unmerged beside its unchanged base."""
    return CheckpointError(
        f"model: the adapter {folder} {found}; it cannot be used beside a model that stays as it "
        "is: adapter=none merges it and trains the whole model"
    )


def check_asked(folder: str, config: Any, options: AdapterConfig, model: Any) -> None:
    """Refuse options that contradict an existing adapter.

    Args:
        folder: Of the adapter.
        config: peft's.
        options: Requested options.
        model: The model that the adapter will be inserted into.

    Raises:
        ConfigError: naming both values.
    """
    if options.init != "kaiming":
        raise ConfigError(
            f"adapter.init={options.init} has no effect on the adapter {folder}, which has values"
        )

    def ends(modules: Any) -> list[str]:
        tied = config.ensure_weight_tying and is_tied(model)
        return without_head(model, modules) if tied else sorted(whole_names(model, modules))

    asked: dict[str, Any] = {
        "r": options.r,
        "lora_alpha": options.alpha,
        "use_rslora": options.use_rslora or None,
        "ensure_weight_tying": options.ensure_weight_tying or None,
        "target_modules": options.target_modules and ends(options.target_modules),
        "target_parameters": options.target_parameters and sorted(options.target_parameters),
    }
    for name, value in asked.items():
        has = getattr(config, name)
        if name == "target_modules" and not isinstance(has, str):
            has = ends(has or ())
        if name == "target_parameters":
            has = sorted(has or ())
        if value not in (None, has):
            raise ConfigError(
                f"adapter.{name.removeprefix('lora_')}={value} does not fit the adapter {folder}, "
                f"which has {has}; leave it out to train that one on"
            )


def check_given(model: Any, folder: str, name: str) -> None:
    """Refuse an adapter that does not fit its base, by the headers of its weights.

    Args:
        model: On the meta device, with the adapter in place.
        folder: Of the adapter.
        name: peft's name of the adapter.

    Raises:
        CheckpointError: see `check_whole_matrices` and `fill_adapter`.
    """
    headers = load_headers(folder)
    check_whole_matrices(model, folder, headers)
    fill_adapter(model, folder, name, headers)


def check_whole_matrices(model: Any, folder: str, saved: Mapping[str, Tensor]) -> None:
    """Refuse an adapter folder with whole matrices that differ from the model's own.

    Args:
        model: With adapters in place.
        folder: Of the adapter.
        saved: Tensors of the folder; on the meta device only their shapes are compared.

    Raises:
        CheckpointError: it has some.
    """
    own = {_bare(name): tensor for name, tensor in model.state_dict().items()}
    other = [
        name
        for name, tensor in saved.items()
        if not adapter_part(name) and not _is_same(tensor, own.get(_bare(name)))
    ]
    if other:
        raise not_beside(
            folder, f"has whole matrices of its own ({', '.join(other[:4])}), as for added tokens"
        )


def _bare(name: str) -> str:
    """The name of a matrix in a model without adapters."""
    return name.removeprefix(PREFIX).replace(".base_layer", "")


def _is_same(tensor: Tensor, own: Tensor | None) -> bool:
    """Whether a saved matrix is a model's own, which may be stored in another dtype."""
    if own is None or own.shape != tensor.shape:
        return False
    return tensor.is_meta or torch.equal(tensor.to(own.dtype), own)


def fill_adapter(model: Any, folder: str, name: str, saved: Mapping[str, Tensor]) -> None:
    """Load the low-rank matrices of a folder into an adapter of a model.

    Args:
        model, folder, saved: See `check_whole_matrices`.
        name: peft's name of the adapter.

    Raises:
        CheckpointError: tensors are missing, unexpected, or of other shapes.
    """
    from peft import set_peft_model_state_dict

    weights = {key.removeprefix(PREFIX): x for key, x in saved.items() if adapter_part(key)}
    if hasattr(model.get_output_embeddings(), TIED):
        of_head = head_names(model)
        weights = {key: x for key, x in weights.items() if key not in of_head}
    with reading("the adapter", folder):
        result: Any = set_peft_model_state_dict(model, weights, adapter_name=name)
    missing = [key for key in result.missing_keys if is_of(key, name)]
    spare = list(result.unexpected_keys)
    if missing or spare:
        raise no_fit(folder, missing, spare, model)


def adapter_part(parameter: str) -> bool:
    """Whether a parameter, given by name, belongs to an adapter."""
    return any(part.startswith("lora_") for part in parameter.split("."))


def is_of(parameter: str, adapter: str) -> bool:
    """Whether a parameter, given by name, belongs to this adapter."""
    return adapter_part(parameter) and adapter in parameter.split(".")
