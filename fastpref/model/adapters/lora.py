"""Low-rank adapters inside a frozen model (LoRA, arXiv:2106.09685): peft's layers, put in place.

Only layers are replaced, so the model keeps its class; peft's own wrapper around a model would hide
its body, and would compute logits.
"""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import dropout

from fastpref.config import AdapterConfig
from fastpref.distributed import World
from fastpref.errors import ConfigError
from fastpref.model.adapters.folders import PREFIX, load_adapter
from fastpref.model.adapters.given import (
    adapter_part,
    check_asked,
    check_given,
    check_whole_matrices,
    fill_adapter,
    given_config,
    is_of,
)
from fastpref.model.adapters.inject import inject_adapter
from fastpref.model.adapters.low_rank import share_input
from fastpref.model.adapters.quantize import quantize_blocks
from fastpref.model.adapters.targets import choose_targets
from fastpref.model.adapters.tied_head import (
    TIED,
    head_state,
)

logger = logging.getLogger("fastpref")

TRAINED, GIVEN = "default", "reference"
"""Adapter names in peft's layers: the one being trained, and the one that training started from."""


class Adapters:
    """The adapters of a model: which of them is active, and their gradients.

    Args:
        model: With peft's layers in place; all else of it is frozen.
        config: peft's, of the adapter that is trained, or of any.
        reference: Name of the adapter that the reference uses; None: it is the bare model.
    """

    def __init__(self, model: nn.Module, config: Any, *, reference: str | None = None) -> None:
        from peft.tuners.tuners_utils import BaseTunerLayer

        self.config = config
        self._reference = reference
        self._layers: list[Any] = [m for m in model.modules() if isinstance(m, BaseTunerLayer)]
        kept = (share_input(layer) for layer in self._layers)
        self._parts = [parts for parts in kept if parts is not None]
        self._parameters = [p for name, p in model.named_parameters() if adapter_part(name)]

    @property
    def continued(self) -> bool:
        """Whether training started from an existing adapter, which the reference uses."""
        return self._reference is not None

    @property
    def num_layers(self) -> int:
        """Number of layers of the model that have an adapter."""
        return len(self._layers)

    def check_shardable(self) -> None:
        """Refuse adapters of a sharded model that read their base matrix while it is not gathered.

        Raises:
            ConfigError: naming them.
        """
        if self.config.target_parameters:
            raise ConfigError(
                f"adapter.target_parameters={list(self.config.target_parameters)}: matrices that "
                "are no layers have adapters only where every process has the whole model; set "
                "adapter.base=replicated, or adapter.target_modules alone"
            )

    def forget_parts(self) -> None:
        """Clear what is cached of the parameters, because they have changed."""
        for parts in self._parts:
            parts.forget()

    def trained(self) -> list[nn.Parameter]:
        """The trainable parameters of the adapters."""
        return [parameter for parameter in self._parameters if parameter.requires_grad]

    def parameters(self) -> list[nn.Parameter]:
        """All parameters of all adapters; float32, and whole on every rank."""
        return list(self._parameters)

    def activate(self, name: str | None) -> None:
        """Activate one adapter and no other; None: the bare model."""
        # peft's own switches also change requires_grad, which must stay as FSDP2 found it
        for layer in self._layers:
            layer._disable_adapters = name is None
            if name is not None:
                layer._active_adapter = [name]

    @contextmanager
    def as_reference(self) -> Iterator[None]:
        """Context in which the model computes as it did before training."""
        self.activate(self._reference)
        try:
            yield
        finally:
            self.activate(TRAINED)

    def sum_gradients(self) -> None:
        """All-reduce (sum) the gradients of the adapters, which every rank holds whole."""
        gradients = []
        for parameter in self.trained():
            if parameter.grad is None:
                # this rank had no rows
                parameter.grad = torch.zeros_like(parameter)
            gradients.append(parameter.grad)
        flat = torch.cat([gradient.flatten() for gradient in gradients])
        dist.all_reduce(flat)
        for gradient, summed in zip(
            gradients, flat.split([g.numel() for g in gradients]), strict=True
        ):
            gradient.copy_(summed.view_as(gradient))


class _TrainingDropout(nn.Dropout):
    """Dropout wherever gradients are recorded: a trained model stays in evaluation mode."""

    def forward(self, input: Tensor) -> Tensor:
        return dropout(input, self.p, torch.is_grad_enabled())


def add_adapters(
    model: Any,
    options: AdapterConfig,
    world: World,
    *,
    block_name: str | None,
    seed: int,
    start: str | None = None,
) -> Adapters:
    """Freeze a model and insert adapters to train, after quantizing its layers if requested.

    Args:
        model: A causal LM of transformers, on the CPU.
        options: Adapter options.
        world: The ranks.
        block_name: Class of the transformer blocks, None: found from the model.
        seed: Of the initial values; the run's random state is left alone.
        start: Folder of the adapter to train on; None: new ones, which change nothing yet.

    Raises:
        ConfigError: an option does not fit the model or the folder.
        CheckpointError: the folder's adapter does not fit the model, or cannot be trained on.
    """
    if options.quantized:
        quantize_blocks(model, block_name, world)
    adapters = insert_adapters(model, options, block_name, start)
    if start is None:
        _draw(model, adapters.config, seed)
    else:
        saved = load_adapter(start)
        world.on_main(lambda: check_whole_matrices(model, start, saved))
        for name in (TRAINED, GIVEN):
            fill_adapter(model, start, name, saved)
    return adapters


def insert_adapters(
    model: Any, options: AdapterConfig, block_name: str | None, start: str | None
) -> Adapters:
    """Freeze a model and insert uninitialized adapters; it may be on the meta device.

    Args:
        model, options, block_name, start: See `add_adapters`.

    Raises:
        ConfigError, CheckpointError: see `add_adapters`.
    """
    if start is None:
        config = _new_config(model, options, block_name)
    else:
        config = given_config(start)
        check_asked(start, config, options, model)
        config.lora_dropout = options.dropout
    for name in (TRAINED,) if start is None else (TRAINED, GIVEN):
        inject_adapter(model, config, name, folder=start)
    if options.dropout:
        _drop_in_training(model, options.dropout)
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(is_of(name, TRAINED))
    if start is not None and next(model.parameters()).is_meta:
        check_given(model, start, TRAINED)
    adapters = Adapters(model, config, reference=GIVEN if start is not None else None)
    adapters.activate(TRAINED)
    return adapters


def add_given_adapters(
    model: Any,
    folders: Mapping[str, str],
    world: World,
    *,
    quantized: bool = False,
    block_name: str | None = None,
) -> Adapters:
    """Insert existing adapters into a model that is not trained; none is active at first.

    Args:
        model: A causal LM of transformers, on the CPU.
        folders: Adapter folders by adapter name.
        world: The ranks.
        quantized: Quantize the layers of the model's blocks to 4 bits first.
        block_name: Class of the transformer blocks, None: found from the model.

    Raises:
        CheckpointError: one does not fit the model, or is of a kind that can only be merged.
    """
    if quantized:
        quantize_blocks(model, block_name, world)
    configs = {name: given_config(folder) for name, folder in folders.items()}
    for name, folder in folders.items():
        inject_adapter(model, configs[name], name, folder=folder)
        saved = load_adapter(folder)
        world.on_main(partial(check_whole_matrices, model, folder, saved))
        fill_adapter(model, folder, name, saved)
    model.requires_grad_(False)
    adapters = Adapters(model, next(iter(configs.values()), None))
    adapters.activate(None)
    return adapters


def check_beside(model: Any, folder: str) -> None:
    """Refuse an adapter that cannot stand beside its base, before weights are read.

    Args:
        model: The base on the meta device; modified.
        folder: Of the adapter.

    Raises:
        CheckpointError: see `add_given_adapters`; values of whole matrices are not compared.
    """
    inject_adapter(model, given_config(folder), GIVEN, folder=folder)
    check_given(model, folder, GIVEN)


def adapter_state(model: Any) -> dict[str, Tensor]:
    """The trained adapter's tensors by their names in a peft folder."""
    from peft import get_peft_model_state_dict

    state = get_peft_model_state_dict(model, adapter_name=TRAINED, save_embedding_layers=False)
    if hasattr(model.get_output_embeddings(), TIED):
        state |= head_state(model, state)
    return {PREFIX + name: tensor.detach() for name, tensor in state.items()}


def _new_config(model: Any, options: AdapterConfig, block_name: str | None) -> Any:
    from peft import LoraConfig

    r = 16 if options.r is None else options.r
    modules, parameters = choose_targets(model, options, block_name)
    arguments: dict[str, Any] = {
        "task_type": "CAUSAL_LM",
        "r": r,
        # written without a fraction where it has none, as peft types it
        "lora_alpha": _whole(2 * r if options.alpha is None else options.alpha),
        "lora_dropout": options.dropout,
        "use_rslora": options.use_rslora,
        "init_lora_weights": True if options.init == "kaiming" else options.init,
        "target_modules": modules,
        "target_parameters": parameters or None,
        "ensure_weight_tying": options.ensure_weight_tying,
    }
    return LoraConfig(**arguments)


def _draw(model: nn.Module, config: Any, seed: int) -> None:
    """Initialize new adapters; the values depend on the seed, and not on the model's dtype."""
    from peft.tuners.lora import LoraLayer

    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        for layer in model.modules():
            if isinstance(layer, LoraLayer):
                layer.reset_lora_parameters(TRAINED, config.init_lora_weights)


def _drop_in_training(model: nn.Module, share: float) -> None:
    for module in list(model.modules()):
        layers = getattr(module, "lora_dropout", None)
        if isinstance(layers, nn.ModuleDict) and TRAINED in layers:
            layers[TRAINED] = _TrainingDropout(share)


def _whole(number: float) -> int | float:
    return int(number) if number == int(number) else number
