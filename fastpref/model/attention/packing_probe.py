"""Finds out whether a model computes packed rows as it does padded ones, by computing both."""

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import MODEL_FOR_MASKED_LM_MAPPING

from fastpref.batch import Batch, EncodedRow
from fastpref.batches.packed import pack_rows
from fastpref.batches.padded import pad_rows
from fastpref.config import PackingConfig
from fastpref.errors import ConfigError, in_a_line, is_shortage
from fastpref.model.attention.calls import AttentionCall, recording
from fastpref.model.attention.windows import limited_view, narrow_windows
from fastpref.model.blocks import find_blocks
from fastpref.model.exact_arithmetic import exact_arithmetic
from fastpref.model.logit_path import ROUNDING, LogitPath, probe_ids, title
from fastpref.model.mixers import describe_mixers, find_mixers, isolate_mixers
from fastpref.model.scorer import TokenScorer

# prompt, chosen and rejected tokens of each pair; the first and the last share their prompt
_LENGTHS = [(5, 3, 5), (1, 6, 2), (5, 2, 1)]
PROBE_WINDOW = 4
"""Sliding window, in tokens, that cuts the longer of these sequences and prompts."""


def probe_rows(ids: Tensor) -> list[EncodedRow]:
    """Pairs with a shared prompt, with a prompt of one token and with a response of one.

    Args:
        ids: At least 30 tokens, (n,) int64.
    """
    parts = iter(ids.split([n for lengths in _LENGTHS for n in lengths] + [len(ids) - 30]))
    rows = [EncodedRow(*(next(parts).tolist() for _ in range(3))) for _ in _LENGTHS]
    return [*rows[:2], rows[2]._replace(prompt_ids=rows[0].prompt_ids)]


class PackingProbe(NamedTuple):
    """Outcome of probing a model with packed rows."""

    calls: set[AttentionCall]
    """What the model's layers pass to their attention."""
    mixers: str
    """Names of layers that compute a packed row's sequences one by one; "" for none."""
    obstacle: str | None
    """Why the model cannot compute packed rows; None if it can."""


@torch.no_grad()
def probe_packing(
    model: Any,
    path: LogitPath,
    *,
    share_prompt: bool,
    longest: int,
    block_name: str | None = None,
) -> PackingProbe:
    """Compare a few rows packed and padded: a family may not pass keyword arguments on to its
    attention, may ignore position ids, or may mix tokens by other means than attention.

    Args:
        model: On the CPU; its attention implementation is `fastpref` afterwards if it can be
            packed, and unchanged if not.
        path: From its last hidden states to its logits.
        share_prompt: Whether prompts are to be shared.
        longest: Tokens in the longest sequence that will be trained on.
    """
    before = model.config._attn_implementation
    calls: set[AttentionCall] = set()
    mixers: list[nn.Module] = []
    try:
        with (
            exact_arithmetic(model, block_name),
            narrow_windows(model, longest, tokens=PROBE_WINDOW),
        ):
            blocks, padded_ND = _run_padded(model, path, block_name)
            mixers, obstacle = find_mixers(model, blocks)
            obstacle = limited_view(model, longest) or obstacle
            if obstacle is None:
                isolate_mixers(mixers)
                scorer = TokenScorer(model, recording(calls), path)
                obstacle = _difference(scorer, padded_ND, share_prompt, longest)
    # any exception of a family's own code means that it cannot be packed
    except Exception as error:
        if is_shortage(error):
            raise
        obstacle = in_a_line(error)
    if obstacle is not None:
        model.set_attn_implementation(before)
    return PackingProbe(calls, describe_mixers(mixers), obstacle)


def check_attention(model: Any, requested: str) -> None:
    """Refuse an attention that looks ahead by the model's config, and one that its family does not
    have; the model may be on the meta device.

    Raises:
        ConfigError: naming it.
    """
    config = model.config
    if type(config) in MODEL_FOR_MASKED_LM_MAPPING and getattr(config, "is_decoder", None) is False:
        raise ConfigError(
            f"model.name_or_path: {title(model)} is no causal language model: those of type "
            f"{config.model_type} predict a token from all others unless their config says "
            "is_decoder"
        )
    if requested == "sdpa" and not model._supports_sdpa:
        raise ConfigError(
            f"model.attention=sdpa: {type(model).__name__} has no such attention in "
            "transformers; set model.attention=auto or eager"
        )


def check_layout(model: Any, packing: PackingConfig, block_name: str | None) -> None:
    """Refuse a class of blocks that a model does not have, and shared prompts if its layer types
    alone rule them out; the model may be on the meta device.

    Raises:
        ConfigError: see `find_blocks`, and `choose_rows` of `choice.py`.
    """
    blocks = find_blocks(model, block_name)
    if packing.share_prompt == "true":
        _, obstacle = find_mixers(model, blocks)
        if obstacle is not None:
            raise cannot_share(model, obstacle)


def cannot_share(model: Any, obstacle: str | None) -> ConfigError:
    """The error for a model that cannot share prompts."""
    return ConfigError(
        f"packing.share_prompt=true: {type(model).__name__} cannot share prompts: {obstacle}; "
        "set packing.share_prompt=auto"
    )


def _run_padded(
    model: Any, path: LogitPath, block_name: str | None
) -> tuple[list[nn.Module], Tensor]:
    """The blocks that text passes through, and the last hidden states of the padded probe rows."""
    ran: list[nn.Module] = []
    rows = probe_rows(probe_ids(model, 2, 30)[0])
    with ExitStack() as hooks:
        for block in find_blocks(model, block_name):
            hooks.enter_context(block.register_forward_pre_hook(lambda x, _: ran.append(x)))
        padded_ND = TokenScorer(model, path=path).hidden_states(pad_rows(rows, pad_token_id=0))
    return ran, padded_ND


def _difference(
    scorer: TokenScorer, padded_ND: Tensor, share_prompt: bool, longest: int
) -> str | None:
    ids = probe_ids(scorer.model, 2, 30)
    rows = probe_rows(ids[0])

    def packed(rows: list[EncodedRow]) -> tuple[Tensor, Batch]:
        batch = pack_rows(rows, pad_token_id=0, share_prompt=share_prompt)
        return scorer.hidden_states(batch, longest=longest), batch

    packed_ND, batch = packed(rows)
    error = ((packed_ND - padded_ND).norm() / padded_ND.norm()).item()
    if not error <= ROUNDING:
        return f"its hidden states differ by {error:.2g} between packed and padded rows"
    # other tokens in one pair must leave the other pairs as they are
    changed_ND, _ = packed([rows[0], probe_rows(ids[1])[1], rows[2]])
    others = batch.sequence_ids % len(rows) != 1
    leak = ((changed_ND - packed_ND)[others].norm() / packed_ND[others].norm()).item()
    if not leak <= ROUNDING:
        return f"its hidden states move by {leak:.2g} with the tokens of other packed rows"
    return None
