"""Which attention computes packed rows, and whether a model can be trained on them: by trying."""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor

from fastpref.attention import build_attention
from fastpref.attention_kernels import PackedAttention
from fastpref.batch import EncodedRow, SegmentLayout, pad_rows
from fastpref.config import Config
from fastpref.distributed import World
from fastpref.errors import ConfigError, first_line
from fastpref.model import TokenScorer
from fastpref.packing import pack_rows

logger = logging.getLogger("fastpref")


class Packing(NamedTuple):
    """How a model is trained on packed rows."""

    attention: PackedAttention
    share_prompt: bool


def choose_packing(model: Any, config: Config, world: World, *, longest: int) -> Packing | None:
    """How to pack for a model, None for padded rows; rank 0 finds out, and says so in the log.

    Args:
        model: Of transformers, on the CPU; only rank 0's has weights.
        config: Of the run.
        world: Whoever computes.
        longest: Tokens of the longest sequence that will be trained on.

    Raises:
        ConfigError: what was asked for cannot be done.
    """
    if not config.packing.enabled:
        return None

    def choose() -> tuple[str, bool] | None:
        choice = _choose(model, config, world, longest)
        return (choice.attention.name, choice.share_prompt) if choice else None

    found = world.on_main(choose)
    return Packing(build_attention(found[0]), found[1]) if found else None


def _choose(model: Any, config: Config, world: World, longest: int) -> Packing | None:
    # the probe of the model runs where it was loaded
    on_cpu = build_attention("sdpa")
    wishes = {"auto": (True, False), "true": (True,), "false": (False,)}
    obstacle = None
    for share_prompt in wishes[config.packing.share_prompt]:
        obstacle = packing_obstacle(model, on_cpu, share_prompt=share_prompt, longest=longest)
        if obstacle is None:
            dtype = getattr(torch, config.model.compute_dtype)
            attention = choose_attention(config.model.attention, world.device, dtype, model.config)
            shared = "equal prompts computed once" if share_prompt else "every prompt by itself"
            logger.info("packed rows, %s, attention by %s", shared, attention.name)
            return Packing(attention, share_prompt)
    if config.packing.share_prompt == "true":
        raise ConfigError(
            f"packing.share_prompt=true: {type(model).__name__} cannot share prompts: {obstacle}; "
            "set packing.share_prompt=auto"
        )
    logger.warning(
        "%s cannot be trained on packed rows: %s; taking padded ones",
        type(model).__name__,
        obstacle,
    )
    return None


@torch.no_grad()
def packing_obstacle(
    model: Any, attention: PackedAttention, *, share_prompt: bool, longest: int
) -> str | None:
    """Why a model cannot compute packed rows as it computes padded ones; None if it can.

    Found out by doing both: a family may not hand keyword arguments down to its attention, may not
    read position ids, or may mix tokens by other means than attention.

    Args:
        model: On the CPU; its attention implementation is `fastpref` afterwards if it can, and
            what it was if not.
        attention: One that runs on the CPU.
        share_prompt: Whether prompts are to be shared.
        longest: Tokens of the longest sequence that will be trained on.
    """
    chunk = getattr(model.config.get_text_config(), "attention_chunk_size", None)
    if chunk is not None and chunk < longest:
        return f"its attention looks back {chunk} tokens, the longest sequence has {longest}"
    vocab_size = model.get_input_embeddings().weight.shape[0]
    rows = [EncodedRow(*([i % vocab_size for i in ids] for ids in row[:3])) for row in PROBE_ROWS]
    before = model.config._attn_implementation
    padded = pad_rows(rows, pad_token_id=0)
    packed = pack_rows(rows, pad_token_id=0, share_prompt=share_prompt)
    try:
        with exact_products():
            padded_ND = TokenScorer(model).hidden_states(padded)
            packed_ND = TokenScorer(model, attention).hidden_states(packed, longest=longest)
    # whatever goes wrong in a family's own code is the reason why it cannot
    except Exception as error:
        obstacle = f"{type(error).__name__}: {first_line(error)}"
    else:
        error_norm = ((packed_ND - padded_ND).norm() / padded_ND.norm()).item()
        tolerance = 1e-4 if padded_ND.dtype == torch.float32 else 3e-2
        if error_norm <= tolerance:
            return None
        obstacle = f"its hidden states differ by {error_norm:.2g} between packed and padded rows"
    model.set_attn_implementation(before)
    return obstacle


@contextmanager
def exact_products() -> Iterator[None]:
    """Float32 matrix products of a CPU in float32, whatever has been allowed elsewhere."""
    mkldnn: Any = torch.backends.mkldnn
    matmul = mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "ieee"
    try:
        yield
    finally:
        matmul.fp32_precision = before


def choose_attention(
    requested: str, device: torch.device, dtype: torch.dtype, config: Any
) -> PackedAttention:
    """The packed attention to use: the one asked for, else the first that computes correctly.

    Args:
        requested: The option `model.attention`.
        device, dtype: Where and in what the model computes.
        config: The model's config of transformers.

    Raises:
        ConfigError: none of them does.
    """
    if requested != "auto":
        names = [requested]
    else:
        names = [*ON_GPU, "sdpa", "eager"] if device.type == "cuda" else ["sdpa", "eager"]
    for name in names:
        try:
            attention = build_attention(name)
            problem = attention_problem(attention, device, dtype, config)
        # a library may fail in any way it likes: the next one is tried
        except Exception as error:
            problem = f"{type(error).__name__}: {first_line(error)}"
        if problem is None:
            return attention
    raise ConfigError(
        f"model.attention={requested} does not compute packed rows here: {problem}; "
        "set model.attention=auto or packing.enabled=false"
    )


ON_GPU = ("flash_attention_4", "flash_attention_3", "flash_attention_2", "varlen", "flex")
"""Fastest first."""


def attention_problem(
    attention: PackedAttention, device: torch.device, dtype: torch.dtype, config: Any
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
    found = _with_gradients(attention, inputs, upstream, batch.layout, softcap)
    tolerance = 2e-3 if dtype == torch.float32 else 3e-2
    for ours, theirs in zip(found, expected, strict=True):
        worst = (ours.float() - theirs).abs().max().item() / theirs.abs().max().item()
        if not worst <= tolerance:
            return f"its values or gradients are off by {worst:.2g}"
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
    query, key, value = (x.detach().requires_grad_() for x in inputs)
    scale = query.shape[-1] ** -0.5
    with torch.enable_grad():
        output = attention.attend(query, key, value, attention.prepare(layout), scale, softcap)
        grads = torch.autograd.grad(output, [query, key, value], upstream)
    return [output.detach(), *grads]
