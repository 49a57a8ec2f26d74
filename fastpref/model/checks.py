"""What a model must do before it is trained: found out by letting it compute a few tokens.

All of it in float32, whatever the weights are stored in: what 16 bits round away hides mistakes of
many nats in a response.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from fastpref.batch import PackedBatch
from fastpref.errors import CheckpointError, ConfigError, NonFiniteError, first_line
from fastpref.model.exact_arithmetic import cast_in_forward, exact_arithmetic
from fastpref.model.frozen import round_buffers
from fastpref.model.logit_path import (
    ROUNDING,
    LogitPath,
    call_family,
    measure_logit_path,
    probe_ids,
)
from fastpref.model.scorer import TokenScorer


@dataclass(frozen=True, slots=True, kw_only=True)
class Findings:
    """What was found out about a model that passed."""

    path: LogitPath
    repeats_exactly: bool
    """It computes the same bits whether gradients are recorded or not, so that policy and reference
    start equal to the last bit."""
    rounds_buffers: bool
    """It computes in its dtype only where buffers are rounded to that dtype too."""


def check_model(
    model: Any, dtype: torch.dtype, block_name: str | None = None, *, trainable: bool = True
) -> Findings:
    """Whether a causal LM can be trained here, and what its scorer must know of it.

    Args:
        model: Of transformers, with its weights, on the CPU.
        dtype: What it will compute in.
        block_name: Class of its blocks, None: found from the model.
        trainable: False where it scores only.

    Raises:
        CheckpointError: weights are not finite.
        NonFiniteError: its arithmetic is not, on finite weights.
        ConfigError: it is no model that can be trained here.
    """
    check_finite_weights(model)
    model.eval()
    with exact_arithmetic(model, block_name):
        repeats_exactly = check_repeatability(model)
        path = measure_logit_path(model, block_name)
        scorer = TokenScorer(model, path=path)
        check_causality(scorer)
    rounds_buffers = check_arithmetic(scorer, dtype, block_name)
    if trainable:
        check_backward(scorer)
    return Findings(path=path, repeats_exactly=repeats_exactly, rounds_buffers=rounds_buffers)


def check_finite_weights(model: Any) -> None:
    """Refuse weights that are NaN or infinite.

    Raises:
        CheckpointError: naming them.
    """
    wrong = [name for name, parameter in model.named_parameters() if not _is_finite(parameter)]
    if wrong:
        more = f" and {len(wrong) - 4} more" if len(wrong) > 4 else ""
        name = model.config.name_or_path or type(model).__name__
        raise CheckpointError(
            f"model: weights of {name} are not finite (NaN or infinite): "
            f"{', '.join(wrong[:4])}{more}"
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
    # of the first row the beginning stays, of the second one nothing
    other[0, :8] = first[0, :8]
    before, after = (_hidden_states(scorer, rows).view(2, 12, -1) for rows in (first, other))
    difference = ((after - before)[0, :8].norm() / before[0, :8].norm()).item()
    if not difference <= ROUNDING:
        raise ConfigError(
            f"model.name_or_path: {type(scorer.model).__name__} is no causal language model: its "
            f"hidden states move by {difference:.2g} when later tokens or other rows change; only "
            "models that predict a token from those before it can be trained"
        )


def check_repeatability(model: Any) -> bool:
    """Refuse a model that draws random numbers as it will be trained, in evaluation mode.

    Args:
        model: In the mode in which it will be trained.

    Returns:
        Whether it computes the same bits with gradients and without.

    Raises:
        ConfigError: naming the module in which two passes over the same rows part.
    """
    # the run's random state is left alone
    with torch.random.fork_rng(devices=[]):
        with torch.no_grad():
            frozen = _logits(model)
        with torch.enable_grad():
            first, second = (_logits(model).detach() for _ in range(2))
        difference = max(
            ((first - logits).norm() / first.norm()).item() for logits in (second, frozen)
        )
        # NaN is no matter of randomness
        if difference > ROUNDING / 10:
            raise ConfigError(
                f"model.name_or_path: {type(model).__name__} computes the same rows differently "
                f"each time, by {difference:.2g}, from {_where_passes_part(model)} on: policy and "
                "reference could not be compared"
            )
    return torch.equal(first, second) and torch.equal(first, frozen)


def _logits(model: Any) -> Tensor:
    ids = probe_ids(model, 2, 12)
    mask = torch.ones_like(ids)
    output = call_family(model, model, use_cache=False, input_ids=ids, attention_mask=mask)
    # a softmax does not see -inf, nor what stands for it
    return output.logits.float().clamp(min=-1e30)


@torch.enable_grad()
def check_backward(scorer: TokenScorer) -> None:
    """Refuse a model through which no gradient comes, in the dtype that it is stored in.

    Raises:
        ConfigError: saying what happens instead.
    """
    model = scorer.model
    embedded: list[Tensor] = []
    hook = model.get_input_embeddings().register_forward_hook(
        lambda _, __, output: embedded.append(output)
    )
    try:
        states = _hidden_states(scorer, probe_ids(model, 2, 12))
        # through every layer, and no memory for the gradient of any weight
        inputs = embedded or [next(model.parameters())]
        found = torch.autograd.grad(states.float().sum(), inputs, allow_unused=True)
    # an operation that a CPU does not have in 16 bits tells nothing of a GPU
    except NotImplementedError:
        return
    # of a family's own code, whatever it says; memory is no matter of the family
    except (RuntimeError, AssertionError, ValueError, TypeError) as error:
        if "DefaultCPUAllocator" in str(error):
            raise
        obstacle = f"{type(error).__name__}: {first_line(error)}"
    else:
        if any(grad is not None for grad in found):
            return
        obstacle = "no gradient reaches its embedding"
    finally:
        hook.remove()
    raise ConfigError(
        f"model.name_or_path: {type(model).__name__} cannot be trained as it computes in "
        f"evaluation mode: {obstacle}"
    )


@torch.no_grad()
def check_arithmetic(scorer: TokenScorer, dtype: torch.dtype, block_name: str | None) -> bool:
    """Refuse a model that does not compute, or overflows, in the dtype it will compute in.

    Returns:
        Whether it computes only if its buffers are rounded to that dtype as well: then they are.

    Raises:
        ConfigError: it does not compute in that dtype.
        NonFiniteError: its hidden states are not finite.
    """
    if dtype == torch.float32:
        return False
    model, name = scorer.model, str(dtype).removeprefix("torch.")
    ids = probe_ids(model, 2, 12)
    error: Exception | None = None
    for rounded in (False, True):
        undo = cast_in_forward(model, dtype, block_name)
        try:
            if rounded:
                round_buffers(model, dtype)
            states = _hidden_states(scorer, ids)
        # an operation that a CPU does not have in 16 bits tells nothing of a GPU
        except NotImplementedError:
            return False
        # of a family's own code, where float32 buffers meet narrower parameters
        except RuntimeError as mixed:
            error = mixed
        else:
            if not torch.isfinite(states).all():
                raise NonFiniteError(
                    f"model.fsdp_policy_mp: {type(model).__name__} overflows in {name}: its hidden "
                    "states are not finite; bfloat16 has the range of float32"
                )
            return rounded
        finally:
            for function in undo:
                function()
    assert error is not None
    raise ConfigError(
        f"model.fsdp_policy_mp: {type(model).__name__} does not compute in {name}: "
        f"{first_line(error)}; set model.fsdp_policy_mp=null model.policy_dtype=float32"
    ) from error


def _hidden_states(scorer: TokenScorer, ids: Tensor) -> Tensor:
    """Of every position: (B, L) -> (B·L, D)."""
    return scorer.hidden_states(
        PackedBatch(
            input_ids=ids,
            attention_mask=torch.ones_like(ids),
            score_index=torch.arange(ids.numel()),
            target=ids.flatten(),
            token_weights=None,
            sequence_ids=torch.zeros(ids.numel(), dtype=torch.int64),
            num_sequences=1,
        )
    )


def _where_passes_part(model: Any) -> str:
    """The first module, innermost first, whose output differs between a pass without gradients
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
    """Name of every module, and a sum that stands for its output, in the order they finish."""
    outputs: list[tuple[str, float]] = []

    def remember(name: str, output: Any) -> None:
        tensors = output if isinstance(output, tuple) else (output,)
        sums = [t.detach().double().sum().item() for t in tensors if isinstance(t, Tensor)]
        outputs.append((name, sum(sums)))

    hooks = [
        module.register_forward_hook(lambda _, __, output, name=name: remember(name, output))
        for name, module in model.named_modules()
    ]
    try:
        yield outputs
    finally:
        for hook in hooks:
            hook.remove()
