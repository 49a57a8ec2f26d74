"""Load balancing of a mixture-of-experts router: finding the router in a model, and the auxiliary
loss in training (Fedus et al. 2021, arXiv:2101.03961, eq. 4 to 6).

The loss is a product of two means over tokens, so a batch's loss is not the sum over its parts. It
is computed for each pair and then averaged, as the preference loss is, so that no update depends on
which pairs share a micro-batch. For a single pair it equals that of transformers.
"""

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel

from fastpref.batch import Batch
from fastpref.errors import ConfigError, in_a_line, is_shortage
from fastpref.model.logit_path import ROUNDING, probe_ids, title

logger = logging.getLogger("fastpref")

EXPERTS_OF_A_TOKEN = ("num_experts_per_tok", "moe_topk", "moe_k", "moe_top_k", "top_k_experts")
COEFFICIENT = ("router_aux_loss_coef", "aux_loss_coef", "moe_loss_weight")
"""Names of these two quantities in the configs of families."""
NO_ROUTER = "it has no router of experts"


@dataclass(frozen=True, slots=True, kw_only=True)
class Router:
    """A model's router, as `find_router` found it."""

    top_k: int = 0
    """Experts per token."""
    coefficient: float = 0.0
    """Coefficient of the auxiliary loss in the checkpoint's config; 0: none."""
    obstacle: str = ""
    """Why the auxiliary loss cannot be computed, "" if it can."""
    difference: str = ""
    """Why the loss is only used if the user sets a coefficient: transformers has no such loss for
    the family. "" if it has."""


class Balance(NamedTuple):
    """Balance of the experts' load over a micro-batch of P rows: pairs, or sequences in SFT."""

    losses: Tensor
    """(P,) float32: the auxiliary loss of each row, differentiable."""
    max_loads: Tensor
    """(P,) float32: tokens of a layer's most loaded expert relative to an even spread, mean over
    layers; 1 is even."""


class RouterBalance:
    """The auxiliary loss of the trained model.

    A forward that records gradients stores its router logits here, for `take`.

    Args:
        coefficient: Factor of the loss, > 0.
        top_k: Experts per token.
    """

    def __init__(self, coefficient: float, top_k: int) -> None:
        self.coefficient = coefficient
        self._top_k = top_k
        self._logits: tuple[Tensor, ...] = ()

    def last_hidden_states(self, model: Any, body: str, **inputs: Any) -> Tensor:
        """A body's last hidden states, see `logit_path.last_hidden_states`; stores its router
        logits."""
        hidden_BLD, self._logits = states_and_router_logits(model, body, **inputs)
        return hidden_BLD

    def take(self, batch: Batch, num_rows: int) -> Balance:
        """The balance of the last forward; to be called once after it.

        Args:
            batch: The batch of that forward.
            num_rows: P: its pairs, or sequences in SFT.
        """
        logits, self._logits = self._logits, ()
        assert logits, "no forward has recorded gradients since the last time"
        return measure_balance(logits, count_uses(batch, num_rows), self._top_k)

    def forget(self) -> None:
        """Free router logits that were not taken."""
        self._logits = ()


def measure_balance(logits: tuple[Tensor, ...], uses_PT: Tensor, top_k: int) -> Balance:
    """The auxiliary loss of each row, over all layers together as in transformers.

        loss = E · Σ_e f_e · p_e

    with f_e the share of the row's tokens that are routed to expert e, and p_e the mean router
    probability of e; an even spread gives top_k.

    Args:
        logits: Router logits of each layer, (T, E) or (B, L, E).
        uses_PT: How often each token counts in each row, float32.
        top_k: Experts per token.
    """
    num_experts = logits[0].shape[-1]
    counts, probabilities, max_loads = [], [], []
    num_tokens_P1 = uses_PT.sum(1, keepdim=True).clamp(min=1)
    for of_layer in logits:
        logits_TE = of_layer.reshape(-1, num_experts)
        counts.append(_count_choices(logits_TE, uses_PT, top_k))
        # recomputed in the backward: kept for all layers, they would take more than the logits do
        probabilities.append(
            checkpoint(
                _sum_probabilities,
                logits_TE,
                uses_PT,
                use_reentrant=False,
                preserve_rng_state=False,
            )
        )
        max_loads.append((counts[-1] / num_tokens_P1).amax(1) * (num_experts / top_k))
    means = [torch.stack(sums).mean(0) / num_tokens_P1 for sums in (counts, probabilities)]
    return Balance(num_experts * (means[0] * means[1]).sum(1), torch.stack(max_loads).mean(0))


def _sum_probabilities(logits_TE: Tensor, uses_PT: Tensor) -> Tensor:
    return uses_PT @ logits_TE.float().softmax(-1)


@torch.no_grad()
def _count_choices(logits_TE: Tensor, uses_PT: Tensor, top_k: int) -> Tensor:
    chosen = logits_TE.float().topk(top_k, dim=-1).indices
    return uses_PT @ uses_PT.new_zeros(logits_TE.shape).scatter_(1, chosen, 1)


def count_uses(batch: Batch, num_rows: int) -> Tensor:
    """How often each of the T computed tokens counts in each of P rows, (P, T) float32.

    The tokens of a row's prompt, chosen and rejected response count once each, however they are
    laid out: the second copy of a prompt and padding count 0, a token that both responses begin
    with and that is computed once counts 2. The last token of a response is left out, because it
    predicts nothing and packed rows do not compute it.
    """
    index_N, sequences_N, num_tokens = (
        batch.score_index[: batch.num_scored],
        batch.sequence_ids,
        batch.input_ids.numel(),
    )
    # a response's first token is predicted at the prompt's last position, every other one at that
    # of the response token before it
    is_first_N = torch.ones_like(sequences_N, dtype=torch.bool)
    is_first_N[1:] = sequences_N[1:] != sequences_N[:-1]
    uses_PT = torch.zeros(num_rows, num_tokens, device=index_N.device)
    places_N = sequences_N % max(1, num_rows) * num_tokens + index_N
    # sums of ones are exact in any order
    uses_PT.view(-1).scatter_add_(0, places_N, (~is_first_N).float())
    last_S = index_N.new_zeros(batch.num_sequences)
    last_P = last_S.scatter_add_(0, sequences_N, index_N * is_first_N)[:num_rows, None]
    if batch.position_ids is None:
        before_P = last_P % batch.input_ids.shape[1]
    else:
        before_P = batch.position_ids.flatten()[last_P]
    token_T = torch.arange(num_tokens, device=index_N.device)
    return uses_PT + ((token_T >= last_P - before_P) & (token_T <= last_P))


@contextmanager
def balance_left_out(model: Any) -> Iterator[None]:
    """Keep a model's own forward from computing its auxiliary loss, even if its config asks for it:
    it is not used here, and transformers' fails with a KV cache and padded prompts."""
    configs = [model.config, model.config.get_text_config()]
    saying = [config for config in configs if getattr(config, "output_router_logits", False)]
    for config in saying:
        config.output_router_logits = False
    try:
        yield
    finally:
        for config in saying:
            config.output_router_logits = True


def states_and_router_logits(
    model: Any, body: str, **inputs: Any
) -> tuple[Tensor, tuple[Tensor, ...]]:
    """Last hidden states of a model's body (B, L, D), and the router logits of its layers."""
    output = model.get_submodule(body)(use_cache=False, output_router_logits=True, **inputs)
    return output.last_hidden_state, output.router_logits


def choose_balance(wish: float | None, router: Router | None, model: Any) -> RouterBalance | None:
    """The auxiliary loss to train a model with, None for none; logs the choice.

    Args:
        wish: Its coefficient; None: the checkpoint's.
        router: The model's router, see `find_router`.
        model: For messages.

    Raises:
        ConfigError: a coefficient is requested, but the loss cannot be computed for the model.
    """
    obstacle = NO_ROUTER if router is None else router.obstacle
    if wish and obstacle:
        raise _no_balance(wish, model, obstacle)
    if router is None or wish == 0:
        return None
    if wish is None and not router.coefficient:
        reason = obstacle or router.difference or "the checkpoint's coefficient is 0"
        logger.info("no auxiliary loss of the router: %s", reason)
        return None
    coefficient = router.coefficient if wish is None else wish
    logger.info(
        "the loss of the router's balance is added to the policy's, times %g%s",
        coefficient,
        " as the checkpoint has it" if wish is None else "",
    )
    return RouterBalance(coefficient, router.top_k)


def check_coefficient(wish: float | None, model: Any) -> None:
    """Refuse a coefficient of the auxiliary loss for a model without a router; the model may be on
    the meta device.

    Raises:
        ConfigError: see `choose_balance`.
    """
    if wish and not has_router(model):
        raise _no_balance(wish, model, NO_ROUTER)


def _no_balance(wish: float, model: Any, obstacle: str) -> ConfigError:
    return ConfigError(
        f"model.router_aux_loss={wish:g}: {title(model)} cannot be trained with a loss of its "
        f"router's balance: {obstacle}; set model.router_aux_loss=auto"
    )


@torch.no_grad()
def find_router(model: Any, body: str) -> Router | None:
    """Probe a model's router by computing a few tokens; None without a router.

    Our auxiliary loss is compared with the one that transformers computes for the family.

    Args:
        model: A causal LM of transformers with its weights, on the CPU, in float32.
        body: See `LogitPath`.
    """
    if not has_router(model):
        return None
    ids = probe_ids(model, 2, 12)
    inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    if not body:
        return Router(obstacle="there are layers between its body and its head")
    try:
        _, logits = states_and_router_logits(model, body, **inputs)
    # a family's own code may raise any exception
    except Exception as error:
        if is_shortage(error):
            raise
        return Router(obstacle=in_a_line(error))
    if not logits:
        return None
    num_experts = logits[0].shape[-1]
    if any(x.shape[-1] != num_experts or x.numel() != ids.numel() * num_experts for x in logits):
        shapes = ", ".join(sorted({str(tuple(x.shape)) for x in logits}))
        return Router(obstacle=f"its layers give router logits {shapes} for {ids.numel()} tokens")
    top_k = int(next(_numbers(model.config, EXPERTS_OF_A_TOKEN), 0))
    if not 0 < top_k <= num_experts:
        return Router(obstacle="its config does not say how many experts a token has")
    ours = measure_balance(logits, torch.ones(1, ids.numel()), top_k).losses.item()
    theirs = _loss_of_transformers(model, inputs)
    if theirs is None:
        return Router(top_k=top_k, difference="transformers computes none for this family")
    if not abs(ours - theirs) <= ROUNDING * theirs:
        return Router(
            obstacle=f"its own auxiliary loss is another one ({theirs:.4g}, not {ours:.4g})"
        )
    return Router(top_k=top_k, coefficient=next(_numbers(model.config, COEFFICIENT), 0.0))


def has_router(model: Any) -> bool:
    """Whether transformers can return router logits of a model."""
    return any(
        "router_logits" in (getattr(module, "_can_record_outputs", None) or {})
        for module in model.modules()
        if isinstance(module, PreTrainedModel)
    )


def _loss_of_transformers(model: Any, inputs: dict[str, Tensor]) -> float | None:
    try:
        output = model(use_cache=False, output_router_logits=True, **inputs)
    except Exception as error:
        if is_shortage(error):
            raise
        return None
    loss = getattr(output, "aux_loss", None)
    return float(loss) if isinstance(loss, Tensor) else None


def _numbers(config: Any, names: tuple[str, ...]) -> Iterator[Any]:
    """Numbers of a config under the given names, then those of nested configs."""
    for name in names:
        if isinstance(value := getattr(config, name, None), int | float):
            yield value
    for value in vars(config).values():
        if hasattr(value, "to_dict"):
            yield from _numbers(value, names)
