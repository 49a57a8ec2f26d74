"""From a run's options to its memory plan: builds the model on the meta device and counts."""

import logging
import math
from importlib.util import find_spec
from typing import Any, NamedTuple

import torch
from fastpref_kernels.workspace import get_workspace_mib, workspace_bytes

from fastpref.config import TrainingOptions
from fastpref.memory.count import TokenBytes, Weights, count_token_bytes, count_weights
from fastpref.memory.plan import GIB, Device, HeadBytes, MemoryPlan, Sizes, plan_memory
from fastpref.memory.worst_rows import Rows
from fastpref.model.adapters.base import find_adapter_base
from fastpref.model.adapters.lora import insert_adapters
from fastpref.model.adapters.tied_head import numbers_of_adapted_head
from fastpref.model.files.paths import named_model
from fastpref.model.frozen import frozen_dtype
from fastpref.model.liger import FAMILIES
from fastpref.model.source import build_meta

logger = logging.getLogger("fastpref")

AUTO_TOKENS = 32_768
"""Maximum micro-batch size of `packing.max_tokens=auto`, in tokens. On an H100 Qwen2.5-0.5B gained
4 % from twice as many, at 1.8 times the memory: by then the fixed cost of a micro-batch is a
twentieth of its time, and less in a larger model."""


class Measured(NamedTuple):
    """Facts measured on loaded models and data, or assumed if nothing is loaded."""

    body: str | None
    """See `LogitPath.body`; None for the model's `base_model`."""
    rows: Rows
    """Rows to train on; their layout has the default token limit."""
    state_bytes: int
    """Optimizer state per trained parameter, in bytes."""


class Counted(NamedTuple):
    """Parameter counts of a model, memory per token of its body, and bytes per parameter."""

    weights: Weights
    tokens: TokenBytes
    sizes: Sizes
    num_exponentials: int
    """Exponentials per scored token and vocabulary entry that the head may keep: 2 with a KL (both
    models), else 1; 0 if the head is frozen."""
    adapted_head: int
    """Elements of the head's weight concatenated with its adapter; 0 if it has no adapter."""

    @property
    def stored_bytes(self) -> int:
        """Bytes of a frozen model with its adapters."""
        adapters = (self.weights.adapters + self.weights.given) * self.sizes.master
        return self.weights.stored_bytes(self.sizes.compute) + adapters

    def plan(self, device: Device) -> MemoryPlan:
        """Memory plan of training on a device, see `plan_memory`."""
        weights, sizes = self.weights, self.sizes
        head = HeadBytes(workspace_bytes(weights.vocab_size, weights.hidden_size, device.type))
        # the concatenated head and its gradient
        head = head._replace(fixed=head.fixed + 2 * self.adapted_head * sizes.compute)
        if device.type == "cuda" and self.num_exponentials:
            head = head._replace(
                per_token=self.num_exponentials * weights.vocab_size * sizes.compute,
                limit=int(get_workspace_mib() * 2**20),
            )
        return plan_memory(weights, self.tokens, sizes, device, head=head)


def count_training(training: TrainingOptions, measured: Measured, device: Device) -> Counted:
    """Count a run's models, built on the meta device.

    Args:
        measured: Facts about models and data, or assumptions if none are loaded.

    Raises:
        FastprefError: the model does not exist.
        ValueError: the family cannot run on the meta device, or not with this layout of rows.
    """
    options, adapter = training.model, training.adapter
    source = named_model(options)
    start = None
    if adapter.trained:
        source, start = find_adapter_base(options)
    model: Any = build_meta(source, dtype=getattr(torch, options.compute_dtype))
    body = _body(model) if measured.body is None else measured.body
    if adapter.trained:
        weights = count_weights(model, options.block_name, in_four_bits=adapter.quantized)
        adapters = insert_adapters(model, adapter, options.block_name, start)
        trained, whole = (
            sum(parameter.numel() for parameter in parameters)
            for parameters in (adapters.trained(), adapters.parameters())
        )
        weights = weights._replace(adapters=trained, given=whole - trained)
    else:
        weights = count_weights(model, options.block_name)
    reference = None
    if training.has_reference:
        own = adapter.trained
        reference = 0 if own else _itemsize(frozen_dtype(options, beside_policy=True))
    tokens = count_token_bytes(
        model,
        body=body,
        rows=measured.rows,
        block_name=options.block_name,
        activation_checkpointing=training.activation_checkpointing,
        fused_layers=_has_fused_layers(model, training, device),
        balanced=options.router_coefficient != 0,
    )
    sizes = Sizes(
        master=4 if adapter.trained else _itemsize(options.policy_dtype),
        compute=_itemsize(options.compute_dtype),
        state=measured.state_bytes,
        reference=reference,
    )
    adapted_head = numbers_of_adapted_head(model) if adapter.trained else 0
    is_trained = not adapter.trained or adapted_head > 0
    needs = training.loss.needs
    has_kl = training.has_reference and (needs.kl or needs.metrics_kl) is not None
    num_exponentials = (2 if has_kl else 1) * is_trained
    return Counted(weights, tokens, sizes, num_exponentials, adapted_head)


def auto_tokens(plan: MemoryPlan, available: int) -> int:
    """Micro-batch size in tokens for `available` bytes, at most `AUTO_TOKENS` and at least 1."""
    return rounded(min(AUTO_TOKENS, plan.most_tokens(available)))


def rounded(num_tokens: int) -> int:
    """Round down to a multiple of 256; numbers below 256 are kept, but at least 1."""
    return max(1, num_tokens if num_tokens < 256 else num_tokens // 256 * 256)


def most_step_tokens(training: TrainingOptions, num_ranks: int, *, longest: int) -> int:
    """Upper bound of a rank's tokens per step: all rows as long as the longest.

    Args:
        num_ranks: Data-parallel ranks.
        longest: Tokens of the longest sequence.
    """
    num_rows = math.ceil(training.batch_size / num_ranks)
    return num_rows * (2 if training.loss.needs.pairs else 1) * longest


def describe_plan(plan: MemoryPlan, num_tokens: int, available: int) -> str:
    """Format a plan on one line, in GiB."""
    parts = ", ".join(
        f"{name} {size / GIB:.2f}" for name, size in plan.parts().items() if size > 0.005 * GIB
    )
    return (
        f"memory, planned: {plan.fixed / GIB:.2f} GiB ({parts}) and "
        f"{plan.kept_per_token / 2**20:.2f} MiB a token; {num_tokens:,} tokens at once take "
        f"{plan.peak(num_tokens) / GIB:.2f} of {available / GIB:.1f} GiB"
    )


def _body(model: Any) -> str:
    names = {module: name for name, module in model.named_modules()}
    return names.get(model.base_model, "")


def _has_fused_layers(model: Any, training: TrainingOptions, device: Device) -> bool:
    wish = training.model.liger
    is_possible = device.type == "cuda" and model.config.model_type in FAMILIES
    # when planning for a GPU from a machine without one, assume that liger-kernel is installed
    is_there = not torch.cuda.is_available() or find_spec("liger_kernel") is not None
    return wish != "false" and is_possible and is_there and training.compile != "true"


def _itemsize(dtype: str) -> int:
    return getattr(torch, dtype).itemsize
