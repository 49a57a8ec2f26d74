"""What of a model takes memory, counted on its twin without memory, for whatever family it is."""

from typing import Any, NamedTuple

from fastpref.errors import first_line
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
"""Rows of the smaller of two batches that are counted; the other one has twice as many."""


class Weights(NamedTuple):
    """Numbers of a model's weights."""

    total: int
    largest_block: int
    outside: int
    """In no block: embedding, head and last norm."""
    vocab_size: int
    """Rows of the head."""
    hidden_size: int
    """Columns of the head."""
    adapters: int = 0
    """In adapters, which the total does not count; all others are frozen where there are any."""
    in_four_bits: int = 0
    """Of the total."""

    def stored_bytes(self, itemsize: int) -> int:
        """Of all but the adapters, in a dtype."""
        # with the scales of blocks of 64, themselves in 8 bits: arXiv:2305.14314, section 3
        return (self.total - self.in_four_bits) * itemsize + int(self.in_four_bits * 4.127 / 8)


class TokenBytes(NamedTuple):
    """What a model's body takes for each token that it computes, in bytes."""

    kept: float
    """From the forward until the backward."""
    backward: float
    """Beside what is kept, at most, while the backward goes through the blocks."""
    fixed: float
    """At most, however many tokens there are: what adapters make of weights, and its gradient."""


def count_weights(model: Any, block_name: str | None, *, in_four_bits: bool = False) -> Weights:
    """Of a model, which may be on the meta device; each is counted once where it is tied.

    Args:
        model: Without adapters.
        in_four_bits: Whether the blocks' linear layers will be; they are replaced.
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
    """What the body takes for a token, from the difference between two batches.

    Args:
        model: On the meta device, in the dtype of the arithmetic; used up.
        body: See `LogitPath.body`.
        rows: What is computed.
        activation_checkpointing: Whether blocks are computed again in the backward.
        fused_layers: Whether norms and SwiGLU layers are fused kernels.
        balanced: Whether the balance of its router, if it has one, is part of the loss.

    Raises:
        ValueError: the family cannot be computed without memory, or not in rows that lie so.
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
        # of adapters the first forward makes something of their weights that is kept for good
        batches.insert(0, batches[0])
    try:
        small, large = [
            Passes.of_all_blocks(stack, model, body, batch, attention, router_logits)
            for batch in batches
        ][-2:]
    # of a family's own code: values that steer it, operators that have no meta kernel
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {first_line(error)}") from error
    if packed and not (attention.was_asked or mixers):
        raise ValueError("its attention is one of its own")
    few, many = (batch.input_ids.numel() for batch in batches[-2:])
    kept = (large.kept - small.kept) / (many - few)
    peak = (large.peak - small.peak) / (many - few)
    return TokenBytes(
        kept=kept, backward=max(0.0, peak - kept), fixed=max(0.0, small.peak - peak * few)
    )


def _take_gradients_off(model: Any) -> None:
    """What becomes of a weight's gradient is no matter of tokens."""
    embedding = model.get_input_embeddings()
    if embedding.weight.requires_grad:
        # a large table's is more than what few tokens take, and comes when all of that is gone
        embedding.weight.requires_grad_(False)
        embedding.register_forward_hook(lambda module, args, output: recorded(output))
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        parameter.register_post_accumulate_grad_hook(_forget)


def _forget(parameter: Any) -> None:
    parameter.grad = None
