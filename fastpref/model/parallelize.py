"""Activation checkpointing, compilation and FSDP2 from outside the model: blocks, then the root.

One rank alone is not sharded (`masters`, `frozen`): master weights, compute dtype and the order of
arithmetic are the same.
"""

from functools import wraps
from typing import Any

import torch
import torch.distributed as dist
from torch import nn
from torch.distributed.checkpoint.state_dict import StateDictOptions, set_model_state_dict
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import (
    FSDPModule,
    MixedPrecisionPolicy,
    fully_shard,
    register_fsdp_forward_method,
)
from torch.utils.checkpoint import checkpoint

from fastpref.model.blocks import find_blocks
from fastpref.model.compilation import compile_block
from fastpref.model.mixers import computing, current_sequences, find_mixers, isolate_mixers
from fastpref.model.scorer import TokenScorer


def wrap_blocks(
    model: Any,
    block_name: str | None = None,
    *,
    activation_checkpointing: bool = False,
    compile: bool = False,
    packed: bool = False,
) -> None:
    """Let each transformer block be compiled, or computed again in the backward, or compute packed
    rows whatever its layers are, in place.

    Args:
        model: Of transformers.
        activation_checkpointing: Recompute each block's activations in the backward.
        compile: Compile each block, see `compile_block`.
        packed: Rows are: layers that mix tokens by other means than attention go sequence by
            sequence, and what is compiled is for one length of rows each.
    """
    blocks = find_blocks(model, block_name)
    if packed:
        isolate_mixers(find_mixers(model, blocks)[0])
    if not (activation_checkpointing or compile):
        return
    for block in blocks:
        if compile:
            compile_block(block, few_lengths=packed)
        if activation_checkpointing:
            recompute_in_backward(block)


def parallelize(
    scorer: TokenScorer,
    mesh: DeviceMesh,
    *,
    compute_dtype: torch.dtype,
    block_name: str | None = None,
    trainable: bool = True,
) -> TokenScorer:
    """Shard a scorer's parameters over the mesh, in place.

    Args:
        scorer: On the CPU; its parameters are moved to the mesh's device shard by shard.
        mesh: One dimension, every rank.
        compute_dtype: What parameters are cast to for forward and backward; gradients are
            reduced in float32.
        trainable: False for a reference: no gradients, and nothing stays gathered for a backward.
            What is trained of a model with adapters, they have said.
    """
    if scorer.adapters is None:
        scorer.requires_grad_(trainable)
    # in float32, and small: every rank has all of them, and they are not cast
    apart = set(scorer.adapters.parameters()) if scorer.adapters else set()
    for parameter in apart:
        parameter.data = parameter.data.to(mesh.device_type)
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in find_blocks(scorer.model, block_name):
        fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=apart)
    # tied embedding and head, the final norm: one group, because a tied parameter cannot be in two
    fully_shard(
        scorer, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=apart
    )
    for module in scorer.modules():
        if isinstance(module, FSDPModule):
            # the losses divide by the step's global number of pairs: ranks are summed, not averaged
            module.set_gradient_divide_factor(1.0)
            # plain sums, of which gloo and NCCL know all ways; else torch asks for factor times sum
            module.set_force_sum_reduction_for_comms(True)
    for method in ("states", "tdpo1_values", "generate"):
        register_fsdp_forward_method(scorer, method)
    return scorer


def recompute_in_backward(block: nn.Module) -> None:
    """Keep a block's inputs alone for the backward, and compute its activations again there.

    Not by transformers' own switch, which asks for training mode, and with it for whatever draws
    random numbers in that mode. Hooks on the block, FSDP2's, stay outside.
    """
    forward = block.forward

    @wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        # again in a thread of autograd's, which has to be told
        row = current_sequences()

        def compute(*args: Any, **kwargs: Any) -> Any:
            with computing(row):
                return forward(*args, **kwargs)

        return checkpoint(compute, *args, use_reentrant=False, **kwargs)

    block.forward = recomputed


def send_weights(scorer: TokenScorer, weights: dict[str, Any]) -> None:
    """Fill every rank's shards and buffers from rank 0.

    Args:
        scorer: Sharded; empty on every rank but 0.
        weights: Rank 0's full state dict from before sharding, {} elsewhere.
    """
    options = StateDictOptions(full_state_dict=True, broadcast_from_rank0=True, strict=False)
    set_model_state_dict(scorer, weights, options=options)
    # rotary tables and the like are not in a state dict
    for buffer in scorer.buffers():
        dist.broadcast(buffer, src=0)
