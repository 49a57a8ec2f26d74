"""Checks that a model must pass before it is trained, made by computing a few tokens.

Results are compared in float32, whatever the weights are stored in: the rounding error of 16 bits
hides mistakes of many nats in a response.
"""

from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from fastpref.batch import Batch
from fastpref.errors import (
    CheckpointError,
    ConfigError,
    NonFiniteError,
    first_line,
    in_a_line,
    is_shortage,
)
from fastpref.model.exact_arithmetic import computing_in, exact_arithmetic
from fastpref.model.files.full_weights import some
from fastpref.model.frozen import round_buffers
from fastpref.model.logit_path import (
    ROUNDING,
    LogitPath,
    call_family,
    measure_logit_path,
    probe_ids,
    title,
)
from fastpref.model.router import Router, find_router
from fastpref.model.scorer import TokenScorer


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What the checks found out about a model that passed."""

    path: LogitPath
    repeats_exactly: bool
    """Whether forwards with and without gradients are bit-identical, so that policy and reference
    start exactly equal."""
    rounds_buffers: bool
    """Whether it runs in its compute dtype only if its buffers are cast to that dtype too."""
    router: Router | None
    """Its router of experts; None if it has none, or only scores."""


def check_model(
    model: Any, dtype: torch.dtype, block_name: str | None = None, *, trainable: bool = True
) -> Findings:
    """Check that a causal LM can be trained here, and find out what its scorer has to know.

    Args:
        model: Of transformers, with its weights, on the CPU.
        dtype: Its compute dtype.
        trainable: False if it only scores.

    Raises:
        CheckpointError: weights are not finite.
        NonFiniteError: finite weights give results that are not finite.
        ConfigError: the model cannot be trained here.
    """
    check_finite_weights(model)
    model.eval()
    with exact_arithmetic(model, block_name):
        repeats_exactly = check_repeatability(model)
        path = measure_logit_path(model, block_name)
        scorer = TokenScorer(model, path=path)
        check_causality(scorer)
        router = find_router(model, path.body) if trainable else None
    rounds_buffers = False
    if dtype != torch.float32:
        rounds_buffers, repeats = check_arithmetic(scorer, dtype, block_name)
        repeats_exactly = repeats_exactly and repeats
    if trainable:
        check_backward(scorer)
    return Findings(
        path=path, repeats_exactly=repeats_exactly, rounds_buffers=rounds_buffers, router=router
    )


def check_finite_weights(model: Any) -> None:
    """Refuse weights that are NaN or infinite.

    Raises:
        CheckpointError: naming them.
    """
    wrong = [name for name, parameter in model.named_parameters() if not _is_finite(parameter)]
    if wrong:
        raise CheckpointError(
            f"model.name_or_path: weights of {title(model)} are not finite (NaN or infinite): "
            f"{some(wrong)}"
        )


def _is_finite(parameter: Tensor) -> bool:
    if parameter.numel() == 0 or not parameter.is_floating_point():
        return True
    # a hundred times as fast as isfinite(…).all(): one pass, and nothing written
    lowest, highest = torch.aminmax(parameter.detach())
    return bool(torch.isfinite(lowest) and torch.isfinite(highest))


@torch.no_grad()
def check_causality(scorer: TokenScorer) -> None:
    """Refuse a model in which a token depends on a later one, or on another row.

    Raises:
        ConfigError: it does.
    """
    ids = probe_ids(scorer.model, 4, 12)
    first, other = ids[:2], ids[2:].clone()
    # the first row keeps its beginning, the second one changes entirely
    other[0, :8] = first[0, :8]
    before, after = (
        _hidden_states(scorer, rows, torch.ones_like(rows)).view(2, 12, -1)
        for rows in (first, other)
    )
    difference = ((after - before)[0, :8].norm() / before[0, :8].norm()).item()
    if not difference <= ROUNDING:
        raise ConfigError(
            f"model.name_or_path: {title(scorer.model)} is no causal language model: its "
            f"hidden states move by {difference:.2g} when later tokens or other rows change; only "
            "models that predict a token from those before it can be trained"
        )


def check_repeatability(model: Any) -> bool:
    """Refuse a model whose forward is random, or changes the model's weights.

    Args:
        model: In the mode in which it will be trained.

    Returns:
        Whether forwards with and without gradients are bit-identical.

    Raises:
        ConfigError: its weights change, or two forwards differ, naming the module where they part.
    """
    versions = [parameter._version for parameter in model.parameters()]
    # the run's random state is left alone
    with torch.random.fork_rng(devices=[]):
        with torch.no_grad():
            frozen = _logits(model)
        with torch.enable_grad():
            first, second = (_logits(model).detach() for _ in range(2))
        if versions != [parameter._version for parameter in model.parameters()]:
            raise ConfigError(
                f"model.name_or_path: {title(model)} changes its own weights when it computes in "
                "evaluation mode"
            )
        difference = max(
            ((first - logits).norm() / first.norm()).item() for logits in (second, frozen)
        )
        # NaN passes: it is not a sign of randomness
        if difference > ROUNDING / 10:
            raise ConfigError(
                f"model.name_or_path: {title(model)} computes the same rows differently "
                f"each time, by {difference:.2g}, from {_where_passes_part(model)} on: policy and "
                "reference could not be compared"
            )
    return torch.equal(first, second) and torch.equal(first, frozen)


def _padded_rows(model: Any) -> tuple[Tensor, Tensor]:
    """Two rows, one of them padded, and their attention mask, which torch's choice of kernels
    depends on."""
    ids = probe_ids(model, 2, 12)
    mask = torch.ones_like(ids)
    mask[1, 9:] = 0
    return ids, mask


def _logits(model: Any) -> Tensor:
    ids, mask = _padded_rows(model)
    output = call_family(model, model, use_cache=False, input_ids=ids, attention_mask=mask)
    # a softmax cannot tell -inf from a very negative stand-in for it
    return output.logits.float().clamp(min=-1e30)[mask.bool()]


@torch.enable_grad()
def check_backward(scorer: TokenScorer) -> None:
    """Refuse a model that propagates no gradients, in its storage dtype.

    Raises:
        ConfigError: saying what happens instead.
    """
    model = scorer.model
    embedded: list[Tensor] = []
    remember = model.get_input_embeddings().register_forward_hook(
        lambda _, __, output: embedded.append(output)
    )
    try:
        with remember:
            states = _hidden_states(scorer, *_padded_rows(model))
        # the embeddings' gradient passes every layer and takes no memory for those of weights
        inputs = embedded or [next(model.parameters())]
        found = torch.autograd.grad(states.float().sum(), inputs, allow_unused=True)
    except NotImplementedError:  # that a CPU lacks it in 16 bits tells nothing of a GPU
        return
    # raised by a family's own code; running out of memory is not the family's fault
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        if is_shortage(error):
            raise
        obstacle = in_a_line(error)
    else:
        if any(grad is not None for grad in found):
            return
        obstacle = "no gradient reaches its embedding"
    raise ConfigError(
        f"model.name_or_path: {title(model)} cannot be trained as it computes in "
        f"evaluation mode: {obstacle}"
    )


@torch.no_grad()
def check_lists(model: Any, path: LogitPath, block_name: str | None) -> None:
    """Refuse to shard a trained model whose tokens call different modules of a list, such as
    experts, with a torch that reduces the gradients of the called ones alone.

    Raises:
        ConfigError: ranks would sum gradients of different parameters.
    """
    if hasattr(FSDPModule, "set_reduce_scatter_unused_params"):
        return
    with exact_arithmetic(model, block_name):
        scorer = TokenScorer(model, path=path)
        if not scorer.with_lists:
            return
        calls: list[set[str]] = []
        for token in probe_ids(model, 16, 1).split(1):
            with _outputs(model) as outputs:
                _hidden_states(scorer, token, torch.ones_like(token))
            calls.append({name for name, _ in outputs})
    some_tokens = sorted(calls[0].union(*calls) - calls[0].intersection(*calls))
    if some_tokens:
        raise ConfigError(
            f"model.name_or_path: only some tokens of {title(model)} pass through "
            f"{some_tokens[0]}: sharding it over several ranks needs torch 2.13 or later, this is "
            f"{torch.__version__}; train it on one rank, or with adapter=lora"
        )


def check_arithmetic(
    scorer: TokenScorer, dtype: torch.dtype, block_name: str | None
) -> tuple[bool, bool]:
    """Refuse a model that fails or overflows in its compute dtype.

    Returns:
        Whether it runs only if its buffers are cast to that dtype too, which they then are; and
        whether forwards with and without gradients are bit-identical.

    Raises:
        ConfigError: it does not run in that dtype.
        NonFiniteError: its hidden states are not finite.
    """
    model, name = scorer.model, str(dtype).removeprefix("torch.")
    rows = _padded_rows(model)
    error: Exception | None = None
    for rounded in (False, True):
        if rounded:
            round_buffers(model, dtype)
        try:
            with computing_in(model, dtype, block_name):
                with torch.no_grad():
                    frozen = _hidden_states(scorer, *rows)
                with torch.enable_grad():
                    states = _hidden_states(scorer, *rows).detach()
        except NotImplementedError:  # that a CPU lacks it in 16 bits tells nothing of a GPU
            return rounded, True
        # raised by a family's own code where float32 buffers meet narrower parameters
        except RuntimeError as mixed:
            if is_shortage(mixed):
                raise
            error = mixed
        else:
            if not torch.isfinite(states).all():
                raise NonFiniteError(
                    f"model.fsdp_policy_mp: {title(model)} overflows in {name}: its hidden "
                    "states are not finite; bfloat16 has the range of float32"
                )
            return rounded, torch.equal(frozen, states)
    assert error is not None
    raise ConfigError(
        f"model.fsdp_policy_mp: {title(model)} does not compute in {name}: "
        f"{first_line(error)}; set model.fsdp_policy_mp=null model.policy_dtype=float32"
    ) from error


def _hidden_states(scorer: TokenScorer, ids: Tensor, mask: Tensor) -> Tensor:
    """Last hidden states of all tokens but padding: (B, L) -> (N, D)."""
    tokens = mask.flatten().nonzero()[:, 0]
    return scorer.hidden_states(
        Batch(
            input_ids=ids,
            attention_mask=mask,
            score_index=tokens,
            target=ids.flatten()[tokens],
            token_weights=None,
            sequence_ids=torch.zeros_like(tokens),
            num_sequences=1,
        )
    )


def _where_passes_part(model: Any) -> str:
    """The first module, innermost first, whose output differs between a forward without gradients
    and one with them."""
    passes: list[list[tuple[str, float]]] = []
    for with_gradients in (False, True):
        with _outputs(model) as outputs, torch.set_grad_enabled(with_gradients):
            _logits(model)
        passes.append(outputs)
    for (name, ours), (_, theirs) in zip(*passes, strict=False):
        if ours != theirs:
            return name or "its embedding"
    return "somewhere"


@contextmanager
def _outputs(model: nn.Module) -> Iterator[list[tuple[str, float]]]:
    """Record each module's name and the sum of its output, in the order in which they finish."""
    outputs: list[tuple[str, float]] = []

    def remember(name: str, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        sums = [t.detach().double().sum().item() for t in tensors if isinstance(t, Tensor)]
        outputs.append((name, sum(sums)))

    with ExitStack() as hooks:
        for name, module in model.named_modules():
            hooks.enter_context(
                module.register_forward_hook(lambda _, __, x, name=name: remember(name, x))
            )
        yield outputs
