"""Packed rows in layers that mix tokens by other means than attention (state-space layers, linear
attention, convolutions): each sequence by itself.

Such a layer scans a row from its first token to its last, and would carry one sequence's state
into the next. All of them can compute padded rows, so for these layers alone a packed row is
unpacked into padded sequences, a shared prompt repeated for each response, and the outputs of their
own tokens are packed again. Attention and MLPs compute the packed row.
"""

import inspect
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from functools import cached_property, wraps
from itertools import takewhile
from threading import local
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils import _pytree as pytree
from transformers import PreTrainedModel

from fastpref.batch import SegmentLayout, send
from fastpref.checks import listed
from fastpref.model.attention.backends import GatheredKeys
from fastpref.model.attention.segments import runs_of_like_length
from fastpref.model.positions import config_value

# class names, without the family's prefix, of state-space, recurrent and linear attention layers
_MIXERS = re.compile(
    "Mamba|SSM|Recurrent|RgLru|RGLRU|R[Ww][Kk][Vv]|LSTM|Retention|DeltaNet|Lightning"
    "|LinearAttention|ShortConv|K[Dd][Aa]"
)
# entries of a config's list of layer types
_MIXER_TYPES = re.compile("linear|conv|mamba|recurrent|hybrid")
# classes that select keys for sparse attention: they tell the end of a sequence by its padding
_SPARSE = re.compile("Indexer")
_SPARSE_TYPES = re.compile("indexed|sparse_attention|compress")

_computed = local()
"""Thread-local: `row` holds the packed row that this thread computes."""


class SequenceGroup(NamedTuple):
    """S sequences of similar length as one batch, right-padded to L tokens."""

    shape: tuple[int, int]
    """S, L."""
    sources: Tensor
    """(tokens,) int64: indices of the group's tokens, prefixes included, among all sequences'."""
    slots: Tensor
    """(tokens,) int64: their places in the flattened (S, L) batch."""
    own: Tensor
    """(own tokens,) int64: places in that batch of the segments' own tokens, without prefixes."""


class Sequences:
    """The sequences of a packed row, unpacked; a shared prompt is repeated for each of them."""

    def __init__(self, layout: SegmentLayout) -> None:
        self._layout = layout

    @property
    def groups(self) -> list[SequenceGroup]:
        """All sequences in groups of similar length; computed on first use."""
        return self._groups_and_places[0]

    @property
    def places(self) -> Tensor:
        """(T,) int64: index of each token of the row into the own tokens of all groups."""
        return self._groups_and_places[1]

    @cached_property
    def _groups_and_places(self) -> tuple[list[SequenceGroup], Tensor]:
        device = self._layout.query_offsets.device
        segments_S4 = np.array(self._layout.segments, np.int64)
        tokens = segments_S4[:, 1] - segments_S4[:, 0]
        lengths = tokens + segments_S4[:, 3] - segments_S4[:, 2]
        firsts = np.cumsum(lengths) - lengths
        order = np.argsort(-lengths, kind="stable")
        sorted_lengths = lengths[order].tolist()
        groups, places = [], []
        for run in runs_of_like_length(
            sorted_lengths, sorted_lengths, long_keys=None, max_scores=None
        ):
            rows = order[run]
            L = max(sorted_lengths[run])
            token = np.arange(L)
            is_token = token < lengths[rows, None]
            is_own = is_token & (token >= (lengths - tokens)[rows, None])
            sources = (firsts[rows, None] + token)[is_token]
            groups.append(
                SequenceGroup(
                    (len(rows), L),
                    *(
                        send(torch.from_numpy(x), device)
                        for x in (sources, np.flatnonzero(is_token), np.flatnonzero(is_own))
                    ),
                )
            )
            own = np.arange(L) - (lengths - tokens)[rows, None] + segments_S4[rows, :1]
            places.append(own[is_own])
        of_tokens = torch.from_numpy(np.argsort(np.concatenate(places)))
        return groups, send(of_tokens, device)

    def take_apart(self, row: Tensor) -> list[Tensor]:
        """Unpack (1, T, …) into one (S, L, …) per group, padded with zeros.

        The backward adds in a fixed order.
        """
        all_tokens, layout = row[0], self._layout
        if layout.keys is not None:
            all_tokens = GatheredKeys.apply(all_tokens, layout.keys, layout.uses)
        groups = []
        for group in self.groups:
            S, L = group.shape
            padded = all_tokens.new_zeros(S * L, *all_tokens.shape[1:])
            padded = padded.index_copy(0, group.slots, all_tokens.index_select(0, group.sources))
            groups.append(padded.view(S, L, *all_tokens.shape[1:]))
        return groups

    def put_together(self, groups: list[Tensor]) -> Tensor:
        """Pack one (S, L, …) per group into (1, T, …)."""
        own = [
            x.flatten(0, 1).index_select(0, group.own)
            for x, group in zip(groups, self.groups, strict=True)
        ]
        return torch.cat(own).index_select(0, self.places)[None]


@contextmanager
def computing(sequences: Sequences | None) -> Iterator[None]:
    """Set the packed row that the model computes in this thread; None: rows are not packed."""
    before = current_sequences()
    _computed.row = sequences
    try:
        yield
    finally:
        _computed.row = before


def current_sequences() -> Sequences | None:
    """The sequences of the packed row that this thread computes; None: rows are not packed."""
    return getattr(_computed, "row", None)


def find_mixers(model: Any, blocks: Iterable[nn.Module]) -> tuple[list[nn.Module], str | None]:
    """The layers of blocks that mix tokens by other means than attention; and why the model cannot
    compute packed rows even if these are isolated, None if no reason is known.

    Found by class names and config, not by measuring: what a short convolution leaks between packed
    sequences may be small enough to pass for rounding.

    Args:
        model: A causal LM of transformers.
        blocks: The blocks that text goes through.
    """
    config, blocks = model.config.get_text_config(), list(blocks)
    kinds = [
        kind
        for name in ("layer_types", "layers_block_type", "block_types")
        for kind in config_value(config, name) or ()
        if isinstance(kind, str)
    ]
    for kind in filter(_SPARSE_TYPES.search, kinds):
        return [], f"a layer of it is {kind}, no attention to all tokens of a row"
    family = _family_prefix(model)
    mixers: list[nn.Module] = []
    for block in blocks:
        for name, module in block.named_modules():
            if _SPARSE.search(type(module).__name__):
                kind = type(module).__name__
                return [], f"its {type(block).__name__} picks keys by {name or 'itself'}, a {kind}"
        mixers += _mixers_within(block, family)
    if mixers:
        return mixers, None
    for kind in filter(_MIXER_TYPES.search, kinds):
        return [], f"a layer of it is {kind}, no attention to all tokens of a row"
    for name in (type(block).__name__ for block in blocks):
        if _MIXERS.search(name):
            return [], f"its {name} mixes tokens by itself"
    # inner models count too: a wrapper's own source may define an attention that text does not use
    models = (module for module in model.modules() if isinstance(module, PreTrainedModel))
    if not any(part._can_set_attn_implementation() for part in models):
        return [], "its attention is one of its own, which transformers cannot exchange"
    return [], None


def describe_mixers(mixers: Iterable[nn.Module]) -> str:
    """Class names of mixers, for messages; "" for none."""
    return listed(sorted({type(mixer).__name__ for mixer in mixers}))


def _family_prefix(model: Any) -> str:
    """Common prefix of the class names that the model's own source file defines."""
    own = {type(module) for module in model.modules()}
    names = [cls.__name__ for cls in own if cls.__module__ == type(model).__module__]
    alike = takewhile(lambda letters: len(set(letters)) == 1, zip(*names, strict=False))
    return "".join(letters[0] for letters in alike)


def _mixers_within(module: nn.Module, family: str) -> list[nn.Module]:
    found = []
    for child in module.children():
        if not any(_mixes(inner, family) for inner in child.modules()):
            continue
        # a list of layers has no forward to wrap
        is_list = isinstance(child, nn.ModuleList | nn.ModuleDict)
        found += _mixers_within(child, family) if is_list else [child]
    return found


def _mixes(module: nn.Module, family: str) -> bool:
    if isinstance(module, nn.Conv1d):
        return module.kernel_size[0] > 1
    # RWKV shifts a row by one token with it
    if isinstance(module, nn.RNNBase | nn.ZeroPad2d):
        return True
    return _MIXERS.search(type(module).__name__.removeprefix(family)) is not None


def isolate_mixers(mixers: Iterable[nn.Module]) -> None:
    """Make layers compute a packed row's sequences separately, in place; other rows as before."""
    for mixer in mixers:
        if not hasattr(mixer.forward, "isolated"):
            mixer.forward = _by_sequence(mixer.forward)


def _by_sequence(forward: Callable[..., Any]) -> Callable[..., Any]:
    signature = inspect.signature(forward)

    @torch.compiler.disable
    @wraps(forward)
    def isolated(*args: Any, **kwargs: Any) -> Any:
        sequences = current_sequences()
        if sequences is None:
            return forward(*args, **kwargs)
        # inside, rows are right-padded and plainly causal: they need no packed layout and no mask
        kwargs.pop("fastpref_row", None)
        bound = signature.bind(*args, **kwargs)
        if "attention_mask" in bound.arguments:
            bound.arguments["attention_mask"] = None
        T = len(sequences.places)
        outputs = [
            forward(*group_args, **group_kwargs)
            for group_args, group_kwargs in _of_groups((bound.args, bound.kwargs), sequences, T)
        ]
        return _together(outputs, sequences)

    isolated.isolated = True
    return isolated


def _of_groups(arguments: Any, sequences: Sequences, T: int) -> list[Any]:
    """A call's arguments for each group: tensors of T tokens unpacked, all others unchanged."""
    leaves, structure = pytree.tree_flatten(arguments)
    apart = [
        sequences.take_apart(leaf)
        if isinstance(leaf, Tensor) and leaf.shape[:2] == (1, T)
        else [leaf] * len(sequences.groups)
        for leaf in leaves
    ]
    return [
        pytree.tree_unflatten(list(of_group), structure) for of_group in zip(*apart, strict=True)
    ]


def _together(outputs: list[Any], sequences: Sequences) -> Any:
    """Combine a layer's outputs for each group into its output for the packed row."""
    shapes = [group.shape for group in sequences.groups]
    flat = [pytree.tree_flatten(output) for output in outputs]
    together = []
    for leaves in zip(*(leaves for leaves, _ in flat), strict=True):
        are_rows = all(
            isinstance(leaf, Tensor) and leaf.shape[:2] == shape
            for leaf, shape in zip(leaves, shapes, strict=True)
        )
        together.append(sequences.put_together(list(leaves)) if are_rows else leaves[0])
    return pytree.tree_unflatten(together, flat[0][1])
