"""What of a model takes memory, counted on its twin without memory, for whatever family it is."""

from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.errors import first_line
from fastpref.memory.live_bytes import LiveBytes
from fastpref.memory.stack import SHALLOW, Stack, find_stack
from fastpref.memory.stand_ins import ATTENTION, replace_layers
from fastpref.model.attention.interface import IMPLEMENTATION, PackedRow
from fastpref.model.blocks import find_blocks
from fastpref.model.logit_path import last_hidden_states
from fastpref.model.parallelize import wrap_blocks
from fastpref.model.quantize import linear_layers
from fastpref.model.rotary import keep_steady
from fastpref.model.router import has_router, states_and_router_logits

_ROWS = 8
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
        """Of all but the adapters, in a dtype.

        Args:
            itemsize: Of the dtype, bytes.
        """
        # with the scales of blocks of 64, themselves in 8 bits: arXiv:2305.14314, section 3
        return (self.total - self.in_four_bits) * itemsize + int(self.in_four_bits * 4.127 / 8)


class TokenBytes(NamedTuple):
    """What a model's body takes for each token that it computes, in bytes."""

    kept: float
    """From the forward until the backward."""
    backward: float
    """Beside what is kept, at most, while the backward goes through the blocks."""
    gathered_keys: float
    """Kept for every key that is gathered for a further branch of a prompt."""


def count_weights(model: Any, block_name: str | None, *, in_four_bits: bool = False) -> Weights:
    """Of a model, which may be on the meta device; each is counted once where it is tied.

    Args:
        model: Without adapters.
        block_name: Class of its blocks; None: found from the model.
        in_four_bits: Whether the blocks' linear layers will be.
    """
    blocks = [
        sum(parameter.numel() for parameter in block.parameters())
        for block in find_blocks(model, block_name)
    ]
    total = sum(parameter.numel() for parameter in model.parameters())
    rows, columns = model.get_output_embeddings().weight.shape
    packed = 0
    if in_four_bits:
        packed = sum(x.weight.numel() for _, _, x in linear_layers(model, block_name))
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
    length: int,
    block_name: str | None,
    activation_checkpointing: bool,
    fused_layers: bool,
    balanced: bool = False,
) -> TokenBytes:
    """What the body takes for a token, from the difference between two batches.

    Args:
        model: On the meta device, in the dtype of the arithmetic; used up.
        body: See `LogitPath.body`.
        length: Tokens of a sequence.
        block_name: Class of its blocks; None: found from the model.
        activation_checkpointing: Whether blocks are computed again in the backward.
        fused_layers: Whether norms and SwiGLU layers are fused kernels.
        balanced: Whether the balance of its router, if it has one, is part of the loss.

    Raises:
        ValueError: the family cannot be computed without memory.
    """
    router_logits = balanced and bool(body) and has_router(model)
    model.eval()
    model.set_attn_implementation(IMPLEMENTATION)
    keep_steady(model)
    if fused_layers:
        replace_layers(model)
    wrap_blocks(model, block_name, activation_checkpointing=activation_checkpointing)
    for parameter in filter(lambda p: p.requires_grad, model.parameters()):
        # what becomes of a weight's gradient is no matter of tokens
        parameter.register_post_accumulate_grad_hook(_forget)
    stack = find_stack(model, find_blocks(model, block_name))
    batches = [(_ROWS, 0), (2 * _ROWS, 0), (_ROWS, 2)]
    if not all(parameter.requires_grad for parameter in model.parameters()):
        # adapters keep what their first forward makes of their weights, which no token takes
        batches.insert(0, batches[0])
    try:
        small, large, gathering = [
            _Passes.of_all_blocks(stack, model, body, (rows, length), gathered, router_logits)
            for rows, gathered in batches
        ][-3:]
    # of a family's own code: values that steer it, operators that have no meta kernel
    except Exception as error:
        raise ValueError(f"{type(error).__name__}: {first_line(error)}") from error
    num_tokens = _ROWS * length
    kept = (large.kept - small.kept) / num_tokens
    peak = (large.peak - small.peak) / num_tokens
    return TokenBytes(
        kept=kept,
        backward=max(0.0, peak - kept),
        gathered_keys=(gathering.kept - small.kept) / num_tokens,
    )


class _Passes(NamedTuple):
    """Bytes of a forward and a backward over one batch."""

    kept: float
    peak: float

    @classmethod
    def of_all_blocks(cls, stack: Stack | None, *model_and_batch: Any) -> "_Passes":
        """Of a model, or of what its first blocks tell of it: each one keeps as much, and the
        backward begins where all of it is there."""
        if stack is None:
            return cls.of(*model_and_batch)
        shallow = []
        for num_blocks in SHALLOW:
            with stack.cut_to(num_blocks):
                shallow.append(cls.of(*model_and_batch))
        few, more = shallow
        beyond = stack.steps_beyond * (more.kept - few.kept)
        return cls(kept=more.kept + beyond, peak=more.peak + beyond)

    @classmethod
    def of(
        cls, model: Any, body: str, shape: tuple[int, int], gathered: float, router_logits: bool
    ) -> "_Passes":
        with torch.device("meta"):
            inputs: dict[str, Any] = {
                "input_ids": torch.zeros(shape, dtype=torch.int64),
                "position_ids": torch.zeros(shape, dtype=torch.int64),
                "attention_mask": torch.zeros(1, 1, 1, 1, dtype=torch.bool),
                "fastpref_row": PackedRow(ATTENTION, gathered, shape[1]),
            }
        present = [*model.parameters(), *model.buffers(), *inputs.values()]
        present = [x for x in present if isinstance(x, Tensor)]
        with torch.enable_grad(), LiveBytes(present) as live:
            if router_logits:
                # alive until the loss of them is taken
                hidden_BLD, _logits = states_and_router_logits(model, body, **inputs)
            else:
                hidden_BLD = last_hidden_states(model, body, **inputs)
            kept = live.live
            live.restart_peak()
            hidden_BLD.backward(torch.empty_like(hidden_BLD))
        return cls(kept=kept, peak=live.peak)


def _forget(parameter: Tensor) -> None:
    parameter.grad = None
