"""Chooses packed or padded rows for a model, and the attention for packed ones, by trying them."""

import logging
from collections.abc import Collection
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.batch import SegmentLayout
from fastpref.batches.layouts import CPU_TOKENS, GPU_TOKENS, PackedRows, PaddedRows, RowLayout
from fastpref.batches.packed import pack_rows
from fastpref.config import ModelConfig, PackingConfig
from fastpref.distributed import World
from fastpref.errors import ConfigError, in_a_line, is_shortage
from fastpref.model.attention.backends import PackedAttention
from fastpref.model.attention.calls import AttentionCall
from fastpref.model.attention.interface import build_attention
from fastpref.model.attention.packing_probe import (
    PROBE_WINDOW,
    cannot_share,
    probe_packing,
    probe_rows,
)
from fastpref.model.attention.rules import ScoreRules
from fastpref.model.logit_path import LogitPath

logger = logging.getLogger("fastpref")


class ChosenRows(NamedTuple):
    """A model's row layout and attention backend."""

    layout: RowLayout
    attention: PackedAttention | None
    """Backend for packed rows; None for padded rows, which use the model's own attention."""


def choose_rows(
    model: Any,
    options: ModelConfig,
    packing: PackingConfig,
    world: World,
    *,
    path: LogitPath,
    longest: int,
    few_lengths: bool = False,
) -> ChosenRows:
    """Choose packed rows if the model computes them as it does padded ones, else padded rows.

    Rank 0 probes the model and logs the choice.

    Args:
        model: A causal LM of transformers, on the CPU; only rank 0's has weights.
        options: Model options: attention, compute dtype, class of the blocks.
        packing: Requested packing.
        path: From the model's last hidden states to its logits.
        longest: Tokens in the longest sequence that will be trained on.
        few_lengths: Fill packed rows up to one of a few lengths.

    Raises:
        ConfigError: the requested packing or attention is not possible.
    """
    default = GPU_TOKENS if world.device.type == "cuda" else CPU_TOKENS
    max_tokens = packing.token_limit or default
    found = None
    if packing.enabled:
        found = world.on_main(
            lambda: _find_packing(model, options, packing, world.device, path, longest)
        )
    if found is None:
        return ChosenRows(PaddedRows(max_tokens=max_tokens), None)
    layout = PackedRows(
        share_prompt=found.share_prompt,
        max_tokens=max_tokens,
        few_lengths=few_lengths,
        among_rows=not found.mixers,
    )
    return ChosenRows(layout, build_attention(found.attention))


class _Packing(NamedTuple):
    """How a model computes packed rows; pickled from rank 0 to the others."""

    attention: str
    """Name of the backend."""
    share_prompt: bool
    mixers: str
    """Names of layers that mix tokens by other means and run per sequence; "" for none."""

    def log(self) -> None:
        """Log the choice."""
        shared = "every prompt by itself"
        if self.share_prompt:
            shared = "a pair's prompt" if self.mixers else "equal prompts"
            shared += " computed once"
        logger.info("packed rows, %s, attention by %s", shared, self.attention)
        if self.mixers:
            logger.info(
                "%s mixes tokens by other means than attention and computes the sequences of a "
                "packed row one by one; measured in float32, no row moves another one",
                self.mixers,
            )


def _find_packing(
    model: Any,
    options: ModelConfig,
    packing: PackingConfig,
    device: torch.device,
    path: LogitPath,
    longest: int,
) -> _Packing | None:
    """Try packed rows, with shared prompts first; None if rows have to be padded."""
    wishes = {"auto": (True, False), "true": (True,), "false": (False,)}
    before = model.config._attn_implementation
    obstacle: str | None = None
    for share_prompt in wishes[packing.share_prompt]:
        calls, mixers, obstacle = probe_packing(
            model, path, share_prompt=share_prompt, longest=longest, block_name=options.block_name
        )
        if obstacle is not None:
            continue
        dtype = getattr(torch, options.compute_dtype)
        attention = choose_attention(options.attention, device, dtype, calls)
        if isinstance(attention, PackedAttention):
            found = _Packing(attention.name, share_prompt, mixers)
            found.log()
            return found
        # no attention here computes the model's packed rows, shared or not
        model.set_attn_implementation(before)
        obstacle = attention
        break
    if packing.share_prompt == "true":
        raise cannot_share(model, obstacle)
    name = type(model).__name__
    logger.warning("%s cannot be trained on packed rows: %s; taking padded ones", name, obstacle)
    return None


def choose_attention(
    requested: str, device: torch.device, dtype: torch.dtype, calls: Collection[AttentionCall]
) -> PackedAttention | str:
    """The packed attention to use: the requested one, or the first that computes correctly.

    Args:
        requested: The option `model.attention`.
        device, dtype: Device and compute dtype of the model.
        calls: What the model's layers pass to their attention.

    Returns:
        The attention; if "auto" finds none, what is wrong with the last one tried.

    Raises:
        ConfigError: the requested one does not compute correctly.
    """
    on_device = [*ON_GPU, "sdpa", "eager"] if device.type == "cuda" else ["sdpa", "eager"]
    problem = ""
    for name in on_device if requested == "auto" else [requested]:
        try:
            attention = build_attention(name)
            problem = attention_problem(attention, device, dtype, calls)
        # a library may raise any exception: the next one is tried
        except Exception as error:
            if is_shortage(error):
                raise
            problem = in_a_line(error)
        if not problem:
            return attention
    if requested == "auto":
        return f"no attention computes them here: {problem}"
    raise ConfigError(
        f"model.attention={requested} does not compute packed rows here: {problem}; "
        "set model.attention=auto or packing.enabled=false"
    )


ON_GPU = ("flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen")
"""What "auto" tries, fastest first. FlexAttention has to be requested by name: compiling it took
three quarters of a minute in float32 (H200, torch 2.11)."""


def attention_problem(
    attention: PackedAttention,
    device: torch.device,
    dtype: torch.dtype,
    calls: Collection[AttentionCall],
) -> str:
    """Compare a packed attention with plain torch in float32, outputs and gradients, for all calls.

    Libraries differ from version to version in the alignment of the causal mask and in the head
    counts, dtypes and devices that they support, so they are tried rather than looked up.

    Returns:
        What is wrong, "" if nothing is.
    """
    batch = pack_rows(probe_rows(torch.arange(30)), pad_token_id=0).to(device)
    assert batch.layout is not None
    T = batch.input_ids.shape[1]
    tolerance = 2e-3 if dtype == torch.float32 else 3e-2
    for call in sorted(calls, key=str):
        generator = torch.Generator().manual_seed(0)
        heads = call.heads, call.kv_heads, call.kv_heads
        widths = call.width, call.width, call.value_width
        inputs = [
            torch.randn(1, n, T, width, generator=generator).to(device, dtype)
            for n, width in zip(heads, widths, strict=True)
        ]
        upstream = torch.randn(1, T, call.heads, call.value_width, generator=generator)
        upstream = upstream.to(device, dtype)
        exact = [x.float() for x in inputs]
        expected = _with_gradients(
            build_attention("eager"), exact, upstream.float(), batch.layout, call
        )
        found = _with_gradients(attention, inputs, upstream, batch.layout, call)
        for ours, theirs in zip(found, expected, strict=True):
            worst = (ours.float() - theirs).abs().max().item() / theirs.abs().max().item()
            if not worst <= tolerance:
                return f"its values or gradients are off by {worst:.2g}"
    return ""


def _with_gradients(
    attention: PackedAttention,
    inputs: list[Tensor],
    upstream: Tensor,
    layout: SegmentLayout,
    call: AttentionCall,
) -> list[Tensor]:
    """Output, and gradients of query, key, value and sinks."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    sinks = None
    if call.has_sinks:
        sinks = torch.linspace(-1, 1, call.heads, device=inputs[0].device).requires_grad_()
        leaves.append(sinks)
    rules = ScoreRules(call.scale, call.softcap, PROBE_WINDOW if call.has_window else None, sinks)
    query, key, value = leaves[:3]
    with torch.enable_grad():
        output = attention.attend(query, key, value, attention.prepare(layout), rules)
        grads = torch.autograd.grad(output, leaves, upstream)
    return [output.detach(), *grads]
