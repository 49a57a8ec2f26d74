"""From the last hidden state of a model's body to its logits, as the model itself computes it.

Families scale, cap and cut their logits under many names (`logit_scale`, `logits_scaling` that
divides in one and multiplies in another, `lm_head_multiplier`, `logits_soft_cap`, …), some scale
what enters the head. So nothing is inferred from names: it is measured on the model's own forward.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import PreTrainedModel

from fastpref.errors import ConfigError, NonFiniteError, in_a_line, is_shortage
from fastpref.model.exact_arithmetic import exact_arithmetic

ROUNDING = 1e-4
"""Upper bound of the relative float32 rounding error in the hidden states of a deep model."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LogitPath:
    """z = softcap · tanh(scale · (W · hidden_scale · h + b) / softcap), with the first V rows of W
    and b."""

    body: str
    """Name of the submodule whose `last_hidden_state` is h; "" where layers lie between body and
    head, so that no submodule returns h and h is the head's input."""
    vocab_size: int
    """V: the model cuts off or masks the logits of all further rows."""
    hidden_scale: float = 1.0
    """Factor of h before it enters the head."""
    scale: float = 1.0
    """Factor of the head's output, before the softcap."""
    softcap: float | None = None

    def logits(self, hidden: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        """The logits in plain torch: (…, D), (rows, D), (rows,) -> (…, V)."""
        bias = None if bias is None else bias[: self.vocab_size]
        return self.transform(F.linear(hidden * self.hidden_scale, weight[: self.vocab_size], bias))

    def transform(self, logits: Tensor) -> Tensor:
        """Apply scale and softcap to the head's output, of any shape."""
        scaled = self.scale * logits
        return scaled if self.softcap is None else self.softcap * torch.tanh(scaled / self.softcap)


class Observation(NamedTuple):
    """Input and output of a model's head, recorded in one forward."""

    ids: Tensor
    """(B, L) int64."""
    head_input: Tensor
    """(B·L, D) float32."""
    head_output: Tensor
    """(B·L, rows) float32."""
    logits: Tensor
    """(B, L, V) float32: what the model returned."""


def last_hidden_states(model: Any, body: str, **inputs: Any) -> Tensor:
    """The hidden states h of `LogitPath` for the inputs of a model's forward, (B, L, D)."""
    if body:
        return model.get_submodule(body)(use_cache=False, **inputs).last_hidden_state
    head, seen = model.get_output_embeddings(), []

    def stop(hidden: Tensor, *_: Any) -> Tensor:
        seen.append(hidden)
        # a placeholder for the logits, which are not used
        return hidden[..., :1]

    # a head with an adapter, or tied to an embedding with one, has a forward of its own
    own = vars(head).get("forward")
    head.forward = stop
    try:
        model(use_cache=False, **inputs)
    finally:
        del head.forward
        if own is not None:
            head.forward = own
    return seen[0]


@torch.no_grad()
def measure_logit_path(model: Any, block_name: str | None = None) -> LogitPath:
    """Measure how a model's logits follow from its body's hidden states, and verify the result.

    Args:
        model: A causal LM of transformers with its weights, on the CPU.

    Raises:
        ConfigError: more lies in between than a linear head, a scale and a softcap.
        NonFiniteError: its arithmetic overflows.
    """
    head = linear_head(model)
    model.eval()
    with exact_arithmetic(model, block_name):
        seen = _observe(model, head)
        body, hidden, hidden_scale = _find_body(model, seen)
        path = _measure_transform(model, head, seen, body, hidden_scale)
    weight, bias = head.weight.float(), getattr(head, "bias", None)
    bias = None if bias is None else bias.float()
    linear = F.linear(seen.head_input, weight, bias)
    if not (linear - seen.head_output).abs().max().item() <= _tolerance(seen.head_output):
        raise _unfit(model, f"(its LM head, {type(head).__name__}, is more than a linear layer)")
    ours = path.logits(hidden, weight, bias)
    theirs = seen.logits.flatten(0, 1)[:, : path.vocab_size]
    worst = (ours.log_softmax(-1) - theirs.log_softmax(-1)).abs().max().item()
    if not worst <= _tolerance(theirs):
        raise _unfit(model, f"(log-probabilities differ by {worst:.3g} nats)")
    return path


def linear_head(model: Any) -> Any:
    """A model's LM head: a module with a weight (rows, D) and perhaps a bias.

    Raises:
        ConfigError: it has none.
    """
    head = model.get_output_embeddings()
    weight = getattr(head, "weight", None)
    if not isinstance(weight, Tensor) or weight.dim() != 2:
        raise ConfigError(
            f"model.name_or_path: {title(model)} has no LM head with a weight (V, D), got "
            f"{type(head).__name__}; only causal language models are supported"
        )
    return head


def title(model: Any) -> str:
    """A model's class and origin, for messages, which may concern one of several models."""
    name = type(model).__name__
    return f"{name} ({model.name_or_path})" if model.name_or_path else name


def probe_ids(model: Any, num_rows: int, length: int) -> Tensor:
    """Ordinary token ids to probe a model with, (num_rows, length) int64, the same every time.

    Special ids, such as placeholders of images, are left out: some models do not read them as text.
    """
    vocab_size = model.get_input_embeddings().weight.shape[0]
    special = set(_special_ids(model.config))
    ordinary = [i for i in range(vocab_size) if i not in special] or list(range(vocab_size))
    generator = torch.Generator().manual_seed(0)
    places = torch.randint(len(ordinary), (num_rows, length), generator=generator)
    return torch.tensor(ordinary)[places]


def _special_ids(config: Any) -> Iterator[int]:
    for name, value in vars(config).items():
        if hasattr(value, "to_dict"):
            yield from _special_ids(value)
        elif name.endswith(("_token_id", "_token_index", "_token_ids")):
            for number in value if isinstance(value, list | tuple) else [value]:
                if isinstance(number, int):
                    yield number


def call_family(model: Any, function: Any, *args: Any, **inputs: Any) -> Any:
    """Call `function`, which runs a family's own code; if it fails, the model is refused. Running
    out of memory is raised as it is.

    Raises:
        ConfigError: the call failed; names its error.
    """
    try:
        return function(*args, **inputs)
    except Exception as error:
        if is_shortage(error):
            raise
        raise ConfigError(
            f"model.name_or_path: {title(model)} does not compute rows of text: {in_a_line(error)}"
        ) from error


def _observe(model: Any, head: nn.Module) -> Observation:
    ids = probe_ids(model, 2, 12)
    seen: list[tuple[Tensor, Tensor]] = []
    with head.register_forward_hook(lambda _, inputs, output: seen.append((inputs[0], output))):
        logits = call_family(model, model, use_cache=False, **_inputs(ids)).logits
    if len(seen) != 1:
        raise _unfit(model, f"(its LM head runs {len(seen)} times in one forward)")
    head_input, head_output = (tensor.float().flatten(0, -2) for tensor in seen[0])
    if len(head_output) != ids.numel():
        raise _unfit(model, f"(its LM head gives {len(head_output)} rows for {ids.numel()} tokens)")
    if not torch.isfinite(head_input).all() or not (logits < math.inf).all():
        raise NonFiniteError(
            f"model.name_or_path: {title(model)} computes hidden states or logits that are "
            "not finite, in float32 and on finite weights"
        )
    return Observation(ids, head_input, head_output, logits.float())


def _find_body(model: Any, seen: Observation) -> tuple[str, Tensor, float]:
    """The submodule whose last hidden state, times a factor, enters the head: its name, this state
    (B·L, D) and the factor."""
    names = {module: name for name, module in model.named_modules()}
    candidates = [model.base_model, model.get_decoder()]
    candidates += [module for module in names if isinstance(module, PreTrainedModel)]
    for name in dict.fromkeys(names.get(body, "") for body in candidates):
        # "" is the model itself
        if name:
            hidden, factor = _try_body(model, name, seen)
            if factor is not None:
                return name, hidden, _round(factor, model.config)
    hidden = call_family(model, last_hidden_states, model, "", **_inputs(seen.ids))
    return "", hidden.float().flatten(0, -2), 1.0


def _try_body(model: Any, name: str, seen: Observation) -> tuple[Tensor, float | None]:
    """Last hidden states of a submodule, and the factor that turns them into the head's input; None
    if no factor does."""
    try:
        hidden = last_hidden_states(model, name, **_inputs(seen.ids)).float().flatten(0, -2)
    # the submodule may be a vision tower, among others
    except Exception as error:
        if is_shortage(error):
            raise
        return seen.head_input, None
    if hidden.shape != seen.head_input.shape:
        return hidden, None
    factor = _ratio(seen.head_input, hidden)
    remainder = (seen.head_input - factor * hidden).norm() / seen.head_input.norm()
    return hidden, factor if remainder <= ROUNDING else None


def _inputs(ids: Tensor) -> dict[str, Tensor]:
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def _measure_transform(
    model: Any, head: nn.Module, seen: Observation, body: str, hidden_scale: float
) -> LogitPath:
    """Measure what a model does to its head's output, replaced here by numbers of all sizes."""
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(seen.head_output.shape, generator=generator)
    given *= torch.logspace(-4, 6, len(given))[:, None]
    with head.register_forward_hook(lambda _, __, output: given.view(output.shape)):
        got = call_family(model, model, use_cache=False, **_inputs(seen.ids)).logits
    got = got.float().flatten(0, -2)
    V = int((got > -1e30).any(0).nonzero().max()) + 1
    given, got = given[:, :V], got[:, :V]
    # medians ignore what is done to a few tokens alone; the comparison below finds that
    scale = (got[0] / given[0]).median().item()
    size, highest = (row.abs().median().item() for row in (given[-1], got[-1]))
    capped = highest < 0.5 * abs(scale) * size
    path = LogitPath(
        body=body,
        vocab_size=V,
        hidden_scale=hidden_scale,
        scale=_round(scale, model.config),
        softcap=_round(highest, model.config) if capped else None,
    )
    expected = path.transform(given)
    wrong = ~torch.isclose(got, expected, rtol=ROUNDING, atol=1e-8)
    if wrong.any():
        n, v = wrong.nonzero()[0].tolist()
        raise _unfit(model, f"(it makes {got[n, v]:.3g} of {given[n, v]:.3g}, for token {v})")
    return path


def _tolerance(values: Tensor) -> float:
    """Rounding error of sums, which scales with their largest terms."""
    return ROUNDING * max(1.0, values.abs().max().item())


def _ratio(a: Tensor, b: Tensor) -> float:
    """The factor f that brings f·b closest to a."""
    a, b = a.double(), b.double()
    return ((a * b).sum() / (b * b).sum()).item()


def _round(measured: float, config: Any) -> float:
    """Snap a measured factor to a number of the config or its reciprocal; else keep 7 digits."""
    for number in (1.0, *_numbers(config)):
        for exact in (number, 1.0 / number):
            if math.isclose(measured, exact, rel_tol=1e-6):
                return exact
    return float(f"{measured:.7g}")


def _numbers(config: Any) -> Iterator[float]:
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            yield from _numbers(value)
        elif isinstance(value, int | float) and value and math.isfinite(value):
            yield float(value)


def _unfit(model: Any, detail: str) -> ConfigError:
    return ConfigError(
        f"model.name_or_path: {title(model)} does more to its logits than a linear head, a "
        f"scale and a softcap {detail}; this family is not supported"
    )
