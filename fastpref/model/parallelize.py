"""Activation checkpointing, compilation and FSDP2, applied to a model's blocks and then its root.

A single rank is not sharded (see `masters`, `frozen`), but has the same master weights, compute
dtype and order of operations.
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
    """Wrap each transformer block, in place, for packed rows, compilation and activation
    checkpointing.

    Args:
        model: A causal LM of transformers.
        activation_checkpointing: Recompute each block's activations in the backward.
        compile: Compile each block, see `compile_block`.
        packed: Rows are packed: layers that mix tokens by other means than attention run sequence
            by sequence, and blocks are compiled for each length of rows.
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
        trainable: False for a reference, which has no gradients. Otherwise families and adapters
            have set what is trained, as on a single rank.
    """
    if scorer.adapters is None and not trainable:
        scorer.requires_grad_(False)
    # adapters are small and in float32: every rank has all of them, and they are not cast
    apart = set(scorer.adapters.parameters()) if scorer.adapters else set()
    for parameter in apart:
        parameter.data = parameter.data.to(mesh.device_type)
    policy = MixedPrecisionPolicy(
        param_dtype=compute_dtype, reduce_dtype=torch.float32, cast_forward_inputs=False
    )
    for block in find_blocks(scorer.model, block_name):
        sharded: Any = fully_shard(block, mesh=mesh, mp_policy=policy, ignored_params=apart)
        # experts in a list are called where a token chooses them: without zeros for the others,
        # ranks would sum gradients of different parameters. Torch before 2.13 cannot
        if block in scorer.with_lists and hasattr(sharded, "set_reduce_scatter_unused_params"):
            sharded.set_reduce_scatter_unused_params(True, recurse=False)
    # the root group: embedding, final norm and head, as a tied parameter cannot be in two groups
    fully_shard(
        scorer, mesh=mesh, mp_policy=policy, reshard_after_forward=False, ignored_params=apart
    )
    for module in scorer.modules():
        if isinstance(module, FSDPModule):
            # the losses divide by the step's global number of pairs: ranks are summed, not averaged
            module.set_gradient_divide_factor(1.0)
            # plain sums, which gloo and NCCL both have; else torch asks for a pre-multiplied sum
            module.set_force_sum_reduction_for_comms(True)
    for method in ("states", "tdpo1_values", "generate"):
        register_fsdp_forward_method(scorer, method)
    return scorer


def recompute_in_backward(block: nn.Module) -> None:
    """Keep only a block's inputs for the backward, and recompute its activations there.

    transformers' own gradient checkpointing is not used: it requires training mode, and with it
    dropout and the like. Hooks on the block, such as FSDP2's, are not part of the recomputation.
    """
    forward = block.forward

    @wraps(forward)
    def recomputed(*args: Any, **kwargs: Any) -> Any:
        # the recomputation runs in an autograd thread, in which the packed row has to be set again
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
    # non-persistent buffers, such as rotary tables, are not in a state dict
    for buffer in scorer.buffers():
        dist.broadcast(buffer, src=0)
