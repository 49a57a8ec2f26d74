"""Packed, prompt-shared attention behind transformers' `AttentionInterface`.

A model whose attention implementation is `fastpref` computes packed rows where its forward is
given `packed_row(…)` as further keyword arguments, and ordinary attention (padded rows, sampling)
where it is not. Keyword arguments, because what activation checkpointing recomputes in a thread of
autograd gets them again.
"""

from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask

from fastpref.attention_kernels import (
    PackedAttention,
    attend_by_segment,
    attend_in_math,
    attend_to_all,
    attend_varlen,
    flash_kernel,
    flex_attend,
    prepare_flex,
    torch_varlen_kernel,
)
from fastpref.batch import EncodedRow, PackedBatch, SegmentLayout
from fastpref.errors import ConfigError, first_line
from fastpref.packing import pack_rows

IMPLEMENTATION = "fastpref"
"""The name under which transformers finds `attention_forward`."""


def packed_row(
    batch: PackedBatch, attention: PackedAttention, longest: int = 0
) -> dict[str, Any]:
    """What a model's body takes beside `input_ids` to compute a packed row.

    Args:
        batch: With a layout.
        attention: What computes it.
        longest: Tokens of the longest sequence to allow for, if longer than the batch's own.
    """
    assert batch.layout is not None
    longest = max(longest, batch.layout.longest_plain, batch.layout.longest_branch_keys)
    # four dimensions say that the mask is ready: no model builds one, and none reads this one
    ready = torch.zeros(1, 1, 1, 1, dtype=torch.bool, device=batch.input_ids.device)
    return {
        "position_ids": batch.position_ids,
        "attention_mask": ready,
        "fastpref_attention": attention,
        "fastpref_layout": attention.prepare(batch.layout),
        "fastpref_longest": longest,
    }


@torch.compiler.disable
def attention_forward(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    *,
    scaling: float | None = None,
    softcap: float | None = None,
    fastpref_attention: PackedAttention | None = None,
    fastpref_layout: Any = None,
    fastpref_longest: int = 0,
    **options: Any,
) -> tuple[Tensor, None]:
    """The attention function of transformers' interface: (1, H, T, E) … -> (1, T, H, E).

    Raises:
        NotImplementedError: the row is packed and the model wants what a packed row cannot have.
    """
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if fastpref_attention is not None:
        for name in ("s_aux", "position_bias"):
            if options.get(name) is not None:
                raise NotImplementedError(f"its attention adds {name}")
        window = options.get("sliding_window")
        if window is not None and window < fastpref_longest:
            raise NotImplementedError(
                f"its attention looks back {window} tokens, the longest sequence has "
                f"{fastpref_longest}"
            )
        output = fastpref_attention.attend(query, key, value, fastpref_layout, scale, softcap)
        return output, None
    if softcap is not None:
        mask = attention_mask
        return attend_to_all(query, key, value, scale=scale, softcap=softcap, mask=mask), None
    return sdpa_attention_forward(
        module, query, key, value, attention_mask, scaling=scale, **options
    )


AttentionInterface.register(IMPLEMENTATION, attention_forward)
AttentionMaskInterface.register(IMPLEMENTATION, sdpa_mask)


def choose_attention(
    requested: str, device: torch.device, dtype: torch.dtype, config: Any
) -> PackedAttention:
    """The packed attention to use: the one asked for, else the first that computes correctly.

    Args:
        requested: The option `model.attention`.
        device, dtype: Where and in what the model computes.
        config: The model's config of transformers.

    Raises:
        ConfigError: the one asked for does not work here.
    """
    if requested != "auto":
        problem = attention_problem(requested, device, dtype, config)
        if problem is not None:
            raise ConfigError(
                f"model.attention={requested} does not work here: {problem}; "
                "set model.attention=auto or packing.enabled=false"
            )
        return build_attention(requested)
    candidates = [*ON_GPU, "sdpa"] if device.type == "cuda" else ["sdpa", "eager"]
    for name in candidates:
        if attention_problem(name, device, dtype, config) is None:
            return build_attention(name)
    raise AssertionError("attention in plain torch differs from itself")


ON_GPU = ("flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen", "flex")
"""Fastest first."""


def build_attention(name: str) -> PackedAttention:
    """The packed attention that `model.attention` names.

    Raises:
        ImportError: its package is not installed, or not as expected.
    """
    match name:
        case "eager":
            return PackedAttention(name=name, attend=attend_in_math)
        case "sdpa":
            return PackedAttention(name=name, attend=attend_by_segment)
        case "varlen":
            return PackedAttention(name=name, attend=partial(attend_varlen, torch_varlen_kernel()))
        case "flex":
            return PackedAttention(name=name, attend=flex_attend(), prepare=prepare_flex)
    kernel = flash_kernel(int(name.removeprefix("flash_attention_")))
    return PackedAttention(name=name, attend=partial(attend_varlen, kernel))


def attention_problem(
    name: str, device: torch.device, dtype: torch.dtype, config: Any
) -> str | None:
    """Hold a packed attention to plain torch in float32, values and gradients.

    Libraries differ in how they align causality, in the heads and dtypes they take and in what they
    are built for, from version to version: trying is surer than knowing.

    Returns:
        What is wrong, None if nothing is.
    """
    config = config.get_text_config()
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    softcap = getattr(config, "attn_logit_softcapping", None)
    batch = pack_rows(PROBE_ROWS, pad_token_id=0).to(device)
    assert batch.layout is not None
    T = batch.input_ids.shape[1]
    generator = torch.Generator().manual_seed(0)
    inputs = [
        torch.randn(1, n, T, width, generator=generator).to(device, dtype)
        for n in (heads, kv_heads, kv_heads)
    ]
    upstream = torch.randn(1, T, heads, width, generator=generator).to(device, dtype)
    exact = [x.float() for x in inputs]
    expected = _with_gradients(
        build_attention("eager"), exact, upstream.float(), batch.layout, softcap
    )
    try:
        attention = build_attention(name)
        found = _with_gradients(attention, inputs, upstream, batch.layout, softcap)
    except Exception as error:
        return f"{type(error).__name__}: {first_line(error)}"
    tolerance = 2e-3 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip(found, expected, strict=True):
        error = (ours.float() - theirs).abs().max().item() / theirs.abs().max().item()
        if not error <= tolerance:
            return f"its values or gradients are off by {error:.2g}"
    return None


PROBE_ROWS = [
    EncodedRow([5, 7, 11, 13, 17], [19, 23, 29], [31, 37, 41, 43, 2]),
    EncodedRow([3], [6, 10, 15, 21, 28, 2], [36, 45]),
    EncodedRow([5, 7, 11, 13, 17], [8, 12], [2]),
]
"""Pairs with a shared prompt, with a prompt of one token and with a response of one."""


def _with_gradients(
    attention: PackedAttention,
    inputs: list[Tensor],
    upstream: Tensor,
    layout: SegmentLayout,
    softcap: float | None,
) -> list[Tensor]:
    """Output, and gradients of query, key and value."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    scale = leaves[0].shape[-1] ** -0.5
    with torch.enable_grad():
        output = attention.attend(*leaves, attention.prepare(layout), scale, softcap)
        grads = torch.autograd.grad(output, leaves, upstream)
    return [output.detach(), *grads]
