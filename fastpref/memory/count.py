"""Memory use of a model, counted on a copy on the meta device, for any model family."""

from typing import Any, NamedTuple

from fastpref.errors import in_a_line
from fastpref.memory.passes import Passes
from fastpref.memory.stack import find_stack
from fastpref.memory.stand_ins import (
    CountedAttention,
    recorded,
    replace_layers,
    stand_in_four_bits,
)
from fastpref.memory.worst_rows import Rows
from fastpref.model.adapters.quantize import quantizable_layers
from fastpref.model.attention.interface import IMPLEMENTATION
from fastpref.model.blocks import find_blocks
from fastpref.model.mixers import find_mixers
from fastpref.model.parallelize import wrap_blocks
from fastpref.model.rotary import keep_steady
from fastpref.model.router import has_router

_ROWS = 4
"""Rows of the smaller of the two batches that are counted; the larger one has twice as many."""


class Weights(NamedTuple):
    """Parameter counts of a model."""

    total: int
    largest_block: int
    outside: int
    """Parameters outside of the blocks: embedding, head and final norm."""
    vocab_size: int
    """Rows of the head."""
    hidden_size: int
    """Columns of the head."""
    adapters: int = 0
    """Trained adapter parameters, not included in `total`; if > 0, all others are frozen."""
    given: int = 0
    """Parameters of the adapter that training started from, which the reference uses; frozen."""
    in_four_bits: int = 0
    """Parameters of `total` that are quantized to 4 bits."""

    def stored_bytes(self, itemsize: int) -> int:
        """Bytes of all parameters except adapters, with `itemsize` bytes per unquantized one."""
        # 4.127 bits: with 8-bit scales per block of 64 weights (arXiv:2305.14314, section 3)
        return (self.total - self.in_four_bits) * itemsize + int(self.in_four_bits * 4.127 / 8)


class TokenBytes(NamedTuple):
    """Memory of a model's body, in bytes; `kept` and `backward` are per token."""

    kept: float
    """Activations kept from the forward to the backward, per token."""
    backward: float
    """Additional peak during the backward through the blocks, per token."""
    fixed: float
    """Peak independent of the number of tokens: weights computed by adapters, their gradients."""


def count_weights(model: Any, block_name: str | None, *, in_four_bits: bool = False) -> Weights:
    """Count a model's parameters, tied ones once.

    Args:
        model: Model without adapters, possibly on the meta device.
        in_four_bits: Whether the blocks' linear layers will be quantized to 4 bits; they are then
            replaced by stand-ins, in place.
    """
    blocks = [
        sum(parameter.numel() for parameter in block.parameters())
        for block in find_blocks(model, block_name)
    ]
    total = sum(parameter.numel() for parameter in model.parameters())
    rows, columns = model.get_output_embeddings().weight.shape
    packed = 0
    if in_four_bits:
        packed = sum(x.weight.numel() for _, _, x in quantizable_layers(model, block_name))
        stand_in_four_bits(model, block_name)
    return Weights(
        total,
        max(blocks, default=0),
        total - sum(blocks),
        rows,
        columns,
        in_four_bits=packed,
    )


def count_token_bytes(
    model: Any,
    *,
    body: str,
    rows: Rows,
    block_name: str | None,
    activation_checkpointing: bool,
    fused_layers: bool,
    balanced: bool = False,
) -> TokenBytes:
    """Memory of the body per token, from the difference between two batch sizes.

    Args:
        model: Model on the meta device, in the compute dtype; not usable afterwards.
        body: See `LogitPath.body`.
        rows: Kind of rows that are computed.
        activation_checkpointing: Whether blocks are recomputed in the backward.
        fused_layers: Whether norms and SwiGLU layers are fused kernels.
        balanced: Whether the load-balancing loss of a router, if any, is part of the loss.

    Raises:
        ValueError: the family cannot run on the meta device, or not with this layout of rows.
    """
    router_logits = balanced and bool(body) and has_router(model)
    blocks = find_blocks(model, block_name)
    mixers, obstacle = find_mixers(model, blocks)
    batches = [rows.batch(number, long_prompts=bool(mixers)) for number in (_ROWS, 2 * _ROWS)]
    packed = batches[0].layout is not None
    if packed and obstacle is not None:
        raise ValueError(obstacle)
    model.eval()
    if packed:
        model.set_attn_implementation(IMPLEMENTATION)
    keep_steady(model)
    if fused_layers:
        replace_layers(model)
    wrap_blocks(model, block_name, activation_checkpointing=activation_checkpointing, packed=packed)
    _take_gradients_off(model)
    stack = find_stack(model, blocks)
    attention = CountedAttention(gathers_keys=rows.gathers_keys)
    if not all(parameter.requires_grad for parameter in model.parameters()):
        # with adapters the first forward creates tensors that persist: run it once uncounted
        batches.insert(0, batches[0])
    try:
        small, large = [
            Passes.of_all_blocks(stack, model, body, batch, attention, router_logits)
            for batch in batches
        ][-2:]
    # raised by the family's own code: data-dependent control flow, operators without meta kernel
    except Exception as error:
        raise ValueError(in_a_line(error)) from error
    if packed and not (attention.was_asked or mixers):
        raise ValueError("its attention is one of its own")
    few, many = (batch.input_ids.numel() for batch in batches[-2:])
    kept = (large.kept - small.kept) / (many - few)
    peak = (large.peak - small.peak) / (many - few)
    return TokenBytes(
        kept=kept, backward=max(0.0, peak - kept), fixed=max(0.0, small.peak - peak * few)
    )


def _take_gradients_off(model: Any) -> None:
    """Exclude gradients of weights from the count, as they do not depend on the tokens."""
    embedding = model.get_input_embeddings()
    if embedding.weight.requires_grad:
        # a large embedding's gradient would exceed the memory of few tokens; in training it is
        # allocated after their activations are freed
        embedding.weight.requires_grad_(False)
        embedding.register_forward_hook(lambda module, args, output: recorded(output))
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        parameter.register_post_accumulate_grad_hook(_forget)


def _forget(parameter: Any) -> None:
    parameter.grad = None
